#include "kernels/adamw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda_device.h"
#include "core/parallel.h"
#include "kernels/adamw_sides.h"
#include "kernels/dispatch.h"

namespace reprise::kernels {
namespace {

constexpr std::int64_t kChunkElements = 32768;

void check_settings(const AdamWSettings& s) {
  const auto expect = [](bool holds, const char* argument, const char* range, double value) {
    if (!holds || !std::isfinite(value)) {
      fail("adamw", "{} must be {}, got {}", argument, range, value);
    }
  };
  expect(s.learning_rate >= 0, "learning_rate", "0 or more", s.learning_rate);
  expect(s.beta1 >= 0 && s.beta1 < 1, "beta1", "in [0, 1)", s.beta1);
  expect(s.beta2 >= 0 && s.beta2 < 1, "beta2", "in [0, 1)", s.beta2);
  expect(s.epsilon >= 0, "epsilon", "0 or more", s.epsilon);
  expect(true, "gradient_scale", "a number", s.gradient_scale);
}

void check_tensor(std::size_t place, const AdamWTensor& t, Device device) {
  const auto check = [&](const char* role, const Tensor& tensor, bool f32_only) {
    const std::string argument = fmt::format("{} {}", role, place);
    if (f32_only) {
      expect_dtype("adamw", argument, tensor, DType::f32);
    } else if (tensor.dtype() != DType::f32 && tensor.dtype() != DType::bf16) {
      fail("adamw", "{} must be f32 or bf16, got {}", argument, name(tensor.dtype()));
    }
    expect_shape("adamw", argument, tensor, t.value.shape(), "the shape of the value");
    expect_device("adamw", argument, tensor, device);
    expect_contiguous("adamw", argument, tensor);
  };
  check("value", t.value, false);
  check("gradient", t.gradient, false);
  check("m", t.m, false);
  check("v", t.v, false);
  if (t.m.dtype() != t.v.dtype()) {
    fail("adamw", "v {} must be {} as m, got {}", place, name(t.m.dtype()), name(t.v.dtype()));
  }
  if (t.master.defined()) {
    check("master", t.master, true);
  }
  if (t.step < 1) {
    fail("adamw", "step {} must be 1 or more, got {}", place, t.step);
  }
  if (!(t.decay >= 0) || std::isinf(t.decay)) {
    fail("adamw", "decay {} must be 0 or more, got {}", place, t.decay);
  }
}

AdamWScalars scalars_of(const AdamWTensor& t, const AdamWSettings& s) {
  const auto step = static_cast<double>(t.step);
  const double correction1 = 1 - std::pow(s.beta1, step);
  const double correction2 = 1 - std::pow(s.beta2, step);
  return {static_cast<float>(s.gradient_scale),
          static_cast<float>(1 - s.learning_rate * t.decay),
          static_cast<float>(1 - s.beta1),
          static_cast<float>(s.beta2),
          static_cast<float>(1 - s.beta2),
          static_cast<float>(-s.learning_rate / correction1),
          static_cast<float>(std::sqrt(correction2)),
          static_cast<float>(s.epsilon)};
}

std::vector<AdamWRun> runs_of(std::span<const AdamWTensor> tensors) {
  std::vector<AdamWRun> runs(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const AdamWTensor& t = tensors[i];
    if (t.value.numel() > 0) {
      runs[i] = {t.value.raw(),
                 t.gradient.raw(),
                 t.m.raw(),
                 t.v.raw(),
                 t.master.defined() ? t.master.data<float>() : nullptr,
                 t.value.dtype(),
                 t.gradient.dtype(),
                 t.m.dtype()};
    }
  }
  return runs;
}

void check_tensors(std::span<const AdamWTensor> tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_tensor(i, tensors[i], tensors[0].value.device());
  }
}

// Chunks of a fixed size over all tensors together.
void run_on_cpu(std::span<const AdamWTensor> tensors, std::span<const AdamWScalars> scalars) {
  const std::vector<AdamWRun> runs = runs_of(tensors);
  std::vector<std::int64_t> firsts{0};  // the first chunk of each tensor
  for (const AdamWTensor& t : tensors) {
    firsts.push_back(firsts.back() + (t.value.numel() + kChunkElements - 1) / kChunkElements);
  }
  parallel_for(firsts.back(), 1, [&](std::int64_t chunk, std::int64_t) {
    const auto next = std::upper_bound(firsts.begin(), firsts.end(), chunk);
    const auto i = static_cast<std::size_t>(next - firsts.begin() - 1);
    if (std::isnan(scalars[i].gradient_scale)) {
      return;
    }
    const std::int64_t begin = (chunk - firsts[i]) * kChunkElements;
    cpu::adamw_run(runs[i], scalars[i], begin,
                   std::min(tensors[i].value.numel(), begin + kChunkElements));
  });
}

// Many tensors a launch. The scalars come from the host, or are read from the device's `rows`.
void run_on_cuda(std::span<const AdamWTensor> tensors, std::span<const AdamWScalars> scalars,
                 const AdamWScalars* rows, [[maybe_unused]] Device device) {
  const std::vector<AdamWRun> runs = runs_of(tensors);
  std::vector<AdamWItem> items;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].value.numel() > 0) {
      items.push_back({runs[i], rows == nullptr ? scalars[i] : AdamWScalars{},
                       rows == nullptr ? nullptr : rows + i, tensors[i].value.numel()});
    }
  }
  REPRISE_CUDA_SIDE("adamw", cuda::adamw(items, cuda_stream(device)));
}

}  // namespace

void adamw(std::span<const AdamWTensor> tensors, const AdamWSettings& settings) {
  check_settings(settings);
  if (tensors.empty()) {
    return;
  }
  check_tensors(tensors);
  const Device device = tensors[0].value.device();
  if (device.kind == DeviceKind::meta) {
    return;
  }
  std::vector<AdamWScalars> scalars;
  for (const AdamWTensor& t : tensors) {
    scalars.push_back(scalars_of(t, settings));
  }
  if (device.kind == DeviceKind::cuda) {
    run_on_cuda(tensors, scalars, nullptr, device);
    return;
  }
  run_on_cpu(tensors, scalars);
}

static_assert(sizeof(AdamWScalars) == kAdamWScalars * sizeof(float));

Tensor adamw_scalars(std::span<const AdamWTensor> tensors, const AdamWSettings& settings) {
  check_settings(settings);
  const auto count = static_cast<std::int64_t>(tensors.size());
  const Tensor scalars = Tensor::empty({count, kAdamWScalars}, DType::f32);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const AdamWScalars row = scalars_of(tensors[i], settings);
    std::memcpy(scalars.data<float>() + static_cast<std::int64_t>(i) * kAdamWScalars, &row,
                sizeof(row));
  }
  return scalars;
}

void adamw(std::span<const AdamWTensor> tensors, const Tensor& scalars) {
  const auto count = static_cast<std::int64_t>(tensors.size());
  expect_dtype("adamw", "scalars", scalars, DType::f32);
  expect_shape("adamw", "scalars", scalars, {count, kAdamWScalars}, "[tensors, scalars]");
  if (tensors.empty()) {
    return;
  }
  check_tensors(tensors);
  const Device device = tensors[0].value.device();
  expect_device("adamw", "scalars", scalars, device);
  expect_contiguous("adamw", "scalars", scalars);
  if (device.kind == DeviceKind::meta) {
    return;
  }
  if (device.kind == DeviceKind::cuda) {
    run_on_cuda(tensors, {}, static_cast<const AdamWScalars*>(scalars.raw()), device);
    return;
  }
  std::vector<AdamWScalars> rows(tensors.size());
  std::memcpy(rows.data(), scalars.raw(), rows.size() * sizeof(AdamWScalars));
  run_on_cpu(tensors, rows);
}

void adamw_gradient_scale(const Tensor& squares, const Tensor& losses, double max_norm,
                          const Tensor& scalars, const Tensor& outcome) {
  constexpr const char* op = "adamw_gradient_scale";
  if (!(max_norm >= 0) || std::isinf(max_norm)) {
    fail(op, "max_norm must be 0 or more, got {}", max_norm);
  }
  const std::int64_t count = losses.numel(), rows = scalars.numel() / kAdamWScalars;
  expect_dtype(op, "squares", squares, DType::f64);
  expect_shape(op, "squares", squares, {squares.numel()}, "[tensors]");
  expect_dtype(op, "losses", losses, DType::f32);
  expect_shape(op, "losses", losses, {count}, "[L]");
  expect_dtype(op, "scalars", scalars, DType::f32);
  expect_shape(op, "scalars", scalars, {rows, kAdamWScalars}, "[rows, scalars]");
  expect_dtype(op, "outcome", outcome, DType::f64);
  expect_shape(op, "outcome", outcome, {count + 1}, "[L + 1]");
  for (const auto& [argument, tensor] :
       {std::pair("squares", &squares), std::pair("losses", &losses),
        std::pair("scalars", &scalars), std::pair("outcome", &outcome)}) {
    expect_device(op, argument, *tensor, outcome.device());
    expect_contiguous(op, argument, *tensor);
  }
  if (outcome.is_meta()) {
    return;
  }
  AdamWOutcome call{squares.numel() == 0 ? nullptr : squares.data<double>(),
                    squares.numel(),
                    count == 0 ? nullptr : losses.data<float>(),
                    count,
                    max_norm,
                    rows == 0 ? nullptr : static_cast<AdamWScalars*>(scalars.raw()),
                    rows,
                    outcome.data<double>(),
                    nullptr};
  if (outcome.device().kind == DeviceKind::cuda) {
    call.fault = &cuda_fault_word(outcome.device())->site;
    REPRISE_CUDA_SIDE(op, cuda::adamw_gradient_scale(call, cuda_stream(outcome.device())));
    return;
  }
  const float scale = adamw_scale_of(call);
  for (std::int64_t i = 0; i < rows; ++i) {
    call.scalars[i].gradient_scale = scale;
  }
}

}  // namespace reprise::kernels

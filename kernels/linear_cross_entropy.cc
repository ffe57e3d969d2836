#include "kernels/linear_cross_entropy.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "core/cuda_device.h"
#include "kernels/accumulate.h"
#include "kernels/cross_entropy_sides.h"
#include "kernels/dispatch.h"
#include "kernels/matmul.h"
#include "kernels/reduce_sides.h"

namespace reprise::kernels {
namespace {

constexpr const char* kOperation = "linear_cross_entropy";
constexpr std::int64_t kChunkBytes = 100 << 20;
constexpr std::int64_t kRowsMultiple = 64, kLeastRows = 256;

void expect_gradient(std::string_view argument, const Tensor& gradient, const Tensor& of,
                     std::string_view letters) {
  expect_shape(kOperation, argument, gradient, of.shape(), letters);
  expect_device(kOperation, argument, gradient, of.device());
}

void check(const Tensor& x, const Tensor& w, const Tensor& labels, const Tensor& loss,
           const Tensor& dx, const Tensor& dw) {
  if (x.dtype() != DType::f32 && x.dtype() != DType::bf16) {
    fail(kOperation, "x must be f32 or bf16, got {}", name(x.dtype()));
  }
  if (x.rank() != 2) {
    fail(kOperation, "x must be [N, C], got {}", to_string(x.shape()));
  }
  expect_rows(kOperation, "x", x);
  expect_dtype(kOperation, "w", w, x.dtype());
  if (w.rank() != 2 || w.size(1) != x.size(1)) {
    fail(kOperation, "w must be [V, C] with C = {} as x {} has, got {}", x.size(1),
         to_string(x.shape()), to_string(w.shape()));
  }
  expect_device(kOperation, "w", w, x.device());
  expect_rows(kOperation, "w", w);
  expect_dtype(kOperation, "labels", labels, DType::i64);
  expect_shape(kOperation, "labels", labels, Shape{x.size(0)}, "[N]");
  expect_device(kOperation, "labels", labels, x.device());
  expect_contiguous(kOperation, "labels", labels);
  expect_dtype(kOperation, "loss", loss, DType::f32);
  expect_shape(kOperation, "loss", loss, Shape{}, "[]");
  expect_device(kOperation, "loss", loss, x.device());
  if (dx.defined()) {
    expect_dtype(kOperation, "dx", dx, x.dtype());
    expect_gradient("dx", dx, x, "[N, C]");
    expect_rows(kOperation, "dx", dx);
  }
  if (dw.defined()) {
    if (dw.dtype() != DType::f32 && dw.dtype() != w.dtype()) {
      fail(kOperation, "dw must be f32, or {} as w, got {}", name(w.dtype()), name(dw.dtype()));
    }
    expect_gradient("dw", dw, w, "[V, C]");
    expect_contiguous(kOperation, "dw", dw);
  }
}

// Losses of the logits, and their gradient in their place when `gradient`.
void losses_of(const LogitRows& rows, bool gradient, const LossItems& items, float* losses,
               Device device) {
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(kOperation,
                      gradient
                          ? cuda::cross_entropy_in_place(rows, items, losses, cuda_stream(device))
                          : cuda::cross_entropy_rows(rows, nullptr, losses, cuda_stream(device)));
    return;
  }
  gradient ? cpu::cross_entropy_in_place(rows, static_cast<float>(1 / items.number), losses)
           : cpu::cross_entropy_rows(rows, nullptr, losses);
}

// The rows of one chunk, from hidden states to gradients.
void chunk(const Tensor& x, const Tensor& w, const LogitRows& rows, const Tensor& logits,
           const LossItems& items, float* losses, const Tensor& dx, const Tensor& dw, bool first) {
  matmul(x, w, logits, {.transpose_b = true});
  if (!logits.is_meta()) {
    losses_of(rows, dx.defined() || dw.defined(), items, losses, logits.device());
  }
  if (dx.defined()) {
    matmul(logits, w, dx);
  }
  if (dw.defined()) {
    matmul(logits, x, dw, {.transpose_a = true, .accumulate = !first});
  }
}

}  // namespace

std::int64_t linear_cross_entropy_rows(std::int64_t tokens, std::int64_t width,
                                       std::int64_t vocabulary, DType dtype) {
  const std::int64_t row_bytes =
      std::max<std::int64_t>(1, vocabulary * static_cast<std::int64_t>(size_bytes(dtype)));
  const std::int64_t most =
      std::max({width / 4, kChunkBytes / row_bytes, kLeastRows}) / kRowsMultiple * kRowsMultiple;
  const std::int64_t chunks = std::max<std::int64_t>(1, (tokens + most - 1) / most);
  const std::int64_t even = (tokens + chunks - 1) / chunks;
  return std::min(tokens, (even + kRowsMultiple - 1) / kRowsMultiple * kRowsMultiple);
}

void linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& labels,
                          const Tensor& loss, const Tensor& dx, const Tensor& dw,
                          const CrossEntropyOptions& options) {
  check(x, w, labels, loss, dx, dw);
  const std::int64_t tokens = x.size(0), vocabulary = w.size(0);
  const Tensor count = count_of_items(x.device(), options);
  const LossItems items = checked_items(kOperation, labels, vocabulary, options, count);
  const std::int64_t rows = linear_cross_entropy_rows(tokens, x.size(1), vocabulary, x.dtype());
  const Tensor logits =
      Tensor::empty(Shape{rows, vocabulary}, x.dtype(), x.device(), MemoryKind::workspace);
  const Tensor losses = Tensor::empty(Shape{tokens}, DType::f32, x.device(), MemoryKind::workspace);
  const bool separate_sum = dw.defined() && dw.dtype() != DType::f32 && rows < tokens;
  const Tensor dw_sum =
      separate_sum ? Tensor::empty(dw.shape(), DType::f32, dw.device(), MemoryKind::workspace) : dw;
  const bool elements = !x.is_meta() && tokens > 0;
  float* const losses_at = elements ? losses.data<float>() : nullptr;
  for (std::int64_t begin = 0; begin < tokens; begin += rows) {
    const std::int64_t end = std::min(tokens, begin + rows);
    const Tensor part = logits.slice(0, 0, end - begin);
    LogitRows parts{};
    if (elements) {
      parts = {vocabulary == 0 ? nullptr : part.raw(),
               part.dtype(),
               end - begin,
               vocabulary,
               vocabulary,
               labels.data<std::int64_t>() + begin,
               options.ignore_index};
    }
    chunk(x.slice(0, begin, end), w, parts, part, items, elements ? losses_at + begin : nullptr,
          dx.defined() ? dx.slice(0, begin, end) : Tensor(), dw_sum, begin == 0);
  }
  if (tokens == 0 && dw.defined() && !dw.is_meta()) {
    dw.zero();
  }
  if (separate_sum) {
    cast(dw_sum, dw);
  }
  if (x.is_meta()) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(kOperation, cuda::mean_of_losses(losses_at, tokens, items, loss.data<float>(),
                                                       cuda_stream(x.device())));
    return;
  }
  double total = 0;
  for (std::int64_t n = 0; n < tokens; ++n) {
    total += losses_at[n];
  }
  *loss.data<float>() = static_cast<float>(total / items.number);
}

void linear_cross_entropy_backward(const Tensor& g, const Tensor& at_one, const Tensor& gradient,
                                   bool accumulate) {
  constexpr const char* op = "linear_cross_entropy_backward";
  expect_dtype(op, "g", g, DType::f32);
  expect_shape(op, "g", g, Shape{}, "[]");
  for (const auto& [argument, tensor] :
       {std::pair("at_one", &at_one), std::pair("gradient", &gradient)}) {
    if (tensor->dtype() != DType::f32 && tensor->dtype() != DType::bf16) {
      fail(op, "{} must be f32 or bf16, got {}", argument, name(tensor->dtype()));
    }
    expect_device(op, argument, *tensor, g.device());
    expect_contiguous(op, argument, *tensor);
  }
  expect_shape(op, "gradient", gradient, at_one.shape(), "the shape of at_one");
  if (g.is_meta() || at_one.numel() == 0) {
    return;
  }
  const std::int64_t count = at_one.numel();
  const Elements elements{at_one.raw(), at_one.dtype(), count, count, count};
  if (g.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(op, cuda::add_scaled(elements, g.data<float>(), 1.0, gradient.dtype(),
                                           gradient.raw(), accumulate, cuda_stream(g.device())));
    return;
  }
  cpu::add_scaled(elements, g.item<float>(), gradient.dtype(), gradient.raw(), accumulate);
}

}  // namespace reprise::kernels

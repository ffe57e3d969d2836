// AdamW with its scalars in memory: bitwise as with settings, and with new ones at each launch of a
// captured step. Also compiled for the SIMT shim, which runs the tests named _cuda.
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/cuda_device.h"
#include "core/step_graph.h"
#include "kernels/adamw.h"
#include "tests/core/cuda_stand_in.h"
#include "tests/error_of.h"

namespace reprise::kernels {
namespace {

using testing::CudaStandIn;
using testing::error_of;

class AdamWScalarsTest : public ::testing::TestWithParam<Device> {
 protected:
  Tensor filled(std::int64_t count, DType dtype, double seed) const {
    std::vector<float> values;
    for (std::int64_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(std::sin(seed + 0.7 * static_cast<double>(i))));
    }
    const Tensor host = Tensor::from(values, {count});
    if (dtype == DType::f32) {
      return host.to(GetParam()).clone();
    }
    std::vector<bfloat16> rounded;
    for (const float v : values) {
      rounded.push_back(to_bfloat16(v));
    }
    return Tensor::from(rounded, {count}, GetParam());
  }
  std::vector<AdamWTensor> tensors() const {
    std::vector<AdamWTensor> all;
    double seed = 1;
    for (const std::int64_t count : {1, 37, 300}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        AdamWTensor t{filled(count, dtype, seed), filled(count, dtype, seed + 1),
                      Tensor::zeros({count}, DType::f32, GetParam()),
                      Tensor::zeros({count}, DType::f32, GetParam())};
        if (dtype == DType::bf16) {
          t.master = filled(count, DType::f32, seed);
        }
        t.decay = 0.01 * seed++;
        all.push_back(t);
      }
    }
    return all;
  }
  static std::vector<std::vector<double>> values(const std::vector<AdamWTensor>& all) {
    std::vector<std::vector<double>> result;
    for (const AdamWTensor& t : all) {
      for (const Tensor& each : {t.value, t.m, t.v, t.master}) {
        result.emplace_back();
        if (each.defined() && each.dtype() == DType::f32) {
          const auto at = each.to_vector<float>();
          result.back().assign(at.begin(), at.end());
        } else if (each.defined()) {
          for (const bfloat16 v : each.to_vector<bfloat16>()) {
            result.back().push_back(to_float(v));
          }
        }
      }
    }
    return result;
  }
};

TEST_P(AdamWScalarsTest, ACapturedStepTakesANewRateAndStepAtEachLaunch) {
  std::vector<AdamWTensor> plain = tensors(), captured = tensors();
  const auto device = std::make_shared<CudaStandIn>();
  Streams streams(device);
  const Tensor scalars =
      Tensor::zeros({std::ssize(captured), kAdamWScalars}, DType::f32, GetParam());
  StepGraph graph(streams);
  graph.capture([&] {
    device->work(streams.stream(StreamKind::compute), "adamw", {}, {},
                 [&] { adamw(captured, scalars); });
  });
  for (int step = 1; step <= 4; ++step) {
    for (AdamWTensor& t : plain) {
      t.step = step;
    }
    const AdamWSettings settings{.learning_rate = 0.1 / step, .gradient_scale = 0.5 * step};
    adamw(plain, settings);
    scalars.copy_from(adamw_scalars(plain, settings));
    EXPECT_FALSE(values(captured) == values(plain));
    graph.launch();
    streams.synchronize(StreamKind::compute);
    EXPECT_TRUE(values(captured) == values(plain)) << step;
  }
}

struct Outcome {
  float scale;
  std::vector<double> outcome;
};
Outcome outcome_of(Device device, const std::vector<double>& squares,
                   const std::vector<float>& losses, double max_norm, std::int64_t rows = 300) {
  const Tensor scalars = Tensor::full({rows, kAdamWScalars}, DType::f32, 7, device);
  const Tensor outcome = Tensor::empty({std::ssize(losses) + 1}, DType::f64, device);
  adamw_gradient_scale(Tensor::from(squares, {std::ssize(squares)}, device),
                       Tensor::from(losses, {std::ssize(losses)}, device), max_norm, scalars,
                       outcome);
  const std::vector<float> all = scalars.to_vector<float>();
  for (std::size_t i = 0; i < all.size(); ++i) {
    const float expected = i % kAdamWScalars == 0 ? all[0] : 7;
    EXPECT_EQ(std::memcmp(&all[i], &expected, sizeof expected), 0) << i;
  }
  return {rows == 0 ? 0 : all[0], outcome.to_vector<double>()};
}

TEST_P(AdamWScalarsTest, TheGradientScaleIsThatOfTheHost) {
  for (const double max_norm : {0.5, 1e9, 0.0}) {
    const auto [scale, outcome] = outcome_of(GetParam(), {0.25, 2, 1e-3}, {1.5f, -2.5f}, max_norm);
    const double norm = std::sqrt(0.25 + 2 + 1e-3);
    EXPECT_EQ(scale, max_norm == 0.5 ? static_cast<float>(0.5 / (norm + 1e-6)) : 1.0f);
    EXPECT_EQ(outcome, (std::vector<double>{1.5, -2.5, norm}));
  }
  EXPECT_EQ(outcome_of(GetParam(), {}, {}, 1).scale, 1);
  EXPECT_EQ(outcome_of(GetParam(), {}, {}, 1, 0).outcome, std::vector<double>{0});
  const float nan = std::nanf("");
  EXPECT_TRUE(std::isnan(outcome_of(GetParam(), {1}, {1, nan}, 1).scale));
  EXPECT_TRUE(std::isnan(outcome_of(GetParam(), {1}, {-INFINITY}, 0).scale));
  EXPECT_TRUE(std::isnan(outcome_of(GetParam(), {1, INFINITY, 1}, {1}, 1).scale));
  EXPECT_TRUE(std::isnan(outcome_of(GetParam(), {std::nan("")}, {}, 1).scale));
}

TEST_P(AdamWScalarsTest, AScaleThatIsNoNumberLeavesItsTensor) {
  std::vector<AdamWTensor> all = tensors(), expected = tensors();
  std::vector<float> rows = adamw_scalars(all, {}).to_vector<float>();
  rows[2 * kAdamWScalars] = std::nanf("");
  adamw(all, Tensor::from(rows, {std::ssize(all), kAdamWScalars}, GetParam()));
  const AdamWTensor left = expected[2];
  expected.erase(expected.begin() + 2);
  adamw(expected, AdamWSettings{});
  expected.insert(expected.begin() + 2, left);
  EXPECT_TRUE(values(all) == values(expected));
}

TEST_P(AdamWScalarsTest, Mistakes) {
  const auto scale = [&](const Tensor& squares, const Tensor& losses, double max_norm,
                         const Tensor& scalars, const Tensor& outcome) {
    return error_of([&] { adamw_gradient_scale(squares, losses, max_norm, scalars, outcome); });
  };
  const auto zeros = [&](const Shape& shape, DType dtype) {
    return Tensor::zeros(shape, dtype, GetParam());
  };
  const Tensor squares = zeros({3}, DType::f64), losses = zeros({2}, DType::f32),
               scalars = zeros({4, 8}, DType::f32), outcome = zeros({3}, DType::f64);
  EXPECT_EQ(scale(squares, losses, -1, scalars, outcome),
            "[adamw_gradient_scale] max_norm must be 0 or more, got -1");
  EXPECT_EQ(scale(losses, losses, 1, scalars, outcome),
            "[adamw_gradient_scale] squares must be f64, got f32");
  EXPECT_EQ(scale(squares, squares, 1, scalars, outcome),
            "[adamw_gradient_scale] losses must be f32, got f64");
  EXPECT_EQ(scale(squares, losses, 1, zeros({4, 7}, DType::f32), outcome),
            "[adamw_gradient_scale] scalars must be [rows, scalars] = [3, 8], got [4, 7]");
  EXPECT_EQ(scale(squares, losses, 1, scalars, zeros({2}, DType::f64)),
            "[adamw_gradient_scale] outcome must be [L + 1] = [3], got [2]");
  EXPECT_EQ(scale(squares, losses, 1, scalars, Tensor::zeros({3}, DType::f64, meta)),
            "[adamw_gradient_scale] squares must be on meta, got " + to_string(GetParam()));

  const std::vector<AdamWTensor> all = tensors();
  const auto with = [&](const Shape& shape, DType dtype) {
    return error_of([&] { adamw(all, Tensor::zeros(shape, dtype, GetParam())); });
  };
  EXPECT_EQ(with({6, 8}, DType::f64), "[adamw] scalars must be f32, got f64");
  EXPECT_EQ(with({5, 8}, DType::f32),
            "[adamw] scalars must be [tensors, scalars] = [6, 8], got [5, 8]");
  EXPECT_EQ(error_of([&] {
              adamw(all, Tensor::zeros({6, 8}, DType::f32, meta));
            }),
            "[adamw] scalars must be on " + to_string(GetParam()) + ", got meta");
  EXPECT_EQ(error_of([&] {
              adamw(all, Tensor::zeros({8, 6}, DType::f32, GetParam()).transpose(0, 1));
            }),
            "[adamw] scalars must be contiguous, got shape [6, 8] with other strides: call "
            "contiguous()");
  EXPECT_EQ(error_of([&] { (void)adamw_scalars(all, {.beta1 = 2}); }),
            "[adamw] beta1 must be in [0, 1), got 2");
  adamw({}, Tensor::zeros({0, 8}, DType::f32, GetParam()));
}

std::vector<Device> devices() {
  std::vector<Device> all{reprise::cpu};
  if (cuda_device_count() > 0) {
    all.push_back({DeviceKind::cuda, 0});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Devices, AdamWScalarsTest, ::testing::ValuesIn(devices()),
                         [](const auto& at) {
                           return std::string(at.param == reprise::cpu ? "on_cpu" : "on_cuda");
                         });

}  // namespace
}  // namespace reprise::kernels

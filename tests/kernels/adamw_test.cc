#include "kernels/adamw.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "tests/error_of.h"
#include "tests/random_tensor.h"

namespace reprise::kernels {
namespace {

using testing::error_of;
using testing::normal;

double at(const Tensor& x, std::int64_t i) {
  return x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<bfloat16>()[i]);
}

AdamWTensor states(const Tensor& value, const Tensor& gradient, DType state) {
  return {
      value, gradient, Tensor::zeros(value.shape(), state), Tensor::zeros(value.shape(), state), {},
      0.01,  1};
}

// Values of PyTorch 2.15: torch.optim.AdamW, lr 0.01, weight decay 0.01, four steps.
TEST(AdamW, AgreesWithPyTorch) {
  const Tensor p = Tensor::from(std::vector<float>{0.5f, -1.25f, 2.0f, 0.0f, -0.003f}, Shape{5});
  AdamWTensor t = states(p, Tensor::zeros({5}, DType::f32), DType::f32);
  for (int k = 0; k < 4; ++k) {
    const auto step = static_cast<float>(k);
    const std::vector<float> g = {0.1f * (step + 1), -2.0f, 1e-6f, 0.3f - 0.1f * step, 5.0f};
    t.gradient = Tensor::from(g, Shape{5});
    t.step = k + 1;
    adamw({&t, 1}, {.learning_rate = 0.01});
  }
  const std::vector<double> value = {0.4609699845314026, -1.2095060348510742, 1.959601640701294,
                                     -0.035953886806964874, -0.04299279674887657};
  const std::vector<double> m = {0.09048999845981598, -0.6877999901771545, 3.4390001246720203e-07,
                                 0.04707000032067299, 1.7195000648498535};
  const std::vector<double> v = {0.0002998001000378281, 0.015976017341017723, 3.994004291792835e-15,
                                 0.00013964033860247582, 0.09985010325908661};
  for (std::int64_t i = 0; i < 5; ++i) {
    const auto j = static_cast<std::size_t>(i);
    EXPECT_NEAR(at(p, i) / value[j], 1, 1e-6) << i;
    EXPECT_NEAR(at(t.m, i) / m[j], 1, 1e-6) << i;
    EXPECT_NEAR(at(t.v, i) / v[j], 1, 1e-6) << i;
  }
}

// Every choice of dtypes, by the formula in double from what the tensors held before.
TEST(AdamW, EveryDTypeAgreesWithDouble) {
  const AdamWSettings s{1e-2, 0.8, 0.95, 1e-6, 0.5};
  for (const DType p_dtype : {DType::f32, DType::bf16}) {
    for (const DType g_dtype : {DType::f32, DType::bf16}) {
      for (const DType state : {DType::f32, DType::bf16}) {
        for (const bool master : {false, true}) {
          for (const std::int64_t count : {1, 37, 40'000}) {
            AdamWTensor t = states(normal({count}, p_dtype, 1), normal({count}, g_dtype, 2), state);
            t.m.copy_from(normal({count}, state, 3));
            t.v.copy_from(normal({count}, state, 4));
            for (std::int64_t i = 0; i < count; ++i) {  // v is no negative number
              if (state == DType::f32) {
                t.v.data<float>()[i] *= t.v.data<float>()[i];
              } else {
                t.v.data<bfloat16>()[i].bits &= 0x7fffu;
              }
            }
            t.master = master ? normal({count}, DType::f32, 5) : Tensor();
            t.step = 3;
            const Tensor p0 = (master ? t.master : t.value).clone(), m0 = t.m.clone(),
                         v0 = t.v.clone();
            adamw({&t, 1}, s);
            for (std::int64_t i = 0; i < count; ++i) {
              const double g = 0.5 * at(t.gradient, i);
              const double m = 0.8 * at(m0, i) + 0.2 * g;
              const double v = 0.95 * at(v0, i) + 0.05 * g * g;
              const double p = at(p0, i) * (1 - 1e-2 * 0.01) -
                               1e-2 / (1 - std::pow(0.8, 3)) * m /
                                   (std::sqrt(v) / std::sqrt(1 - std::pow(0.95, 3)) + 1e-6);
              const double state_error = state == DType::f32 ? 1e-6 : 5e-3;
              ASSERT_NEAR(at(t.m, i), m, state_error * (1 + std::abs(m)));
              ASSERT_NEAR(at(t.v, i), v, state_error * (1e-3 + v));
              ASSERT_NEAR(at(t.value, i), p,
                          (p_dtype == DType::f32 ? 1e-6 : 5e-3) * (1 + std::abs(p)));
              if (master) {
                ASSERT_NEAR(at(t.master, i), p, 1e-6 * (1 + std::abs(p)));
                if (p_dtype == DType::bf16) {
                  ASSERT_EQ(at(t.value, i),
                            to_float(to_bfloat16(static_cast<float>(at(t.master, i)))));
                }
              }
            }
          }
        }
      }
    }
  }
}

// A bf16 value with a master takes steps that are smaller than its last bit.
TEST(AdamW, MastersKeepSmallSteps) {
  AdamWTensor with =
      states(Tensor::full({1}, DType::bf16, 1), Tensor::full({1}, DType::f32, 1), DType::f32);
  with.decay = 0;
  AdamWTensor without = states(with.value.clone(), with.gradient, DType::f32);
  without.decay = 0;
  with.master = Tensor::full({1}, DType::f32, 1);
  for (int step = 1; step <= 100; ++step) {
    with.step = without.step = step;
    adamw({&with, 1}, {.learning_rate = 1e-4});
    adamw({&without, 1}, {.learning_rate = 1e-4});
  }
  EXPECT_NEAR(at(with.value, 0), 0.99, 2e-3);
  EXPECT_EQ(at(without.value, 0), 1.0);
}

TEST(AdamW, ManyTensorsAreThoseOfEachForEveryThreadCount) {
  const auto make = [] {
    std::vector<AdamWTensor> tensors;
    for (const std::int64_t count : {3, 0, 70'000, 32768, 1}) {
      tensors.push_back(
          states(normal({count}, DType::f32, 1), normal({count}, DType::f32, 2), DType::f32));
      tensors.back().step = count + 1;
      tensors.back().decay = 0.1 * static_cast<double>(count % 3);
    }
    return tensors;
  };
  std::vector<AdamWTensor> each = make();
  for (AdamWTensor& t : each) {
    adamw({&t, 1}, {});
  }
  const int before = threads();
  for (const int count : {1, 2, 5}) {
    set_threads(count);
    const std::vector<AdamWTensor> together = make();
    adamw(together, {});
    for (std::size_t i = 0; i < each.size(); ++i) {
      EXPECT_EQ(each[i].value.to_vector<float>(), together[i].value.to_vector<float>());
      EXPECT_EQ(each[i].v.to_vector<float>(), together[i].v.to_vector<float>());
    }
  }
  set_threads(before);
}

TEST(AdamW, OnMetaNothingIsComputed) {
  const Tensor p = Tensor::empty({4}, DType::f32, meta);
  const AdamWTensor t{p, p, p, p, {}, 0, 1};
  adamw({&t, 1}, {});
}

TEST(AdamW, Errors) {
  const Tensor x = Tensor::zeros({4}, DType::f32), half = Tensor::zeros({4}, DType::bf16),
               other = Tensor::zeros({3}, DType::f32), ids = Tensor::zeros({4}, DType::i64);
  const auto message = [](const AdamWTensor& t, const AdamWSettings& s = {}) {
    return error_of([&] { adamw({&t, 1}, s); });
  };
  EXPECT_EQ(message({ids, x, x, x, {}, 0, 1}), "[adamw] value 0 must be f32 or bf16, got i64");
  EXPECT_EQ(message({x, other, x, x, {}, 0, 1}),
            "[adamw] gradient 0 must be the shape of the value = [4], got [3]");
  EXPECT_EQ(message({x, x, x, half, {}, 0, 1}), "[adamw] v 0 must be f32 as m, got bf16");
  EXPECT_EQ(message({x, x, x, x, half, 0, 1}), "[adamw] master 0 must be f32, got bf16");
  EXPECT_EQ(message({x, x, x, x, {}, 0, 0}), "[adamw] step 0 must be 1 or more, got 0");
  EXPECT_EQ(message({x, x, x, x, {}, -1, 1}), "[adamw] decay 0 must be 0 or more, got -1");
  EXPECT_EQ(message({x, Tensor::zeros({4}, DType::f32, meta), x, x, {}, 0, 1}),
            "[adamw] gradient 0 must be on cpu, got meta");
  EXPECT_EQ(
      message({x, Tensor::zeros({4, 2}, DType::f32).slice(1, 0, 1).reshape({4}), x, x, {}, 0, 1}),
      "[adamw] gradient 0 must be contiguous, got shape [4] with other strides: call "
      "contiguous()");
  const AdamWTensor good{x, x, x.clone(), x.clone(), {}, 0, 1};
  EXPECT_EQ(message(good, {.learning_rate = -1}),
            "[adamw] learning_rate must be 0 or more, got -1");
  EXPECT_EQ(message(good, {.learning_rate = std::nan("")}),
            "[adamw] learning_rate must be 0 or more, got nan");
  EXPECT_EQ(message(good, {.beta1 = 1}), "[adamw] beta1 must be in [0, 1), got 1");
  EXPECT_EQ(message(good, {.beta2 = -0.5}), "[adamw] beta2 must be in [0, 1), got -0.5");
  EXPECT_EQ(message(good, {.epsilon = -1}), "[adamw] epsilon must be 0 or more, got -1");
}

}  // namespace
}  // namespace reprise::kernels

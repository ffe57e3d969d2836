#include "kernels/activation.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"

namespace reprise::kernels {
namespace {

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

struct Exact {
  double value, derivative;
};
Exact exact(Activation f, double x) {
  switch (f) {
    case Activation::silu: {
      const double s = sigmoid(x);
      return {x * s, s + x * s * (1 - s)};
    }
    case Activation::gelu: {
      const double p = std::erfc(-x * std::sqrt(0.5)) / 2;
      return {x * p, p + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI)};
    }
    case Activation::gelu_tanh: {
      const double scale = 2 * std::sqrt(2 / M_PI);
      const double s = sigmoid(scale * (x + 0.044715 * x * x * x));
      return {x * s, s + x * s * (1 - s) * scale * (1 + 3 * 0.044715 * x * x)};
    }
    case Activation::quick_gelu: {
      const double s = sigmoid(1.702 * x);
      return {x * s, s + 1.702 * x * s * (1 - s)};
    }
    case Activation::exp:
      return {std::exp(x), std::exp(x)};
  }
  return {};
}

constexpr Activation kAll[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                               Activation::quick_gelu};

// Floats of every exponent and sign up to a magnitude, a few thousand of each.
std::vector<float> floats(float limit) {
  std::vector<float> values;
  for (std::uint32_t bits = 0; bits < std::bit_cast<std::uint32_t>(limit); bits += 2027) {
    values.push_back(std::bit_cast<float>(bits));
    values.push_back(-values.back());
  }
  return values;
}

TEST(Activation, IsWithinFloatPrecisionOfTheFormula) {
  const std::vector<float> values = floats(3e4f);
  const auto count = static_cast<std::int64_t>(values.size());
  const Tensor x = Tensor::from(values, {count}), y = Tensor::empty({count}, DType::f32),
               one = Tensor::full({count}, DType::f32, 1.0),
               dx = Tensor::empty({count}, DType::f32);
  for (const Activation f : kAll) {
    activation(f, x, y);
    activation_backward(f, x, one, dx, false);
    double worst = 0, worst_far = 0, worst_derivative = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const double at = values[static_cast<std::size_t>(i)];
      const Exact expected = exact(f, at);
      const double error =
          std::abs(y.data<float>()[i] - expected.value) / std::max(std::abs(expected.value), 1e-30);
      // Far below zero the results are tiny, and e^u carries the rounding of u: 6e-8 |u|.
      double& bound = at > -4 ? worst : worst_far;
      bound = std::max(bound, error);
      worst_derivative =
          std::max(worst_derivative, std::abs(dx.data<float>()[i] - expected.derivative));
    }
    EXPECT_LT(worst, 1.5e-6) << name(f);
    EXPECT_LT(worst_far, 1.5e-5) << name(f);
    EXPECT_LT(worst_derivative, 5e-7) << name(f);
  }
}

TEST(Activation, SpecialValues) {
  const float inf = INFINITY;
  const Tensor x =
      Tensor::from(std::vector<float>{0.0f, -0.0f, inf, NAN, 1e38f, -1e30f, 1e-40f}, {7});
  const Tensor y = Tensor::empty({7}, DType::f32), one = Tensor::full({7}, DType::f32, 1.0),
               dx = Tensor::empty({7}, DType::f32);
  for (const Activation f : kAll) {
    activation(f, x, y);
    activation_backward(f, x, one, dx, false);
    const float* at = y.data<float>();
    EXPECT_EQ(at[0], 0.0f);
    EXPECT_TRUE(at[1] == 0.0f && std::signbit(at[1])) << name(f);
    EXPECT_EQ(at[2], inf) << name(f);
    EXPECT_TRUE(std::isnan(at[3])) << name(f);
    EXPECT_EQ(at[4], 1e38f) << name(f);
    EXPECT_EQ(at[5], 0.0f) << name(f);
    EXPECT_NEAR(at[6], 0.5e-40f, 2e-45f) << name(f);
    EXPECT_EQ(dx.data<float>()[0], 0.5f) << name(f);
    EXPECT_TRUE(std::isnan(dx.data<float>()[3])) << name(f);
    EXPECT_EQ(dx.data<float>()[4], 1.0f) << name(f);
    EXPECT_EQ(dx.data<float>()[5], 0.0f) << name(f);
  }
}

Tensor wave(const Shape& shape, DType dtype, double step) {
  const Tensor x = Tensor::empty(shape, dtype);
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const auto value = static_cast<float>(3 * std::sin(step * static_cast<double>(i + 1)));
    if (dtype == DType::f32) {
      x.data<float>()[i] = value;
    } else {
      x.data<bfloat16>()[i] = to_bfloat16(value);
    }
  }
  return x;
}

bool same(const Tensor& a, const Tensor& b) {
  const Tensor x = a.contiguous(), y = b.contiguous();
  return std::memcmp(x.raw(), y.raw(), static_cast<std::size_t>(x.bytes())) == 0;
}

TEST(Activation, ResultsDoNotDependOnPlaceStridesReuseOrThreads) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor wide = wave({7, 2 * 1237}, dtype, 0.37), other = wave({7, 2 * 1237}, dtype, 0.73);
    const Tensor x = wide.slice(1, 0, 1237), up = wide.slice(1, 1237, 2474),
                 dy = other.slice(1, 1237, 2474).contiguous();
    for (const Activation f : kAll) {
      const Tensor y = Tensor::empty({7, 1237}, dtype), dx = Tensor::empty({7, 1237}, dtype);
      activation(f, x, y);
      activation_backward(f, x, dy, dx, false);
      const Tensor in_place = x.contiguous();
      activation(f, in_place, in_place);
      EXPECT_TRUE(same(in_place, y));
      const Tensor reused = dy.clone();
      activation_backward(f, x, reused, reused, false);
      EXPECT_TRUE(same(reused, dx));
      // One element alone goes through a partial vector.
      for (const std::int64_t i : {std::int64_t{0}, std::int64_t{5}, std::int64_t{1236}}) {
        const Tensor one = Tensor::empty({1, 1}, dtype);
        activation(f, x.slice(0, 3, 4).slice(1, i, i + 1), one);
        EXPECT_TRUE(same(one, y.slice(0, 3, 4).slice(1, i, i + 1))) << name(f) << " " << i;
      }
    }
    const Tensor y = Tensor::empty({7, 1237}, dtype), dgate = Tensor::empty({7, 1237}, dtype),
                 dup = Tensor::empty({7, 1237}, dtype);
    gated_silu(x, up, y);
    gated_silu_backward(x, up, dy, dgate, false, dup, false);
    const Tensor in_up = up.contiguous();
    gated_silu(x, in_up, in_up);
    EXPECT_TRUE(same(in_up, y));
    const Tensor reused = dy.clone(), both = Tensor::zeros({7, 2474}, dtype);
    gated_silu_backward(x, up, reused, both.slice(1, 0, 1237), false, reused, false);
    EXPECT_TRUE(same(both.slice(1, 0, 1237), dgate));
    EXPECT_TRUE(same(reused, dup));
    const int before = threads();
    set_threads(1);
    const Tensor alone = Tensor::empty({7, 1237}, dtype);
    gated_silu(x, up, alone);
    set_threads(before);
    EXPECT_TRUE(same(alone, y));
  }
}

TEST(GatedSilu, RoundsTheActivationBeforeTheProductInBf16) {
  const Tensor gate = wave({3000}, DType::bf16, 0.37), up = wave({3000}, DType::bf16, 0.91),
               rounded = Tensor::empty({3000}, DType::bf16), y = Tensor::empty({3000}, DType::bf16);
  activation(Activation::silu, gate, rounded);
  gated_silu(gate, up, y);
  for (std::int64_t i = 0; i < 3000; ++i) {
    const float product = to_float(rounded.data<bfloat16>()[i]) * to_float(up.data<bfloat16>()[i]);
    ASSERT_EQ(y.data<bfloat16>()[i].bits, to_bfloat16(product).bits);
  }
}

TEST(GatedSilu, GradientsAccumulateInEitherDType) {
  const Tensor gate = wave({64}, DType::bf16, 0.37), up = wave({64}, DType::bf16, 0.91),
               dy = wave({64}, DType::bf16, 0.11);
  const Tensor dgate = Tensor::full({64}, DType::f32, 2.0),
               dup = Tensor::full({64}, DType::bf16, 1.0);
  gated_silu_backward(gate, up, dy, dgate, true, dup, true);
  gated_silu_backward(gate, up, dy, dgate, true, Tensor(), false);
  for (std::int64_t i = 0; i < 64; ++i) {
    const double g = to_float(gate.data<bfloat16>()[i]), u = to_float(up.data<bfloat16>()[i]),
                 d = to_float(dy.data<bfloat16>()[i]);
    const Exact silu = exact(Activation::silu, g);
    EXPECT_NEAR(dgate.data<float>()[i], 2 + 2 * d * u * silu.derivative, 4e-6);
    const double sum = 1 + d * silu.value;
    EXPECT_NEAR(to_float(dup.data<bfloat16>()[i]), sum,
                std::abs(sum - 1) / 256 + std::abs(sum) / 256);
  }
}

}  // namespace
}  // namespace reprise::kernels

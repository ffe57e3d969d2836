#include "kernels/elementwise.h"

#include <cmath>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "core/philox.h"
#include "kernels/dropout.h"

namespace reprise::kernels {
namespace {

Tensor ramp(const Shape& shape, DType dtype, double step) {
  const Tensor x = Tensor::empty(shape, dtype);
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const auto value = static_cast<float>(std::sin(step * static_cast<double>(i + 1)));
    if (dtype == DType::f32) {
      x.data<float>()[i] = value;
    } else {
      x.data<bfloat16>()[i] = to_bfloat16(value);
    }
  }
  return x;
}

double element(const Tensor& x, std::int64_t i) {
  return x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<bfloat16>()[i]);
}

bool same(const Tensor& a, const Tensor& b) {
  const Tensor x = a.contiguous(), y = b.contiguous();
  return std::memcmp(x.raw(), y.raw(), static_cast<std::size_t>(x.bytes())) == 0;
}

constexpr double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : 0x1p-8;
}

TEST(Elementwise, MulAndScaleRoundOnceAndAccumulate) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const DType y_dtype : {DType::f32, DType::bf16}) {
      const Tensor x = ramp({3, 1001}, dtype, 0.3),
                   r = ramp({3, 2100}, dtype, 0.7).slice(1, 5, 1006);
      const Tensor y = Tensor::full({3, 1001}, y_dtype, 2.0), z = y.clone(), w = y.clone();
      mul(x, r, y);
      mul(x, r, z, true);
      scale(x, -0.75, w, true);
      for (std::int64_t i = 0; i < x.numel(); ++i) {
        const double product = element(x, i) * element(r, i / 1001 * 2100 + i % 1001);
        ASSERT_NEAR(element(y, i), product, epsilon(y_dtype) * std::abs(product));
        ASSERT_NEAR(element(z, i), 2 + product, epsilon(y_dtype) * 4);
        ASSERT_NEAR(element(w, i), 2 - 0.75 * element(x, i), epsilon(y_dtype) * 4);
      }
      if (dtype == y_dtype) {
        const Tensor in_place = x.clone();
        mul(in_place, r, in_place);
        EXPECT_TRUE(same(in_place, y));
      }
    }
  }
}

TEST(Elementwise, BiasAndItsGradient) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const DType bias_dtype : {DType::f32, DType::bf16}) {
      const Tensor dy = ramp({5, 200, 300}, dtype, 0.37);
      const Tensor sums = Tensor::full({300}, bias_dtype, 1.0),
                   strided = Tensor::empty({30}, bias_dtype);
      bias_gradient(dy, sums, true);
      bias_gradient(dy.slice(2, 10, 40), strided, false);
      for (std::int64_t c = 0; c < 300; ++c) {
        double sum = 0;
        for (std::int64_t row = 0; row < 1000; ++row) {
          sum += element(dy, row * 300 + c);
        }
        ASSERT_NEAR(element(sums, c), 1 + sum, 2e-5 + epsilon(bias_dtype) * (1 + std::abs(sum)));
        if (c >= 10 && c < 40) {
          ASSERT_NEAR(element(strided, c - 10), sum, 2e-5 + epsilon(bias_dtype) * std::abs(sum));
        }
      }
      const int before = threads();
      set_threads(1);
      const Tensor alone = Tensor::full({300}, bias_dtype, 1.0);
      bias_gradient(dy, alone, true);
      set_threads(before);
      EXPECT_TRUE(same(alone, sums));
    }
    const Tensor x = ramp({4, 77}, dtype, 0.2), bias = ramp({77}, dtype, 0.9),
                 y = Tensor::empty({4, 77}, dtype);
    add_bias(x, bias, y);
    for (std::int64_t i = 0; i < x.numel(); ++i) {
      const double sum = element(x, i) + element(bias, i % 77);
      ASSERT_NEAR(element(y, i), sum, epsilon(dtype) * std::abs(sum));
    }
  }
  const Tensor none = Tensor::full({3}, DType::f32, 5.0);
  bias_gradient(Tensor::empty({0, 3}, DType::f32), none, false);
  EXPECT_EQ(none.to_vector<float>(), std::vector<float>({0, 0, 0}));
}

TEST(Dropout, MaskIsThePhiloxStreamOfSeedAndOffset) {
  const std::uint64_t seed = 0x123456789abcdef0, offset = 0xfffffff0;  // carries into the high word
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor x = ramp({3, 20011}, dtype, 0.1), y = Tensor::empty({3, 20011}, dtype);
    dropout(x, 0.3, seed, offset, y);
    std::int64_t dropped = 0;
    for (std::int64_t i = 0; i < x.numel(); ++i) {
      const auto block = philox(seed, offset + static_cast<std::uint64_t>(i / 4));
      const bool keep = uniform(block[static_cast<std::size_t>(i % 4)]) >= 0.3f;
      const float scaled = static_cast<float>(element(x, i)) * static_cast<float>(1 / 0.7);
      const double expected = !keep                 ? 0.0
                              : dtype == DType::f32 ? scaled
                                                    : to_float(to_bfloat16(scaled));
      ASSERT_EQ(element(y, i), expected) << i;
      dropped += keep ? 0 : 1;
    }
    EXPECT_NEAR(static_cast<double>(dropped) / static_cast<double>(x.numel()), 0.3, 0.01);
    // Rows of a wider matrix, and in place: the mask goes by the element's index.
    const Tensor wide = Tensor::zeros({3, 20020}, dtype), part = wide.slice(1, 7, 20018);
    part.copy_from(x);
    dropout(part, 0.3, seed, offset, part);
    EXPECT_TRUE(same(part, y));
  }
}

TEST(Dropout, EdgesOfP) {
  const Tensor x = ramp({1000}, DType::f32, 0.1), y = Tensor::empty({1000}, DType::f32);
  dropout(x, 0.0, 1, 2, y);
  EXPECT_TRUE(same(x, y));
  dropout(x, 1 - 1e-12, 1, 2, y);
  EXPECT_EQ(y.to_vector<float>(), std::vector<float>(1000, 0.0f));
}

}  // namespace
}  // namespace reprise::kernels

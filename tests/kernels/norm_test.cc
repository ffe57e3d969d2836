// What the op rows do not reach: buffers used twice, the roundings to the bit, accumulation.
#include "kernels/norm.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/accumulate.h"

namespace reprise::kernels {
namespace {

constexpr double kEpsilon = 1e-6;
constexpr DType kDTypes[] = {DType::f32, DType::bf16};

Tensor random(const Shape& shape, DType dtype, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Tensor values = Tensor::empty(shape, DType::f32);
  for (std::int64_t i = 0; i < values.numel(); ++i) {
    values.data<float>()[i] = normal(engine);
  }
  Tensor result = Tensor::empty(shape, dtype);
  cast(values, result);
  return result;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())) == 0;
}

TEST(Norm, WorksInPlace) {
  for (const DType dtype : kDTypes) {
    const Tensor x = random({5, 37}, dtype, 1), r = random({5, 37}, dtype, 2);
    const Tensor w = random({37}, dtype, 3), b = random({37}, dtype, 4);
    const Tensor y = x.clone(), sum = x.clone(), mean = Tensor::zeros({5}, DType::f32);
    const Tensor scale = mean.clone();
    layer_norm_residual(x, r, w, b, kEpsilon, y, sum, mean, scale);
    const Tensor x2 = x.clone(), r2 = r.clone();
    layer_norm_residual(x2, r2, w, b, kEpsilon, /*y=*/r2, /*sum=*/x2, mean, scale);
    EXPECT_TRUE(same_bits(y, r2));
    EXPECT_TRUE(same_bits(sum, x2));
    rms_norm(x, w, kEpsilon, y, scale);
    const Tensor x3 = x.clone();
    rms_norm(x3, w, kEpsilon, x3, scale);
    EXPECT_TRUE(same_bits(y, x3));
  }
}

TEST(Norm, BackwardMayOverwriteTheGradientsItReads) {
  for (const DType dtype : kDTypes) {
    const Tensor x = random({40, 37}, dtype, 1), dy = random({40, 37}, dtype, 2);
    const Tensor dsum = random({40, 37}, dtype, 3), w = random({37}, dtype, 4);
    const Tensor y = x.clone(), scale = Tensor::zeros({40}, DType::f32);
    rms_norm(x, w, kEpsilon, y, scale);
    const Tensor dx = x.clone(), dw = Tensor::zeros({37}, DType::f32);
    rms_norm_backward(dy, dsum, x, w, scale, {{dx}, {dw}, {}});
    for (const bool over_dy : {true, false}) {
      const Tensor dy2 = dy.clone(), dsum2 = dsum.clone(), dw2 = dw.clone();
      const Tensor& to = over_dy ? dy2 : dsum2;
      rms_norm_backward(dy2, dsum2, x, w, scale, {{to}, {dw2}, {}});
      EXPECT_TRUE(same_bits(dx, to));
      EXPECT_TRUE(same_bits(dw, dw2));
    }
  }
}

TEST(Norm, TheResidualFormIsTheAddFollowedByTheNorm) {
  for (const DType dtype : kDTypes) {
    const Tensor x = random({7, 70}, dtype, 1), r = random({7, 70}, dtype, 2);
    const Tensor w = random({70}, dtype, 3);
    const Tensor fused = x.clone(), fused_sum = x.clone(), y = x.clone(), sum = x.clone();
    const Tensor scale = Tensor::zeros({7}, DType::f32), fused_scale = scale.clone();
    rms_norm_residual(x, r, w, kEpsilon, fused, fused_sum, fused_scale);
    add(x, r, sum);
    rms_norm(sum, w, kEpsilon, y, scale);
    EXPECT_TRUE(same_bits(y, fused));
    EXPECT_TRUE(same_bits(sum, fused_sum));
    EXPECT_TRUE(same_bits(scale, fused_scale));
  }
}

TEST(Norm, RmsNormRoundsBeforeTheWeightAndLayerNormOnce) {
  const Tensor x = random({1, 64}, DType::bf16, 1), w = random({64}, DType::bf16, 2);
  const Tensor b = random({64}, DType::bf16, 3);
  const Tensor y = x.clone(), mean = Tensor::zeros({1}, DType::f32), scale = mean.clone();
  rms_norm(x, w, kEpsilon, y, scale);
  const float s = scale.data<float>()[0];
  for (int c = 0; c < 64; ++c) {
    const float n = to_float(to_bfloat16(to_float(x.data<bfloat16>()[c]) * s));
    EXPECT_EQ(y.data<bfloat16>()[c].bits, to_bfloat16(n * to_float(w.data<bfloat16>()[c])).bits);
  }
  layer_norm(x, w, b, kEpsilon, y, mean, scale);
  for (int c = 0; c < 64; ++c) {
    const float n =
        (to_float(x.data<bfloat16>()[c]) - mean.data<float>()[0]) * scale.data<float>()[0];
    const float exact =
        std::fma(n, to_float(w.data<bfloat16>()[c]), to_float(b.data<bfloat16>()[c]));
    // A vector unit without fma rounds twice in f32: it may fall on the other side of a tie.
    EXPECT_NEAR(to_float(y.data<bfloat16>()[c]), exact, std::abs(exact) * 0x1p-8 + 1e-6);
  }
}

TEST(Norm, KeepsItsPrecisionFarFromZero) {
  // mean(x^2) - mean(x)^2 would lose every digit here.
  Tensor x = Tensor::empty({1, 512}, DType::f32);
  for (int c = 0; c < 512; ++c) {
    x.data<float>()[c] = 10000.0f + static_cast<float>(c % 2);
  }
  const Tensor w = Tensor::full({512}, DType::f32, 1), y = x.clone();
  const Tensor mean = Tensor::zeros({1}, DType::f32), scale = mean.clone();
  layer_norm(x, w, {}, 0.0, y, mean, scale);
  EXPECT_NEAR(y.data<float>()[0], -1.0f, 1e-4);
  EXPECT_NEAR(y.data<float>()[1], 1.0f, 1e-4);
}

TEST(Norm, GradientsAddToWhatIsThere) {
  for (const DType dtype : kDTypes) {
    const Tensor x = random({33, 20}, dtype, 1), dy = random({33, 20}, dtype, 2);
    const Tensor w = random({20}, dtype, 3), y = x.clone();
    const Tensor mean = Tensor::zeros({33}, DType::f32), scale = mean.clone();
    layer_norm(x, w, w, kEpsilon, y, mean, scale);
    const Tensor once = Tensor::zeros({20}, DType::f32), twice = once.clone();
    layer_norm_backward(dy, {}, x, w, mean, scale, {{}, {once}, {}});
    for (int i = 0; i < 2; ++i) {
      layer_norm_backward(dy, {}, x, w, mean, scale, {{}, {twice, true}, {}});
    }
    for (int c = 0; c < 20; ++c) {
      EXPECT_EQ(twice.data<float>()[c], 2 * once.data<float>()[c]);
    }
    const Tensor dx = x.clone(), added = Tensor::full({33, 20}, dtype, 1.0);
    layer_norm_backward(dy, {}, x, w, mean, scale, {{dx}, {}, {}});
    layer_norm_backward(dy, {}, x, w, mean, scale, {{added, true}, {}, {}});
    const Tensor to = Tensor::full({33, 20}, dtype, 1.0);
    accumulate(to, dx);  // for bf16 with one rounding more
    for (std::int64_t i = 0; i < dx.numel(); ++i) {
      if (dtype == DType::f32) {
        EXPECT_EQ(added.data<float>()[i], to.data<float>()[i]);
      } else {
        const float expected = to_float(to.data<bfloat16>()[i]);
        EXPECT_NEAR(to_float(added.data<bfloat16>()[i]), expected, std::abs(expected) / 64 + 0.01);
      }
    }
  }
}

TEST(Norm, WeightGradientsOfNoRowsAreZero) {
  const Tensor none = Tensor::empty({0, 6}, DType::f32), w = Tensor::full({6}, DType::f32, 1);
  const Tensor stats = Tensor::empty({0}, DType::f32), dw = Tensor::full({6}, DType::f32, 7);
  const Tensor db = dw.clone();
  layer_norm_backward(none, {}, none, w, stats, stats, {{none}, {dw}, {db, true}});
  EXPECT_EQ(dw.to_vector<float>(), std::vector<float>(6, 0.0f));
  EXPECT_EQ(db.to_vector<float>(), std::vector<float>(6, 7.0f));
}

}  // namespace
}  // namespace reprise::kernels

#include "kernels/reduce.h"

#include <cmath>
#include <cstring>
#include <limits>
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

Tensor scalar(double value = 0, DType dtype = DType::f32) {
  return Tensor::full({}, dtype, value);
}

double at(const Tensor& x, std::int64_t i) {
  return x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<bfloat16>()[i]);
}

double sum_of(const Tensor& x, bool squares) {
  const Tensor out = scalar(0, DType::f64);
  squares ? sum_squares(x, 1, out) : sum(x, 1, out);
  return out.item<double>();
}

TEST(Reduce, SumsAgreeWithDouble) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t count : {0, 1, 15, 16, 100, 1024, 1025, 16384, 16385, 100'003}) {
      const Tensor x = normal({count}, dtype, static_cast<unsigned>(count));
      double total = 0, squares = 0, size = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        total += at(x, i);
        size += std::abs(at(x, i));
        squares += at(x, i) * at(x, i);
      }
      EXPECT_NEAR(sum_of(x, false), total, 3e-7 * size) << count;
      EXPECT_NEAR(sum_of(x, true), squares, 3e-7 * squares) << count;
      const Tensor out = scalar();
      sum_squares(x, 0.25, out);
      EXPECT_NEAR(out.item<float>(), squares / 4, 3e-7 * squares);
    }
  }
}

TEST(Reduce, TheSameForEveryThreadCountAndStride) {
  const Tensor x = normal({257, 301}, DType::f32, 1);
  const Tensor wide = Tensor::zeros({257, 320}, DType::f32);
  const Tensor strided = wide.slice(1, 7, 308);
  strided.copy_from(x);
  const int before = threads();
  set_threads(1);
  const double total = sum_of(x, false), squares = sum_of(x, true);
  for (const int count : {1, 2, 5}) {
    set_threads(count);
    EXPECT_EQ(sum_of(x, false), total);
    EXPECT_EQ(sum_of(strided, false), total);
    EXPECT_EQ(sum_of(strided, true), squares);
  }
  set_threads(before);
}

TEST(Reduce, NonFiniteElementsAreSeen) {
  const Tensor x = normal({20'000}, DType::f32, 1);
  x.data<float>()[19'999] = std::nanf("");
  EXPECT_TRUE(std::isnan(sum_of(x, false)));
  EXPECT_TRUE(std::isnan(sum_of(x, true)));
}

TEST(Reduce, Gradients) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool accumulate : {false, true}) {
      const Tensor wide = normal({37, 600}, dtype, 1);
      const Tensor x = wide.slice(1, 0, 555);
      const Tensor ds = normal({37, 555}, dtype, 2), dq = ds.clone(), before = ds.clone();
      sum_backward(scalar(3), 0.5, ds, accumulate);
      sum_squares_backward(scalar(3), x, 0.5, dq, accumulate);
      const double tolerance = dtype == DType::f32 ? 1e-6 : 3e-2;
      for (std::int64_t i = 0; i < ds.numel(); ++i) {
        const double base = accumulate ? at(before, i) : 0;
        const double value = at(wide, i / 555 * 600 + i % 555);
        EXPECT_NEAR(at(ds, i), base + 1.5, tolerance) << i;
        EXPECT_NEAR(at(dq, i), base + 3 * value, tolerance * (1 + std::abs(value))) << i;
      }
    }
  }
}

TEST(Reduce, NormsOfManyTensorsAreThoseOfEach) {
  std::vector<Tensor> tensors;
  for (const std::int64_t count : {5, 0, 40'000, 16384, 1}) {
    tensors.push_back(
        normal({count}, count == 5 ? DType::bf16 : DType::f32, static_cast<unsigned>(count)));
  }
  const Tensor out = Tensor::empty({5}, DType::f64);
  squared_norms(tensors, out);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(out.data<double>()[i], sum_of(tensors[i], true)) << i;
  }
  const Tensor before = tensors[2].clone();
  scale_all(tensors, 0.5);
  for (std::int64_t i = 0; i < before.numel(); ++i) {
    ASSERT_EQ(at(tensors[2], i), at(before, i) * 0.5);
  }
  squared_norms({}, Tensor::empty({0}, DType::f64));
  scale_all({}, 2);
}

TEST(Reduce, Errors) {
  const Tensor x = Tensor::zeros({2, 3}, DType::f32), ids = Tensor::zeros({2}, DType::i64);
  const Tensor columns = Tensor::zeros({3, 2}, DType::f32).transpose(0, 1);
  EXPECT_EQ(error_of([&] { sum(ids, 1, scalar()); }), "[sum] x must be f32 or bf16, got i64");
  EXPECT_EQ(error_of([&] { sum(x, 1, x); }), "[sum] out must be [] = [], got [2, 3]");
  EXPECT_EQ(error_of([&] { sum(x, 1, scalar(0, DType::bf16)); }),
            "[sum] out must be f32 or f64, got bf16");
  EXPECT_EQ(
      error_of([&] { sum_squares(columns, 1, scalar()); }),
      "[sum_squares] x must be rows of unit stride, got shape [2, 3] with other strides: call "
      "contiguous()");
  EXPECT_EQ(error_of([&] { sum(x, 1, Tensor::zeros({}, DType::f32, meta)); }),
            "[sum] out must be on cpu, got meta");
  EXPECT_EQ(error_of([&] { sum_backward(x, 1, x); }),
            "[sum_backward] g must be [] = [], got [2, 3]");
  EXPECT_EQ(error_of([&] { sum_backward(scalar(), 1, columns); }),
            "[sum_backward] dx must be contiguous, got shape [2, 3] with other strides: call "
            "contiguous()");
  EXPECT_EQ(error_of([&] { sum_squares_backward(scalar(), x, 1, ids); }),
            "[sum_squares_backward] dx must be f32 or bf16, got i64");
  EXPECT_EQ(error_of([&] { sum_squares_backward(scalar(), scalar(), 1, x); }),
            "[sum_squares_backward] x must be the shape of dx = [2, 3], got []");
  const std::vector<Tensor> bad = {x, ids};
  EXPECT_EQ(error_of([&] { squared_norms(bad, x); }),
            "[squared_norms] x must be f32 or bf16, got i64");
  const std::vector<Tensor> one = {x};
  EXPECT_EQ(error_of([&] { squared_norms(one, x); }),
            "[squared_norms] out must be [tensors] = [1], got [2, 3]");
  EXPECT_EQ(error_of([&] { scale_all(bad, 1); }), "[scale_all] x must be f32 or bf16, got i64");
}

}  // namespace
}  // namespace reprise::kernels

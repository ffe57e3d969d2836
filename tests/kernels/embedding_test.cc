#include "kernels/embedding.h"

#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"

namespace reprise::kernels {
namespace {

double element(const Tensor& x, std::int64_t i) {
  return x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<bfloat16>()[i]);
}

// Small whole numbers: every sum is exact in both dtypes.
Tensor counted(const Shape& shape, DType dtype) {
  const Tensor x = Tensor::empty(shape, dtype);
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const auto value = static_cast<float>(i % 7 - 3);
    if (dtype == DType::f32) {
      x.data<float>()[i] = value;
    } else {
      x.data<bfloat16>()[i] = to_bfloat16(value);
    }
  }
  return x;
}

TEST(EmbeddingGradient, PaddingRowGetsNothingAndTheRestAccumulates) {
  const std::vector<std::int64_t> ids = {3, 1, 3, 0, 2, 3, 1};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const DType gradient_dtype : {DType::f32, DType::bf16}) {
      for (const bool accumulate : {false, true}) {
        const Tensor dy = counted({7, 5}, dtype);
        const Tensor dtable = Tensor::full({6, 5}, gradient_dtype, 10.0);
        embedding_gradient(Tensor::from(ids, {7}), dy, 1, dtable, accumulate);
        for (std::int64_t row = 0; row < 6; ++row) {
          for (std::int64_t c = 0; c < 5; ++c) {
            double expected = accumulate ? 10 : 0;
            for (std::int64_t i = 0; row != 1 && i < 7; ++i) {
              expected += ids[static_cast<std::size_t>(i)] == row ? element(dy, i * 5 + c) : 0;
            }
            ASSERT_EQ(element(dtable, row * 5 + c), expected) << row << ", " << c;
          }
        }
      }
    }
  }
}

TEST(EmbeddingGradient, DoesNotDependOnThreads) {
  std::vector<std::int64_t> ids;
  std::vector<float> values;
  for (std::int64_t i = 0; i < 3000; ++i) {
    ids.push_back(i * i % 41);
    for (int c = 0; c < 9; ++c) {
      values.push_back(1.0f / static_cast<float>(i + c + 1));
    }
  }
  const Tensor at = Tensor::from(ids, {3000}), dy = Tensor::from(values, {3000, 9});
  const int before = threads();
  std::vector<std::vector<float>> results;
  for (const int count : {1, 2, 3}) {
    set_threads(count);
    const Tensor dtable = Tensor::empty({41, 9}, DType::f32);
    embedding_gradient(at, dy, -1, dtable, false);
    results.push_back(dtable.to_vector<float>());
  }
  set_threads(before);
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

}  // namespace
}  // namespace reprise::kernels

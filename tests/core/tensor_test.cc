#include "core/tensor.h"

#include <limits>
#include <numeric>

#include <gtest/gtest.h>

#include "tests/error_of.h"

namespace reprise {
namespace {

using testing::error_of;

Tensor counting(const Shape& shape, Device device = cpu) {
  std::vector<std::int64_t> values(static_cast<std::size_t>(shape.numel()));
  std::iota(values.begin(), values.end(), 0);
  return Tensor::from(values, shape, device);
}

TEST(Shape, RefusesBadSizes) {
  EXPECT_EQ(error_of([] {
              Shape({1, 2, 3, 4, 5, 6, 7});
            }),
            "[shape] rank must be at most 6, got 7");
  EXPECT_EQ(error_of([] { Shape({2, -1}); }), "[shape] sizes must not be negative, got [2, -1]");
  EXPECT_EQ(error_of([] {
              Shape({std::int64_t{1} << 40, std::int64_t{1} << 40});
            }),
            "[shape] must have at most 2^60 elements, got [1099511627776, 1099511627776]");
  EXPECT_EQ(error_of([] {
              Shape({0, std::int64_t{1} << 61});
            }),
            "[shape] must have at most 2^60 elements, got [0, 2305843009213693952]");
  EXPECT_EQ(error_of([] {
              (void)Shape({4, 8}).with(1, std::int64_t{1} << 60);
            }),
            "[shape] must have at most 2^60 elements, got [4, 1152921504606846976]");
}

TEST(Shape, ScalarAndEmpty) {
  EXPECT_EQ(Shape().numel(), 1);
  EXPECT_EQ(Shape({3, 0, 2}).numel(), 0);
  EXPECT_EQ(to_string(Shape({3, 0, 2})), "[3, 0, 2]");
}

TEST(Tensor, ViewsShareStorage) {
  const Tensor x = counting({2, 3, 4});
  const Tensor part = x.slice(1, 1, 3);
  EXPECT_EQ(part.to_vector<std::int64_t>(),
            (std::vector<std::int64_t>{4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23}));
  EXPECT_TRUE(part.shares_storage(x));
  EXPECT_FALSE(part.is_contiguous());
  EXPECT_FALSE(part.row_stride().has_value());
  EXPECT_EQ(x.transpose(0, 2).to_vector<std::int64_t>()[1], 12);
  EXPECT_EQ(x.slice(1, 1, 2).row_stride(), 12);
}

TEST(Tensor, RowsOfAWiderMatrix) {
  const Tensor fused = counting({2, 5, 12});
  const Tensor q = fused.slice(2, 4, 8);
  ASSERT_EQ(q.row_stride(), 12);
  const Tensor heads = q.reshape({2, 5, 2, 2});
  EXPECT_EQ(heads.to_vector<std::int64_t>(), q.contiguous().to_vector<std::int64_t>());
  EXPECT_EQ(q.reshape({10, 4}).row_stride(), 12);
  EXPECT_EQ(error_of([&] {
              (void)q.reshape({5, 8});
            }),
            "[reshape] strides of [2, 5, 4] do not allow [5, 8]: call contiguous() first");
  EXPECT_EQ(error_of([&] { (void)q.reshape({3}); }),
            "[reshape] shape must have 40 elements as [2, 5, 4], got [3]");
}

TEST(Tensor, EmptyTensors) {
  const Tensor x = Tensor::empty({4, 0, 3}, DType::f32);
  EXPECT_EQ(x.numel(), 0);
  EXPECT_TRUE(x.is_contiguous());
  EXPECT_EQ(x.reshape({0, 7}).shape(), Shape({0, 7}));
  EXPECT_TRUE(x.to_vector<float>().empty());
  EXPECT_EQ(x.clone().shape(), x.shape());
}

TEST(Tensor, NamedErrors) {
  const Tensor x = counting({2, 3});
  EXPECT_EQ(error_of([&] { (void)x.data<float>(); }), "[data] dtype must be f32, got i64");
  EXPECT_EQ(error_of([&] { (void)x.item<std::int64_t>(); }),
            "[item] tensor must have one element, got shape [2, 3]");
  EXPECT_EQ(error_of([&] { (void)x.slice(2, 0, 1); }),
            "[slice] dimension must be in [0, 2), got 2");
  EXPECT_EQ(error_of([&] { (void)x.slice(1, 2, 4); }),
            "[slice] range must lie in [0, 3), got [2, 4)");
  EXPECT_EQ(error_of([&] { (void)x.transpose(0, 5); }),
            "[transpose] dimensions must be in [0, 2), got 0 and 5");
  EXPECT_EQ(error_of([&] {
              x.copy_from(counting({3, 2}));
            }),
            "[copy] source must be i64 [2, 3], got i64 [3, 2]");
  EXPECT_EQ(error_of([&] {
              (void)Tensor::from(std::vector<float>{1, 2}, {3});
            }),
            "[tensor] 2 values do not fill shape [3]");
  Tensor dropped = x;
  dropped.drop_storage();
  EXPECT_EQ(error_of([&] { (void)dropped.raw(); }),
            "[data] the tensor has no storage (shape [2, 3])");
}

TEST(Tensor, MetaHasShapesButNoFloats) {
  const Tensor x = Tensor::empty({2, 3}, DType::f32, meta);
  EXPECT_EQ(
      error_of([&] { (void)x.data<float>(); }),
      "[data] a floating tensor on meta has no elements (shape [2, 3]): a data-dependent branch "
      "in a dry run?");
  EXPECT_EQ(error_of([&] { (void)x.to(cpu); }),
            "[to] a floating tensor on meta has no elements to copy to cpu");
  const Tensor ids = counting({4}, meta);
  EXPECT_EQ(ids.to_vector<std::int64_t>(), (std::vector<std::int64_t>{0, 1, 2, 3}));
}

TEST(Tensor, FullInEveryDtype) {
  EXPECT_EQ(Tensor::full({2}, DType::f32, 1.5).to_vector<float>()[1], 1.5f);
  EXPECT_EQ(to_float(Tensor::full({2}, DType::bf16, 1.5).to_vector<bfloat16>()[1]), 1.5f);
  EXPECT_EQ(Tensor::full({2}, DType::f64, 0.1).to_vector<double>()[1], 0.1);
  EXPECT_EQ(Tensor::full({2}, DType::i32, 7).to_vector<std::int32_t>()[1], 7);
  EXPECT_EQ(Tensor::full({2}, DType::i64, 7).to_vector<std::int64_t>()[1], 7);
}

TEST(Tensor, WrappedMemoryIsNotCounted) {
  std::vector<float> memory(8, 2.0f);
  const auto before = allocator(cpu).report().live_bytes;
  const Tensor x = Tensor::wrap(memory.data(), {2, 4}, DType::f32);
  EXPECT_EQ(allocator(cpu).report().live_bytes, before);
  x.zero();
  EXPECT_EQ(memory[3], 0.0f);
}

TEST(Bfloat16, RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(1.00390625f).bits, 0x3f80);  // half way, to even
  EXPECT_EQ(to_bfloat16(1.01171875f).bits, 0x3f82);  // half way, to even
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::quiet_NaN()).bits & 0x7fc0, 0x7fc0);
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bfloat16 x{static_cast<std::uint16_t>(bits)};
    const float value = to_float(x);
    if (value == value) {
      EXPECT_EQ(to_bfloat16(value).bits, x.bits);
    }
  }
}

TEST(Cuda, AbsentDeviceIsANamedError) {
  const Device beyond{DeviceKind::cuda, 100};
  EXPECT_NE(error_of([&] { (void)Tensor::empty({1}, DType::f32, beyond); }), "no error");
}

}  // namespace
}  // namespace reprise

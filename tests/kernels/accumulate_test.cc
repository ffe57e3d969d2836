#include "kernels/accumulate.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace reprise::kernels {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f64};

double at(const Tensor& x, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * x.strides()[0] + column;
  switch (x.dtype()) {
    case DType::f32:
      return x.data<float>()[i];
    case DType::bf16:
      return to_float(x.data<bfloat16>()[i]);
    default:
      return x.data<double>()[i];
  }
}

void set(const Tensor& x, std::int64_t row, std::int64_t column, double value) {
  const std::int64_t i = row * x.strides()[0] + column;
  switch (x.dtype()) {
    case DType::f32:
      x.data<float>()[i] = static_cast<float>(value);
      break;
    case DType::bf16:
      x.data<bfloat16>()[i] = to_bfloat16(static_cast<float>(value));
      break;
    default:
      x.data<double>()[i] = value;
  }
}

// A normal matrix; `strided`: columns [3, 3 + columns) of a wider one.
Tensor normal(std::int64_t rows, std::int64_t columns, DType dtype, bool strided, unsigned seed) {
  Tensor x = strided ? Tensor::zeros({rows, columns + 8}, dtype).slice(1, 3, 3 + columns)
                     : Tensor::zeros({rows, columns}, dtype);
  std::mt19937 engine(seed);
  std::normal_distribution<double> draw;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      set(x, i, j, draw(engine));
    }
  }
  return x;
}

// What a dtype holds of a value; from f64 to bf16 in one rounding.
double rounded(double x, DType dtype) {
  if (dtype == DType::f64) {
    return x;
  }
  if (dtype == DType::f32 || x == 0) {
    return static_cast<float>(x);
  }
  const double unit = std::ldexp(1.0, std::ilogb(x) - 7);
  return std::nearbyint(x / unit) * unit;
}

TEST(Accumulate, EveryPairOfDTypesAndStrides) {
  for (const DType into_dtype : kDTypes) {
    for (const DType x_dtype : kDTypes) {
      for (int strides = 0; strides < 4; ++strides) {
        for (const std::int64_t columns : {1, 7, 33, 20000}) {
          const Tensor into = normal(3, columns, into_dtype, (strides & 1) != 0, 1);
          const Tensor x = normal(3, columns, x_dtype, (strides & 2) != 0, 2);
          const Tensor before = into.clone();
          accumulate(into, x);
          const bool doubles = into_dtype == DType::f64 || x_dtype == DType::f64;
          for (std::int64_t i = 0; i < 3; ++i) {
            for (std::int64_t j = 0; j < columns; ++j) {
              const double sum = at(before, i, j) + at(x, i, j);
              const double expected =
                  doubles ? rounded(sum, into_dtype) : rounded(static_cast<float>(sum), into_dtype);
              ASSERT_EQ(at(into, i, j), expected) << name(into_dtype) << " += " << name(x_dtype)
                                                  << " at " << i << ", " << j << " of " << columns;
            }
          }
        }
      }
    }
  }
}

TEST(Accumulate, LeavesTheRestOfAWiderMatrix) {
  const Tensor wide = Tensor::full({4, 40}, DType::bf16, 2.0);
  accumulate(wide.slice(1, 5, 22), Tensor::full({4, 17}, DType::f32, 1.0));
  for (std::int64_t i = 0; i < 4; ++i) {
    for (std::int64_t j = 0; j < 40; ++j) {
      ASSERT_EQ(at(wide, i, j), j >= 5 && j < 22 ? 3.0 : 2.0);
    }
  }
}

TEST(Cast, EveryPairOfDTypesAndStrides) {
  for (const DType x_dtype : kDTypes) {
    for (const DType y_dtype : kDTypes) {
      for (int strides = 0; strides < 4; ++strides) {
        const Tensor x = normal(5, 37, x_dtype, (strides & 1) != 0, 3);
        const Tensor y = normal(5, 37, y_dtype, (strides & 2) != 0, 4);
        cast(x, y);
        for (std::int64_t i = 0; i < 5; ++i) {
          for (std::int64_t j = 0; j < 37; ++j) {
            ASSERT_EQ(at(y, i, j), rounded(at(x, i, j), y_dtype))
                << name(x_dtype) << " to " << name(y_dtype);
          }
        }
      }
    }
  }
}

// Every upper half with lower halves around the ties, at every place of a vector.
TEST(Cast, FloatToBfloat16IsTheScalarRoundingOfEveryClass) {
  std::vector<float> values;
  for (std::uint32_t upper = 0; upper < 65536; ++upper) {
    for (const std::uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      values.push_back(std::bit_cast<float>(upper << 16 | lower));
    }
  }
  const auto count = static_cast<std::int64_t>(values.size());
  const Tensor y = Tensor::empty({count}, DType::bf16);
  cast(Tensor::from(values, {count}), y);
  for (std::int64_t i = 0; i < count; ++i) {
    ASSERT_EQ(y.data<bfloat16>()[i].bits, to_bfloat16(values[static_cast<std::size_t>(i)]).bits)
        << std::hex << std::bit_cast<std::uint32_t>(values[static_cast<std::size_t>(i)]);
  }
  const Tensor back = Tensor::empty({count}, DType::f32);
  cast(y, back);
  for (std::int64_t i = 0; i < count; ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(back.data<float>()[i]),
              static_cast<std::uint32_t>(y.data<bfloat16>()[i].bits) << 16);
  }
}

TEST(Cast, DoubleToBfloat16RoundsOnce) {
  // 1 + 2^-8 is a tie; a little more must round up although it is a tie again as a float.
  const std::vector<double> values{1.0 + 0x1p-8 + 0x1p-40, 1.0 + 0x1p-8, 1.0 + 3 * 0x1p-8 - 0x1p-40,
                                   -0.0};
  const Tensor y = Tensor::empty({4}, DType::bf16);
  cast(Tensor::from(values, {4}), y);
  EXPECT_EQ(to_float(y.data<bfloat16>()[0]), 1.0f + 0x1p-7f);
  EXPECT_EQ(to_float(y.data<bfloat16>()[1]), 1.0f);
  EXPECT_EQ(to_float(y.data<bfloat16>()[2]), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::signbit(to_float(y.data<bfloat16>()[3])));
}

TEST(Add, MayWorkInPlaceBitwise) {
  for (const DType dtype : kDTypes) {
    const Tensor x = normal(7, 1001, dtype, false, 5);
    const Tensor r = normal(7, 1001, dtype, true, 6);
    const Tensor y = Tensor::empty({7, 1001}, dtype);
    add(x, r, y);
    const Tensor in_x = x.clone();
    add(in_x, r, in_x);
    const Tensor in_r = r.clone();
    add(x, in_r, in_r);
    EXPECT_EQ(std::memcmp(in_x.raw(), y.raw(), static_cast<std::size_t>(y.bytes())), 0);
    EXPECT_EQ(std::memcmp(in_r.raw(), y.raw(), static_cast<std::size_t>(y.bytes())), 0);
    EXPECT_EQ(at(y, 3, 500), rounded(at(x, 3, 500) + at(r, 3, 500), dtype));
  }
}

TEST(Accumulate, EmptyAndMeta) {
  accumulate(Tensor::empty({0, 5}, DType::f32), Tensor::empty({0, 5}, DType::bf16));
  cast(Tensor::empty({5, 0}, DType::f32), Tensor::empty({5, 0}, DType::bf16));
  accumulate(Tensor::empty({2, 5}, DType::f32, meta), Tensor::empty({2, 5}, DType::bf16, meta));
  accumulate(Tensor::full({}, DType::f32, 1.0), Tensor::full({}, DType::f32, 1.0));
}

std::string message(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Accumulate, Mistakes) {
  const Tensor x = Tensor::zeros({2, 3}, DType::f32), ids = Tensor::zeros({2, 3}, DType::i64),
               other = Tensor::zeros({3, 2}, DType::f32), half = Tensor::zeros({2, 3}, DType::bf16);
  EXPECT_EQ(message([&] { accumulate(ids, x); }),
            "[accumulate] into must be f32, bf16 or f64, got i64");
  EXPECT_EQ(message([&] { cast(x, ids); }), "[cast] y must be f32, bf16 or f64, got i64");
  EXPECT_EQ(message([&] { accumulate(x, other); }),
            "[accumulate] x must have the shape [2, 3] of into, got [3, 2]");
  EXPECT_EQ(message([&] { add(x, half, x); }), "[add] r must be f32, got bf16");
  EXPECT_EQ(message([&] { cast(x, other.transpose(0, 1)); }),
            "[cast] y must be rows of unit stride, got shape [2, 3] with other strides: call "
            "contiguous()");
  EXPECT_EQ(message([&] {
              accumulate(x, Tensor::zeros({2, 3}, DType::f32, meta));
            }),
            "[accumulate] x must be on cpu, got meta");
}

}  // namespace
}  // namespace reprise::kernels

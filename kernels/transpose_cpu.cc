#include <algorithm>

#include "kernels/matmul_sides.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/transpose_cpu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Squares of rows that fit one page and one line at a time.
constexpr std::int64_t kBlock = 64;

template <class T>
void plain(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
           std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      to[i * to_stride + j] = from[j * from_stride + i];
    }
  }
}

#if HWY_TARGET != HWY_SCALAR
HWY_ATTR void square(const std::uint32_t* from, std::int64_t from_stride, std::uint32_t* to,
                     std::int64_t to_stride) {
  const hn::Full128<std::uint32_t> tag;
  const hn::Full128<std::uint64_t> wide;
  const auto a = hn::LoadU(tag, from), b = hn::LoadU(tag, from + from_stride);
  const auto c = hn::LoadU(tag, from + 2 * from_stride), d = hn::LoadU(tag, from + 3 * from_stride);
  const auto ab0 = hn::BitCast(wide, hn::InterleaveLower(tag, a, b));
  const auto ab1 = hn::BitCast(wide, hn::InterleaveUpper(tag, a, b));
  const auto cd0 = hn::BitCast(wide, hn::InterleaveLower(tag, c, d));
  const auto cd1 = hn::BitCast(wide, hn::InterleaveUpper(tag, c, d));
  hn::StoreU(hn::BitCast(tag, hn::InterleaveLower(wide, ab0, cd0)), tag, to);
  hn::StoreU(hn::BitCast(tag, hn::InterleaveUpper(wide, ab0, cd0)), tag, to + to_stride);
  hn::StoreU(hn::BitCast(tag, hn::InterleaveLower(wide, ab1, cd1)), tag, to + 2 * to_stride);
  hn::StoreU(hn::BitCast(tag, hn::InterleaveUpper(wide, ab1, cd1)), tag, to + 3 * to_stride);
}

HWY_ATTR void square(const std::uint16_t* from, std::int64_t from_stride, std::uint16_t* to,
                     std::int64_t to_stride) {
  const hn::Full128<std::uint16_t> tag;
  const hn::Full128<std::uint32_t> pair;
  const hn::Full128<std::uint64_t> quad;
  hn::Vec<decltype(pair)> pairs[8];  // [4 of columns][row pairs]
  for (int r = 0; r < 8; r += 2) {
    const auto a = hn::LoadU(tag, from + r * from_stride);
    const auto b = hn::LoadU(tag, from + (r + 1) * from_stride);
    pairs[r] = hn::BitCast(pair, hn::InterleaveLower(tag, a, b));
    pairs[r + 1] = hn::BitCast(pair, hn::InterleaveUpper(tag, a, b));
  }
  for (int half = 0; half < 2; ++half) {  // columns 4 half .. 4 half + 3
    const auto lower0 = hn::InterleaveLower(pair, pairs[half], pairs[2 + half]);
    const auto upper0 = hn::InterleaveUpper(pair, pairs[half], pairs[2 + half]);
    const auto lower1 = hn::InterleaveLower(pair, pairs[4 + half], pairs[6 + half]);
    const auto upper1 = hn::InterleaveUpper(pair, pairs[4 + half], pairs[6 + half]);
    const auto put = [&](int row, hn::Vec<decltype(quad)> value) HWY_ATTR {
      hn::StoreU(hn::BitCast(tag, value), tag, to + (4 * half + row) * to_stride);
    };
    const auto l0 = hn::BitCast(quad, lower0), l1 = hn::BitCast(quad, lower1);
    const auto u0 = hn::BitCast(quad, upper0), u1 = hn::BitCast(quad, upper1);
    put(0, hn::InterleaveLower(quad, l0, l1));
    put(1, hn::InterleaveUpper(quad, l0, l1));
    put(2, hn::InterleaveLower(quad, u0, u1));
    put(3, hn::InterleaveUpper(quad, u0, u1));
  }
}
#endif

template <class T>
HWY_ATTR void block(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
                    std::int64_t rows, std::int64_t columns) {
#if HWY_TARGET == HWY_SCALAR
  plain(from, from_stride, to, to_stride, rows, columns);
#else
  constexpr std::int64_t side = 16 / sizeof(T);
  const std::int64_t whole_rows = rows / side * side, whole_columns = columns / side * side;
  for (std::int64_t i = 0; i < whole_rows; i += side) {
    for (std::int64_t j = 0; j < whole_columns; j += side) {
      square(from + j * from_stride + i, from_stride, to + i * to_stride + j, to_stride);
    }
  }
  plain(from + whole_columns * from_stride, from_stride, to + whole_columns, to_stride, whole_rows,
        columns - whole_columns);
  plain(from + whole_rows, from_stride, to + whole_rows * to_stride, to_stride, rows - whole_rows,
        columns);
#endif
}

template <class T>
void blocks(const T* from, std::int64_t from_stride, T* to, std::int64_t rows,
            std::int64_t columns) {
  for (std::int64_t j = 0; j < columns; j += kBlock) {
    for (std::int64_t i = 0; i < rows; i += kBlock) {
      block(from + j * from_stride + i, from_stride, to + i * columns + j, columns,
            std::min(kBlock, rows - i), std::min(kBlock, columns - j));
    }
  }
}

void transpose_run(const void* from, std::int64_t from_stride, void* to, std::int64_t rows,
                   std::int64_t columns, std::int64_t element_bytes) {
  if (element_bytes == 2) {
    blocks(static_cast<const std::uint16_t*>(from), from_stride, static_cast<std::uint16_t*>(to),
           rows, columns);
  } else {
    blocks(static_cast<const std::uint32_t*>(from), from_stride, static_cast<std::uint32_t*>(to),
           rows, columns);
  }
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {
HWY_EXPORT(transpose_run);
}

void transpose(const void* from, std::int64_t from_stride, void* to, std::int64_t rows,
               std::int64_t columns, std::int64_t element_bytes) {
  HWY_DYNAMIC_DISPATCH(transpose_run)(from, from_stride, to, rows, columns, element_bytes);
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/l2_normalize_cpu.cc"
#include <cmath>

#include "hwy/foreach_target.h"
#include "kernels/l2_normalize_sides.h"
#include "kernels/pieces.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

struct Times {
  float factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const {
    return hn::Mul(x, hn::Set(FloatTag(), factor));
  }
};

struct Across {
  float scale, dot;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector dy, FloatVector y) const {
    const FloatTag tag;
    return hn::Mul(hn::NegMulAdd(y, hn::Set(tag, dot), dy), hn::Set(tag, scale));
  }
};

// The sum of a[i] b[i] over a row.
float row_dot(const Matrix& a, const Matrix& b, std::int64_t width) {
  HWY_ALIGN float a_block[kBlock];
  HWY_ALIGN float b_block[kBlock];
  const std::int64_t step = lanes();
  FloatVector even = hn::Zero(FloatTag()), odd = hn::Zero(FloatTag());
  for (std::int64_t at = 0; at < width; at += kBlock) {
    const std::int64_t count = std::min(kBlock, width - at);
    const float* x = staged(a.element(0, at), a.dtype, count, a_block);
    const float* y = staged(b.element(0, at), b.dtype, count, b_block);
    std::int64_t i = 0;
    for (; i + 2 * step <= count; i += 2 * step) {
      even = hn::MulAdd(load(x + i), load(y + i), even);
      odd = hn::MulAdd(load(x + i + step), load(y + i + step), odd);
    }
    for (; i + step <= count; i += step) {
      even = hn::MulAdd(load(x + i), load(y + i), even);
    }
    if (i < count) {
      odd = hn::MulAdd(load_first(x + i, count - i), load_first(y + i, count - i), odd);
    }
  }
  return hn::GetLane(hn::SumOfLanes(FloatTag(), hn::Add(even, odd)));
}

void forward_row(const Matrix& x, const Matrix& y, float* scale, std::int64_t width) {
  *scale = 1.0f / std::sqrt(row_dot(x, x, width));
  run_staged(Times{*scale}, x, y, false, width);
}

void backward_row(const Matrix& dy, const Matrix& y, float scale, const Matrix& dx, bool accumulate,
                  std::int64_t width) {
  run_staged(Across{scale, row_dot(dy, y, width)}, dy, y, dx, accumulate, width);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(forward_row);
HWY_EXPORT(backward_row);

template <class F>
void for_rows(MatrixSize size, F f) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, kPieceElements / std::max<std::int64_t>(1, size.width));
  parallel_for(size.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      f(row);
    }
  });
}

}  // namespace

void l2_normalize(const Matrix& x, const Matrix& y, float* scale, MatrixSize size) {
  for_rows(size, [&](std::int64_t row) {
    HWY_DYNAMIC_DISPATCH(forward_row)(x.run(row, 0), y.run(row, 0), scale + row, size.width);
  });
}

void l2_normalize_backward(const Matrix& dy, const Matrix& y, const float* scale, const Matrix& dx,
                           bool accumulate, MatrixSize size) {
  for_rows(size, [&](std::int64_t row) {
    HWY_DYNAMIC_DISPATCH(backward_row)
    (dy.run(row, 0), y.run(row, 0), scale[row], dx.run(row, 0), accumulate, size.width);
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

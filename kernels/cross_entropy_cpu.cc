#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cross_entropy_cpu.cc"
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "kernels/cross_entropy_sides.h"
#include "kernels/pieces.h"

// What follows foreach_target.h is compiled once for each target: not to be sorted.
// clang-format off
#include "hwy/foreach_target.h"
#include "kernels/vector_math-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The last elements of a row; -inf beyond, which neither a maximum nor a sum of exponentials sees.
template <class T>
HWY_INLINE FloatVector load_last(const T* x, std::int64_t count) {
  const FloatTag tag;
  return hn::IfThenElse(hn::FirstN(tag, static_cast<std::size_t>(count)), load_first(x, count),
                        hn::Set(tag, -kInfinity));
}

HWY_INLINE double sum_of_lanes(FloatVector v) {
  HWY_ALIGN float buffer[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, FloatTag(), buffer);
  double total = 0;
  for (std::int64_t lane = 0; lane < lanes(); ++lane) {
    total += buffer[lane];
  }
  return total;
}

// NaN when one of the elements is.
template <class T>
HWY_INLINE float row_max(const T* x, std::int64_t count) {
  const FloatTag tag;
  const std::int64_t step = lanes();
  FloatVector m0 = hn::Set(tag, -kInfinity), m1 = m0;
  auto bad = hn::IsNaN(m0);
  std::int64_t i = 0;
  for (; i + 2 * step <= count; i += 2 * step) {
    const FloatVector a = load(x + i), b = load(x + i + step);
    bad = hn::Or(bad, hn::Or(hn::IsNaN(a), hn::IsNaN(b)));
    m0 = hn::Max(m0, a);
    m1 = hn::Max(m1, b);
  }
  for (; i < count; i += step) {
    const FloatVector a = i + step <= count ? load(x + i) : load_last(x + i, count - i);
    bad = hn::Or(bad, hn::IsNaN(a));
    m0 = hn::Max(m0, a);
  }
  return hn::AllFalse(tag, bad) ? hn::GetLane(hn::MaxOfLanes(tag, hn::Max(m0, m1))) : kNaN;
}

template <class T>
HWY_INLINE double exponentials(const T* x, std::int64_t count, float max) {
  const FloatTag tag;
  const std::int64_t step = lanes();
  const FloatVector shift = hn::Set(tag, max);
  FloatVector s0 = hn::Zero(tag), s1 = s0;
  std::int64_t i = 0;
  for (; i + 2 * step <= count; i += 2 * step) {
    s0 = hn::Add(s0, probability(hn::Sub(load(x + i), shift)));
    s1 = hn::Add(s1, probability(hn::Sub(load(x + i + step), shift)));
  }
  for (; i < count; i += step) {
    const FloatVector a = i + step <= count ? load(x + i) : load_last(x + i, count - i);
    s0 = hn::Add(s0, probability(hn::Sub(a, shift)));
  }
  return sum_of_lanes(hn::Add(s0, s1));
}

template <class T>
HWY_INLINE float log_sum_exp(const T* x, std::int64_t count) {
  const float max = row_max(x, count);
  if (std::isinf(max)) {
    return max < 0 ? max : kNaN;
  }
  if (std::isnan(max)) {
    return max;
  }
  return static_cast<float>(max + std::log(exponentials(x, count, max)));
}

struct Softmax {
  float lse, factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const {
    const FloatTag tag;
    return hn::Mul(probability(hn::Sub(x, hn::Set(tag, lse))), hn::Set(tag, factor));
  }
};
struct AddSoftmax {
  Softmax softmax;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector dx) const {
    return hn::Add(dx, softmax(x));
  }
};

inline float as_float(float x) {
  return x;
}
inline float as_float(bfloat16 x) {
  return to_float(x);
}
inline void assign(float& to, float x) {
  to = x;
}
inline void assign(bfloat16& to, float x) {
  to = to_bfloat16(x);
}

// dx may be x.
template <class T>
HWY_INLINE void row_gradient(const T* x, std::int64_t count, std::int64_t label, float lse,
                             float factor, T* dx, bool accumulate) {
  if (!std::isfinite(lse)) {
    T nan;
    assign(nan, kNaN);
    std::fill_n(dx, count, nan);
    return;
  }
  // Not the exponential less 1: that cancels where the label is nearly certain.
  const float at_label =
      factor * std::expm1(as_float(x[label]) - lse) + (accumulate ? as_float(dx[label]) : 0.0f);
  const Softmax softmax{lse, factor};
  if (accumulate) {
    map(AddSoftmax{softmax}, x, dx, dx, count);
  } else {
    map(softmax, x, dx, count);
  }
  assign(dx[label], at_label);
}

template <class T>
void forward_rows(const LogitRows& x, float* lse, float* losses, std::int64_t begin,
                  std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    const T* row = static_cast<const T*>(x.at) + n * x.row_stride;
    const std::int64_t label = x.labels[n];
    const bool ignored = label == x.ignore_index;
    const float log_sum = ignored ? 0.0f : log_sum_exp(row, x.vocabulary);
    losses[n] = ignored ? 0.0f : log_sum - as_float(row[label]);
    if (lse != nullptr) {
      lse[n] = log_sum;
    }
  }
}

template <class T>
void gradient_rows(const LogitRows& x, const float* lse, float factor, void* dx,
                   std::int64_t dx_stride, bool accumulate, std::int64_t begin, std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    const T* row = static_cast<const T*>(x.at) + n * x.row_stride;
    T* to = static_cast<T*>(dx) + n * dx_stride;
    if (x.labels[n] != x.ignore_index) {
      row_gradient(row, x.vocabulary, x.labels[n], lse[n], factor, to, accumulate);
    } else if (!accumulate) {
      std::fill_n(to, x.vocabulary, T{});
    }
  }
}

template <class T>
void in_place_rows(const LogitRows& x, float factor, float* losses, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    T* row = static_cast<T*>(x.at) + n * x.row_stride;
    const std::int64_t label = x.labels[n];
    if (label == x.ignore_index) {
      losses[n] = 0;
      std::fill_n(row, x.vocabulary, T{});
      continue;
    }
    const float lse = log_sum_exp(row, x.vocabulary);
    losses[n] = lse - as_float(row[label]);
    row_gradient(row, x.vocabulary, label, lse, factor, row, false);
  }
}

void forward_run(const LogitRows& x, float* lse, float* losses, std::int64_t begin,
                 std::int64_t end) {
  x.dtype == DType::bf16 ? forward_rows<bfloat16>(x, lse, losses, begin, end)
                         : forward_rows<float>(x, lse, losses, begin, end);
}

void gradient_run(const LogitRows& x, const float* lse, float factor, void* dx,
                  std::int64_t dx_stride, bool accumulate, std::int64_t begin, std::int64_t end) {
  x.dtype == DType::bf16
      ? gradient_rows<bfloat16>(x, lse, factor, dx, dx_stride, accumulate, begin, end)
      : gradient_rows<float>(x, lse, factor, dx, dx_stride, accumulate, begin, end);
}

void in_place_run(const LogitRows& x, float factor, float* losses, std::int64_t begin,
                  std::int64_t end) {
  x.dtype == DType::bf16 ? in_place_rows<bfloat16>(x, factor, losses, begin, end)
                         : in_place_rows<float>(x, factor, losses, begin, end);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(forward_run);
HWY_EXPORT(gradient_run);
HWY_EXPORT(in_place_run);

std::int64_t rows_a_piece(const LogitRows& x) {
  return std::max<std::int64_t>(1, kPieceElements / std::max<std::int64_t>(1, x.vocabulary));
}

}  // namespace

void cross_entropy_rows(const LogitRows& x, float* lse, float* losses) {
  parallel_for(x.rows, rows_a_piece(x), [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(forward_run)(x, lse, losses, begin, end);
  });
}

void cross_entropy_gradient(const LogitRows& x, const float* lse, float factor, void* dx,
                            std::int64_t dx_stride, bool accumulate) {
  parallel_for(x.rows, rows_a_piece(x), [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(gradient_run)
    (x, lse, factor, dx, dx_stride, accumulate, begin, end);
  });
}

void cross_entropy_in_place(const LogitRows& x, float factor, float* losses) {
  parallel_for(x.rows, rows_a_piece(x), [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(in_place_run)(x, factor, losses, begin, end);
  });
}

}  // namespace reprise::kernels::cpu
#endif

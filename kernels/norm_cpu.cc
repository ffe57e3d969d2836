#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/parallel.h"
#include "kernels/norm_sides.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_cpu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {

// How many of a vector's lanes hold elements of the row: all, or the first few.
struct Whole {};
struct First {
  std::int64_t count;
};

template <class T>
HWY_INLINE FloatVector get(const T* from, Whole) {
  return load(from);
}
template <class T>
HWY_INLINE FloatVector get(const T* from, First lanes) {
  return load_first(from, lanes.count);
}
template <class T>
HWY_INLINE void put(FloatVector value, T* to, Whole) {
  store(value, to);
}
template <class T>
HWY_INLINE void put(FloatVector value, T* to, First lanes) {
  store_first(value, to, lanes.count);
}

// Lanes beyond the row are zero when they are loaded; after the mean was taken from them they are
// not.
HWY_INLINE FloatVector only(FloatVector value, Whole) {
  return value;
}
HWY_INLINE FloatVector only(FloatVector value, First lanes) {
  const FloatTag tag;
  return hn::IfThenElseZero(hn::FirstN(tag, static_cast<std::size_t>(lanes.count)), value);
}

// Calls f(i, accumulator number, lanes) over [0, width); four accumulators hide the latency of an
// addition.
template <class F>
HWY_INLINE void for_vectors(std::int64_t width, F f) {
  const std::int64_t step = lanes();
  std::int64_t i = 0;
  for (; i + 4 * step <= width; i += 4 * step) {
    f(i, std::integral_constant<int, 0>(), Whole());
    f(i + step, std::integral_constant<int, 1>(), Whole());
    f(i + 2 * step, std::integral_constant<int, 2>(), Whole());
    f(i + 3 * step, std::integral_constant<int, 3>(), Whole());
  }
  for (; i + step <= width; i += step) {
    f(i, std::integral_constant<int, 0>(), Whole());
  }
  if (step > 1 && i < width) {
    f(i, std::integral_constant<int, 1>(), First{width - i});
  }
}

// A sum over a row.
class RowSum {
 public:
  HWY_INLINE RowSum()
      : a_(hn::Zero(FloatTag())),
        b_(hn::Zero(FloatTag())),
        c_(hn::Zero(FloatTag())),
        d_(hn::Zero(FloatTag())) {}
  template <int k>
  HWY_INLINE void add_product(std::integral_constant<int, k>, FloatVector a, FloatVector b) {
    part<k>() = hn::MulAdd(a, b, part<k>());
  }
  template <int k>
  HWY_INLINE void add(std::integral_constant<int, k>, FloatVector a) {
    part<k>() = hn::Add(part<k>(), a);
  }
  HWY_INLINE float total() const {
    return hn::GetLane(hn::SumOfLanes(FloatTag(), hn::Add(hn::Add(a_, b_), hn::Add(c_, d_))));
  }

 private:
  template <int k>
  HWY_INLINE FloatVector& part() {
    if constexpr (k == 0) {
      return a_;
    } else if constexpr (k == 1) {
      return b_;
    } else if constexpr (k == 2) {
      return c_;
    } else {
      return d_;
    }
  }
  FloatVector a_, b_, c_, d_;
};

template <class T>
HWY_INLINE T* row_of(const NormRows& rows, std::int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + row * rows.stride;
}

// n of the contract, before any rounding. `centre` is zero for rms_norm, whose rows keep their
// mean.
template <Norm norm, class L>
HWY_INLINE FloatVector normalised(FloatVector x, FloatVector centre, FloatVector scale, L lanes) {
  if constexpr (norm == Norm::rms) {
    return hn::Mul(x, scale);
  } else {
    return only(hn::Mul(hn::Sub(x, centre), scale), lanes);
  }
}

struct Statistics {
  float mean, scale;
};

// Writes x + residual to sum when there is a residual; the row that is normalised is in L1 after.
template <Norm norm, class T>
HWY_INLINE Statistics row_statistics(const T* x, const T* residual, T* sum, std::int64_t width,
                                     float epsilon) {
  const FloatTag tag;
  const float width_inverse = width == 0 ? 0.0f : 1.0f / static_cast<float>(width);
  RowSum first;
  for_vectors(width, [&](std::int64_t i, auto k, auto lanes) HWY_ATTR {
    FloatVector value = get(x + i, lanes);
    if (residual != nullptr) {
      value = rounded_to<T>(hn::Add(value, get(residual + i, lanes)));
      put(value, sum + i, lanes);
    }
    if constexpr (norm == Norm::rms) {
      first.add_product(k, value, value);
    } else {
      first.add(k, value);
    }
  });
  if constexpr (norm == Norm::rms) {
    return {0.0f, 1.0f / std::sqrt(first.total() * width_inverse + epsilon)};
  }
  const float mean = first.total() * width_inverse;
  const FloatVector centre = hn::Set(tag, mean);
  const T* row = residual == nullptr ? x : sum;
  RowSum squares;
  for_vectors(width, [&](std::int64_t i, auto k, auto lanes) HWY_ATTR {
    const FloatVector value = only(hn::Sub(get(row + i, lanes), centre), lanes);
    squares.add_product(k, value, value);
  });
  return {mean, 1.0f / std::sqrt(squares.total() * width_inverse + epsilon)};
}

template <Norm norm, class T>
void forward_rows(const NormForward& call, std::int64_t begin, std::int64_t end) {
  const FloatTag tag;
  const auto* weight = static_cast<const T*>(call.weight);
  const auto* bias = static_cast<const T*>(call.bias);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(call.x, row);
    const T* residual = row_of<T>(call.residual, row);
    T* sum = row_of<T>(call.sum, row);
    T* y = row_of<T>(call.y, row);
    const Statistics of_row = row_statistics<norm>(x, residual, sum, call.width, call.epsilon);
    call.scale[row] = of_row.scale;
    if (norm == Norm::layer) {
      call.mean[row] = of_row.mean;
    }
    const T* normed = residual == nullptr ? x : sum;
    const FloatVector centre = hn::Set(tag, of_row.mean);
    const FloatVector scale = hn::Set(tag, of_row.scale);
    for_vectors(call.width, [&](std::int64_t i, auto, auto lanes) HWY_ATTR {
      const FloatVector n = normalised<norm>(get(normed + i, lanes), centre, scale, lanes);
      const FloatVector w = get(weight + i, lanes);
      if constexpr (norm == Norm::rms) {
        put(hn::Mul(rounded_to<T>(n), w), y + i, lanes);
      } else {
        const FloatVector b = bias == nullptr ? hn::Zero(tag) : get(bias + i, lanes);
        put(hn::MulAdd(n, w, b), y + i, lanes);
      }
    });
  }
}

void forward_side(const NormForward& call, std::int64_t begin, std::int64_t end) {
  if (call.norm == Norm::rms) {
    call.dtype == DType::f32 ? forward_rows<Norm::rms, float>(call, begin, end)
                             : forward_rows<Norm::rms, bfloat16>(call, begin, end);
  } else {
    call.dtype == DType::f32 ? forward_rows<Norm::layer, float>(call, begin, end)
                             : forward_rows<Norm::layer, bfloat16>(call, begin, end);
  }
}

// dx of one row.
template <Norm norm, class T>
HWY_INLINE void row_gradient(const NormBackward& call, std::int64_t row) {
  const FloatTag tag;
  const T* dy = row_of<T>(call.dy, row);
  const T* dsum = row_of<T>(call.dsum, row);
  const T* x = row_of<T>(call.x, row);
  T* dx = row_of<T>(call.dx, row);
  const auto* weight = static_cast<const T*>(call.weight);
  const FloatVector scale = hn::Set(tag, call.scale[row]);
  const FloatVector centre = hn::Set(tag, norm == Norm::layer ? call.mean[row] : 0.0f);
  RowSum g_total, gn_total;
  for_vectors(call.width, [&](std::int64_t i, auto k, auto lanes) HWY_ATTR {
    const FloatVector g = hn::Mul(get(dy + i, lanes), get(weight + i, lanes));
    gn_total.add_product(k, g, normalised<norm>(get(x + i, lanes), centre, scale, lanes));
    if constexpr (norm == Norm::layer) {
      g_total.add(k, g);
    }
  });
  const float width_inverse = 1.0f / static_cast<float>(call.width);
  const FloatVector gn_mean = hn::Set(tag, gn_total.total() * width_inverse);
  const FloatVector g_mean = hn::Set(tag, g_total.total() * width_inverse);
  for_vectors(call.width, [&](std::int64_t i, auto, auto lanes) HWY_ATTR {
    const FloatVector g = hn::Mul(get(dy + i, lanes), get(weight + i, lanes));
    const FloatVector n = normalised<norm>(get(x + i, lanes), centre, scale, lanes);
    FloatVector value = hn::NegMulAdd(n, gn_mean, g);
    if constexpr (norm == Norm::layer) {
      value = hn::Sub(value, g_mean);
    }
    value = hn::Mul(value, scale);
    if (dsum != nullptr) {
      value = hn::Add(value, get(dsum + i, lanes));
    }
    if (call.accumulate_x) {
      value = hn::Add(value, get(dx + i, lanes));
    }
    put(value, dx + i, lanes);
  });
}

// Adds one row to its chunk's sums for the weight and the bias.
template <Norm norm, class T>
HWY_INLINE void add_row_to_sums(const NormBackward& call, std::int64_t row, float* dweight,
                                float* dbias) {
  const FloatTag tag;
  const T* dy = row_of<T>(call.dy, row);
  if (dweight != nullptr) {
    const T* x = row_of<T>(call.x, row);
    const FloatVector scale = hn::Set(tag, call.scale[row]);
    const FloatVector centre = hn::Set(tag, norm == Norm::layer ? call.mean[row] : 0.0f);
    for_vectors(call.width, [&](std::int64_t i, auto, auto lanes) HWY_ATTR {
      FloatVector n = normalised<norm>(get(x + i, lanes), centre, scale, lanes);
      if constexpr (norm == Norm::rms) {
        n = rounded_to<T>(n);
      }
      put(hn::MulAdd(get(dy + i, lanes), n, get(dweight + i, lanes)), dweight + i, lanes);
    });
  }
  if (dbias != nullptr) {
    for_vectors(call.width, [&](std::int64_t i, auto, auto lanes) HWY_ATTR {
      put(hn::Add(get(dbias + i, lanes), get(dy + i, lanes)), dbias + i, lanes);
    });
  }
}

HWY_INLINE float* chunk_sums(const NormSum& sum, std::int64_t chunk, std::int64_t width) {
  if (sum.data == nullptr) {
    return nullptr;
  }
  float* at = sum.partial + chunk * width;
  std::fill_n(at, width, 0.0f);
  return at;
}

template <Norm norm, class T>
void backward_chunk(const NormBackward& call, std::int64_t chunk) {
  float* dweight = chunk_sums(call.dweight, chunk, call.width);
  float* dbias = chunk_sums(call.dbias, chunk, call.width);
  const std::int64_t per_chunk = norm_rows_per_chunk(call.rows);
  const std::int64_t end = std::min(call.rows, (chunk + 1) * per_chunk);
  for (std::int64_t row = chunk * per_chunk; row < end; ++row) {
    // First the sums: dx may be written over dy.
    add_row_to_sums<norm, T>(call, row, dweight, dbias);
    if (call.dx.data != nullptr) {
      row_gradient<norm, T>(call, row);
    }
  }
}

void backward_side(const NormBackward& call, std::int64_t chunk) {
  if (call.norm == Norm::rms) {
    call.dtype == DType::f32 ? backward_chunk<Norm::rms, float>(call, chunk)
                             : backward_chunk<Norm::rms, bfloat16>(call, chunk);
  } else {
    call.dtype == DType::f32 ? backward_chunk<Norm::layer, float>(call, chunk)
                             : backward_chunk<Norm::layer, bfloat16>(call, chunk);
  }
}

// Columns [begin, end) of a gradient: the chunks' sums, first to last.
template <class T>
void add_chunks(const NormSum& sum, std::int64_t chunks, std::int64_t width, std::int64_t begin,
                std::int64_t end) {
  const FloatTag tag;
  const float* partial = sum.partial + begin;
  T* to = static_cast<T*>(sum.data) + begin;
  for_vectors(end - begin, [&](std::int64_t i, auto, auto lanes) HWY_ATTR {
    FloatVector total = hn::Zero(tag);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      total = hn::Add(total, get(partial + chunk * width + i, lanes));
    }
    if (sum.accumulate) {
      total = hn::Add(get(to + i, lanes), total);
    }
    put(total, to + i, lanes);
  });
}

void sums_side(const NormSum& sum, std::int64_t chunks, std::int64_t width, std::int64_t begin,
               std::int64_t end) {
  sum.dtype == DType::f32 ? add_chunks<float>(sum, chunks, width, begin, end)
                          : add_chunks<bfloat16>(sum, chunks, width, begin, end);
}

}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {

HWY_EXPORT(forward_side);
HWY_EXPORT(backward_side);
HWY_EXPORT(sums_side);

void norm_forward(const NormForward& call) {
  constexpr std::int64_t kElementsPerTask = 16384;
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, call.width));
  parallel_for(call.rows, rows_per_task, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(forward_side)(call, begin, end);
  });
}

void norm_backward(const NormBackward& call) {
  const std::int64_t chunks = norm_chunks(call.rows);
  parallel_for(chunks, 1, [&](std::int64_t chunk, std::int64_t) {
    HWY_DYNAMIC_DISPATCH(backward_side)(call, chunk);
  });
  constexpr std::int64_t kColumnsPerTask = 256;
  for (const NormSum* sum : {&call.dweight, &call.dbias}) {
    if (sum->data != nullptr) {
      parallel_for(call.width, kColumnsPerTask, [&](std::int64_t begin, std::int64_t end) {
        HWY_DYNAMIC_DISPATCH(sums_side)(*sum, chunks, call.width, begin, end);
      });
    }
  }
}

}  // namespace reprise::kernels::cpu
#endif

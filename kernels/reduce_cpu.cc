#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/reduce_cpu.cc"
#include <algorithm>

#include "hwy/foreach_target.h"
#include "kernels/pieces.h"
#include "kernels/reduce_sides.h"
#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

template <bool kSquares>
HWY_INLINE FloatVector added(FloatVector sum, FloatVector x) {
  if constexpr (kSquares) {
    return hn::MulAdd(x, x, sum);
  } else {
    return hn::Add(sum, x);
  }
}

template <bool kSquares, class T>
HWY_INLINE double block_sum(const T* x, std::int64_t count) {
  const FloatTag tag;
  const std::int64_t step = lanes();
  FloatVector s0 = hn::Zero(tag), s1 = s0, s2 = s0, s3 = s0;
  std::int64_t i = 0;
  for (; i + 4 * step <= count; i += 4 * step) {
    s0 = added<kSquares>(s0, load(x + i));
    s1 = added<kSquares>(s1, load(x + i + step));
    s2 = added<kSquares>(s2, load(x + i + 2 * step));
    s3 = added<kSquares>(s3, load(x + i + 3 * step));
  }
  for (; i + step <= count; i += step) {
    s0 = added<kSquares>(s0, load(x + i));
  }
  if (i < count) {
    s1 = added<kSquares>(s1, load_first(x + i, count - i));
  }
  HWY_ALIGN float buffer[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), tag, buffer);
  double total = 0;
  for (std::int64_t lane = 0; lane < step; ++lane) {
    total += buffer[lane];
  }
  return total;
}

template <bool kSquares, class T>
double sum_of(const Elements& x, std::int64_t begin, std::int64_t end) {
  const T* from = static_cast<const T*>(x.at);
  double total = 0;
  for (std::int64_t i = begin; i < end; i += kBlockElements) {
    const std::int64_t count = std::min(kBlockElements, end - i);
    if (x.count == x.width) {
      total += block_sum<kSquares>(from + i, count);
      continue;
    }
    // Gathered, so that the order of the additions is that of contiguous elements.
    T gathered[kBlockElements];
    std::int64_t row = i / x.width, column = i % x.width;
    for (std::int64_t done = 0; done < count; ++row, column = 0) {
      const std::int64_t part = std::min(count - done, x.width - column);
      std::copy_n(from + row * x.row_stride + column, part, gathered + done);
      done += part;
    }
    total += block_sum<kSquares>(gathered, count);
  }
  return total;
}

double chunk_sum_run(const Elements& x, bool squares, std::int64_t begin, std::int64_t end) {
  if (x.dtype == DType::bf16) {
    return squares ? sum_of<true, bfloat16>(x, begin, end) : sum_of<false, bfloat16>(x, begin, end);
  }
  return squares ? sum_of<true, float>(x, begin, end) : sum_of<false, float>(x, begin, end);
}

struct Scaled {
  float factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const {
    return hn::Mul(x, hn::Set(FloatTag(), factor));
  }
};
// Product, then sum, each rounded: an accumulated gradient is the same as one written and added.
struct AddScaled {
  float factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector dx) const {
    return hn::Add(dx, hn::Mul(x, hn::Set(FloatTag(), factor)));
  }
};
struct AddConstant {
  float value;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector dx) const {
    return hn::Add(dx, hn::Set(FloatTag(), value));
  }
};
struct Constant {
  float value;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector) const {
    return hn::Set(FloatTag(), value);
  }
};

template <class X, class Y>
void scaled(const void* x, float factor, void* y, std::int64_t count, bool accumulate) {
  const X* from = static_cast<const X*>(x);
  Y* to = static_cast<Y*>(y);
  if (accumulate) {
    map(AddScaled{factor}, from, to, to, count);
  } else {
    map(Scaled{factor}, from, to, count);
  }
}

void scaled_run(DType x_dtype, const void* x, float factor, DType y_dtype, void* y,
                std::int64_t count, bool accumulate) {
  if (y_dtype == DType::bf16) {
    x_dtype == DType::bf16 ? scaled<bfloat16, bfloat16>(x, factor, y, count, accumulate)
                           : scaled<float, bfloat16>(x, factor, y, count, accumulate);
  } else {
    x_dtype == DType::bf16 ? scaled<bfloat16, float>(x, factor, y, count, accumulate)
                           : scaled<float, float>(x, factor, y, count, accumulate);
  }
}

template <class T>
void constant(float value, void* y, std::int64_t count, bool accumulate) {
  T* to = static_cast<T*>(y);
  if (accumulate) {
    map(AddConstant{value}, to, to, count);
  } else {
    T one[1];
    const float source[1] = {value};
    map(Constant{value}, source, one, 1);
    std::fill_n(to, count, one[0]);
  }
}

void constant_run(DType dtype, float value, void* y, std::int64_t count, bool accumulate) {
  dtype == DType::bf16 ? constant<bfloat16>(value, y, count, accumulate)
                       : constant<float>(value, y, count, accumulate);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(chunk_sum_run);
HWY_EXPORT(scaled_run);
HWY_EXPORT(constant_run);

template <class Void>
auto* element(Void* at, DType dtype, std::int64_t i) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return static_cast<Byte*>(at) + i * static_cast<std::int64_t>(size_bytes(dtype));
}

}  // namespace

double chunk_sum(const Elements& x, bool squares, std::int64_t begin, std::int64_t end) {
  return HWY_DYNAMIC_DISPATCH(chunk_sum_run)(x, squares, begin, end);
}

void add_constant(DType dtype, void* dx, std::int64_t count, float value, bool accumulate) {
  parallel_for(count, kChunkElements, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(constant_run)
    (dtype, value, element(dx, dtype, begin), end - begin, accumulate);
  });
}

void add_scaled(const Elements& x, float factor, DType y_dtype, void* y, bool accumulate) {
  for_pieces(x.count / x.width, x.width,
             [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
               HWY_DYNAMIC_DISPATCH(scaled_run)
               (x.dtype, element(x.at, x.dtype, row * x.row_stride + begin), factor, y_dtype,
                element(y, y_dtype, row * x.width + begin), end - begin, accumulate);
             });
}

void scale_run(DType dtype, void* x, std::int64_t count, float factor) {
  HWY_DYNAMIC_DISPATCH(scaled_run)(dtype, x, factor, dtype, x, count, false);
}

}  // namespace reprise::kernels::cpu
#endif

// Loads and stores of f32 and bf16 as f32 vectors, for every Highway target; included between
// foreach_target.h and the code of a kernel. The last elements of a run go through the same vector
// operations as the others, so that a result does not depend on where an element lies.
#if defined(REPRISE_KERNELS_VECTOR_IO_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef REPRISE_KERNELS_VECTOR_IO_INL_H_
#undef REPRISE_KERNELS_VECTOR_IO_INL_H_
#else
#define REPRISE_KERNELS_VECTOR_IO_INL_H_
#endif

#include <cstdint>

#include "core/dtype.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVector = hn::Vec<FloatTag>;

inline HWY_ATTR std::int64_t lanes() {
  return static_cast<std::int64_t>(hn::Lanes(FloatTag()));
}

HWY_API FloatVector load(const float* from) {
  return hn::LoadU(FloatTag(), from);
}

HWY_API FloatVector load(const bfloat16* from) {
  const hn::RebindToUnsigned<FloatTag> bits;
  const hn::Rebind<std::uint16_t, FloatTag> half;
  const auto loaded = hn::LoadU(half, reinterpret_cast<const std::uint16_t*>(from));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(bits, loaded)));
}

HWY_API void store(FloatVector value, float* to) {
  hn::StoreU(value, FloatTag(), to);
}

// The bits of the nearest bfloat16, ties to even; a NaN stays one: the same as to_bfloat16.
HWY_API hn::Vec<hn::RebindToUnsigned<FloatTag>> upper_half(FloatVector value) {
  const hn::RebindToUnsigned<FloatTag> tag;
  const auto bits = hn::BitCast(tag, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(tag, 1u));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(tag, 0x7fffu)), odd);
  const auto quiet = hn::Or(bits, hn::Set(tag, 0x00400000u));
  const auto is_nan =
      hn::MaskFromVec(hn::BitCast(tag, hn::VecFromMask(FloatTag(), hn::IsNaN(value))));
  return hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
}

HWY_API void store(FloatVector value, bfloat16* to) {
  const hn::Rebind<std::uint16_t, FloatTag> half;
  const hn::RebindToSigned<FloatTag> integer;
  hn::StoreU(hn::DemoteTo(half, hn::BitCast(integer, upper_half(value))), half,
             reinterpret_cast<std::uint16_t*>(to));
}

// The first `count` < lanes() elements; the other lanes are zero.
template <class T>
HWY_INLINE FloatVector load_first(const T* from, std::int64_t count) {
  HWY_ALIGN T buffer[HWY_MAX_BYTES / sizeof(float)] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    buffer[i] = from[i];
  }
  return load(buffer);
}

template <class T>
HWY_INLINE void store_first(FloatVector value, T* to, std::int64_t count) {
  HWY_ALIGN T buffer[HWY_MAX_BYTES / sizeof(float)] = {};
  store(value, buffer);
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = buffer[i];
  }
}

// As T would hold it.
template <class T>
HWY_INLINE FloatVector rounded_to(FloatVector value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else {
    return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(upper_half(value)));
  }
}

// y[i] = f(x[i]) for the elements of a run; y may be x.
template <class F, class X, class Y>
HWY_INLINE void map(F f, const X* x, Y* y, std::int64_t count) {
  const std::int64_t step = lanes();
  std::int64_t i = 0;
  for (; i + step <= count; i += step) {
    store(f(load(x + i)), y + i);
  }
  if (i < count) {
    store_first(f(load_first(x + i, count - i)), y + i, count - i);
  }
}

// z[i] = f(x[i], y[i]); z may be x or y.
template <class F, class X, class Y, class Z>
HWY_INLINE void map(F f, const X* x, const Y* y, Z* z, std::int64_t count) {
  const std::int64_t step = lanes();
  std::int64_t i = 0;
  for (; i + step <= count; i += step) {
    store(f(load(x + i), load(y + i)), z + i);
  }
  if (i < count) {
    store_first(f(load_first(x + i, count - i), load_first(y + i, count - i)), z + i, count - i);
  }
}

}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggled

// Elementwise kernels are written once, on f32: elements of another dtype pass through a block of
// f32 in the first-level cache; f32 is read and written in place. Results are rounded once.
#if defined(REPRISE_KERNELS_STAGING_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef REPRISE_KERNELS_STAGING_INL_H_
#undef REPRISE_KERNELS_STAGING_INL_H_
#else
#define REPRISE_KERNELS_STAGING_INL_H_
#endif

#include <algorithm>

#include "kernels/matrix.h"
#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {

inline constexpr std::int64_t kBlock = 512;

struct Identity {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const { return x; }
};
struct Plus {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector y) const {
    return hn::Add(x, y);
  }
};

// The elements as f32: where they are, or in `block`.
inline HWY_ATTR const float* staged(const void* from, DType dtype, std::int64_t count,
                                    float* block) {
  if (dtype == DType::f32) {
    return static_cast<const float*>(from);
  }
  map(Identity(), static_cast<const bfloat16*>(from), block, count);
  return block;
}

// Where a kernel writes f32 results of a block: to their place, or to `block` for write_block().
inline float* stage_for(void* to, DType dtype, bool accumulate, float* block) {
  return dtype == DType::f32 && !accumulate ? static_cast<float*>(to) : block;
}

// Brings results of a block to their place.
inline HWY_ATTR void write_block(const float* from, void* to, DType dtype, bool accumulate,
                                 std::int64_t count) {
  if (dtype == DType::f32) {
    if (accumulate) {
      map(Plus(), static_cast<const float*>(to), from, static_cast<float*>(to), count);
    } else if (from != to) {
      map(Identity(), from, static_cast<float*>(to), count);
    }
  } else if (accumulate) {
    map(Plus(), static_cast<const bfloat16*>(to), from, static_cast<bfloat16*>(to), count);
  } else {
    map(Identity(), from, static_cast<bfloat16*>(to), count);
  }
}

inline void* advanced(void* at, DType dtype, std::int64_t elements) {
  return static_cast<char*>(at) + elements * static_cast<std::int64_t>(size_bytes(dtype));
}

// y = f(x) for a run of `count`: y.at and x.at are its first elements.
template <class F>
void run_staged(F f, const Matrix& x, const Matrix& y, bool accumulate, std::int64_t count) {
  HWY_ALIGN float x_block[kBlock];
  HWY_ALIGN float y_block[kBlock];
  for (std::int64_t i = 0; i < count; i += kBlock) {
    const std::int64_t size = std::min(kBlock, count - i);
    void* to = advanced(y.at, y.dtype, i);
    const float* from = staged(advanced(x.at, x.dtype, i), x.dtype, size, x_block);
    float* out = stage_for(to, y.dtype, accumulate, y_block);
    map(f, from, out, size);
    write_block(out, to, y.dtype, accumulate, size);
  }
}

// y = f(x, r).
template <class F>
void run_staged(F f, const Matrix& x, const Matrix& r, const Matrix& y, bool accumulate,
                std::int64_t count) {
  HWY_ALIGN float x_block[kBlock];
  HWY_ALIGN float r_block[kBlock];
  HWY_ALIGN float y_block[kBlock];
  for (std::int64_t i = 0; i < count; i += kBlock) {
    const std::int64_t size = std::min(kBlock, count - i);
    void* to = advanced(y.at, y.dtype, i);
    const float* from = staged(advanced(x.at, x.dtype, i), x.dtype, size, x_block);
    const float* other = staged(advanced(r.at, r.dtype, i), r.dtype, size, r_block);
    float* out = stage_for(to, y.dtype, accumulate, y_block);
    map(f, from, other, out, size);
    write_block(out, to, y.dtype, accumulate, size);
  }
}

}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggled

#include <algorithm>

#include "core/parallel.h"
#include "kernels/matmul_sides.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/column_sums_cpu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kColumns = 256;  // of one task
constexpr std::int64_t kRows = 64;      // summed alone before they join the total

struct SumOf {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector a, FloatVector b) const {
    return hn::Add(a, b);
  }
};

// Two levels, so that the error of the sum grows with the root of the number of rows.
template <class X, class Y>
void slab(const X* x, std::int64_t rows, std::int64_t columns, std::int64_t stride, Y* sums,
          bool accumulate) {
  HWY_ALIGN float total[kColumns], part[kColumns];
  std::fill_n(total, columns, 0.0f);
  for (std::int64_t first = 0; first < rows; first += kRows) {
    std::fill_n(part, columns, 0.0f);
    for (std::int64_t row = first; row < std::min(rows, first + kRows); ++row) {
      map(SumOf(), part, x + row * stride, part, columns);
    }
    map(SumOf(), total, part, total, columns);
  }
  if (accumulate) {
    map(SumOf(), sums, total, sums, columns);
  } else {
    std::fill_n(part, columns, 0.0f);
    map(SumOf(), total, part, sums, columns);
  }
}

template <class X>
void slab_into(const X* x, std::int64_t rows, std::int64_t columns, std::int64_t stride,
               DType sums_dtype, void* sums, std::int64_t at, bool accumulate) {
  if (sums_dtype == DType::bf16) {
    slab(x, rows, columns, stride, static_cast<bfloat16*>(sums) + at, accumulate);
  } else {
    slab(x, rows, columns, stride, static_cast<float*>(sums) + at, accumulate);
  }
}

void column_sums_run(DType dtype, const void* x, std::int64_t rows, std::int64_t columns,
                     std::int64_t stride, DType sums_dtype, void* sums, bool accumulate) {
  parallel_for(columns, kColumns, [&](std::int64_t begin, std::int64_t end) {
    if (dtype == DType::bf16) {
      slab_into(static_cast<const bfloat16*>(x) + begin, rows, end - begin, stride, sums_dtype,
                sums, begin, accumulate);
    } else {
      slab_into(static_cast<const float*>(x) + begin, rows, end - begin, stride, sums_dtype, sums,
                begin, accumulate);
    }
  });
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {
HWY_EXPORT(column_sums_run);
}

void column_sums(DType dtype, const void* x, std::int64_t rows, std::int64_t columns,
                 std::int64_t row_stride, DType sums_dtype, void* sums, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(column_sums_run)
  (dtype, x, rows, columns, row_stride, sums_dtype, sums, accumulate);
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

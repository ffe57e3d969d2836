#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rows_cpu.cc"
#include <algorithm>
#include <cstring>

#include "hwy/foreach_target.h"
#include "kernels/pieces.h"
#include "kernels/rows_sides.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

void identity_run(const Matrix& from, const Matrix& to, bool accumulate, std::int64_t count) {
  run_staged(Identity(), from, to, accumulate, count);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(identity_run);

void copy_run(const Matrix& from, const Matrix& to, bool accumulate, std::int64_t count) {
  if (from.dtype == to.dtype && !accumulate) {
    std::memcpy(to.at, from.at, static_cast<std::size_t>(count) * size_bytes(to.dtype));
  } else {
    HWY_DYNAMIC_DISPATCH(identity_run)(from, to, accumulate, count);
  }
}

}  // namespace

void copy_rows(const RowCopy& call) {
  for_pieces(call.count, call.width, [&](std::int64_t m, std::int64_t begin, std::int64_t end) {
    const std::int64_t from = call.from_rows == nullptr ? m : call.from_rows[m];
    const std::int64_t to = call.to_rows == nullptr ? m : call.to_rows[m];
    copy_run(call.from.run(from, begin), call.to.run(to, begin), call.accumulate, end - begin);
  });
}

void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t m, std::int64_t begin, std::int64_t end) {
    std::memset(to.element(at == nullptr ? m : at[m], begin), 0,
                static_cast<std::size_t>(end - begin) * size_bytes(to.dtype));
  });
}

void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size) {
  std::fill_n(chosen, size.rows, 0);
  for (std::int64_t m = 0; m < count; ++m) {
    chosen[rows[m]] = 1;
  }
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    if (chosen[row] == 0) {
      copy_run(from.run(row, begin), to.run(row, begin), true, end - begin);
    }
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/elementwise_cpu.cc"
#include "hwy/foreach_target.h"
#include "kernels/elementwise_sides.h"
#include "kernels/pieces.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

struct Times {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector y) const {
    return hn::Mul(x, y);
  }
};

struct Scaled {
  float factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const {
    return hn::Mul(x, hn::Set(FloatTag(), factor));
  }
};

void mul_run(const Matrix& x, const Matrix& r, const Matrix& y, bool accumulate,
             std::int64_t count) {
  run_staged(Times(), x, r, y, accumulate, count);
}

void scale_run(const Matrix& x, float factor, const Matrix& y, bool accumulate,
               std::int64_t count) {
  run_staged(Scaled{factor}, x, y, accumulate, count);
}

void plus_run(const Matrix& x, const Matrix& r, const Matrix& y, std::int64_t count) {
  run_staged(Plus(), x, r, y, false, count);
}

// sums += the rows [begin, end) of a block of columns.
void add_rows(const Matrix& dy, std::int64_t begin, std::int64_t end, std::int64_t columns,
              float* sums) {
  HWY_ALIGN float block[kBlock];
  for (std::int64_t row = begin; row < end; ++row) {
    const float* from = staged(dy.element(row, 0), dy.dtype, columns, block);
    map(Plus(), sums, from, sums, columns);
  }
}

// Rows are summed in groups first: the error grows with the group and their number, not with the
// number of rows.
void column_sums_run(const Matrix& dy, std::int64_t rows, const Matrix& dbias, bool accumulate,
                     std::int64_t columns) {
  constexpr std::int64_t kGroup = 64;
  HWY_ALIGN float group[kBlock];
  HWY_ALIGN float total[kBlock] = {};
  for (std::int64_t row = 0; row < rows; row += kGroup) {
    std::fill_n(group, columns, 0.0f);
    add_rows(dy, row, std::min(rows, row + kGroup), columns, group);
    map(Plus(), static_cast<const float*>(total), static_cast<const float*>(group), total, columns);
  }
  write_block(total, dbias.at, dbias.dtype, accumulate, columns);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(mul_run);
HWY_EXPORT(scale_run);
HWY_EXPORT(plus_run);
HWY_EXPORT(column_sums_run);

// At most kBlock: what one thread sums; small enough for narrow matrices to be shared out.
constexpr std::int64_t kColumns = 128;

}  // namespace

void mul(const Matrix& x, const Matrix& r, const Matrix& y, bool accumulate, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(mul_run)
    (x.run(row, begin), r.run(row, begin), y.run(row, begin), accumulate, end - begin);
  });
}

void scale(const Matrix& x, float factor, const Matrix& y, bool accumulate, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(scale_run)
    (x.run(row, begin), factor, y.run(row, begin), accumulate, end - begin);
  });
}

void add_bias(const Matrix& x, const Matrix& bias, const Matrix& y, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(plus_run)
    (x.run(row, begin), bias.run(0, begin), y.run(row, begin), end - begin);
  });
}

void bias_gradient(const Matrix& dy, const Matrix& dbias, bool accumulate, MatrixSize size) {
  parallel_for(size.width, kColumns, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(column_sums_run)
    (dy.run(0, begin), size.rows, dbias.run(0, begin), accumulate, end - begin);
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

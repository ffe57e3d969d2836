#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/scaling_cpu.cc"
#include "hwy/foreach_target.h"
#include "kernels/pieces.h"
#include "kernels/scaling_sides.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

struct Product {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector y) const {
    return hn::Mul(x, y);
  }
};

struct Times {
  float factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const {
    return hn::Mul(x, hn::Set(FloatTag(), factor));
  }
};

void product_run(const Matrix& x, const Matrix& v, const Matrix& y, bool accumulate,
                 std::int64_t count) {
  run_staged(Product(), x, v, y, accumulate, count);
}

void times_run(const Matrix& x, float factor, const Matrix& y, bool accumulate,
               std::int64_t count) {
  run_staged(Times{factor}, x, y, accumulate, count);
}

// Rows are summed in groups first, so that the error does not grow with the number of rows.
void column_dots_run(const DotCall& call, std::int64_t begin, std::int64_t count) {
  constexpr std::int64_t kGroup = 64;
  HWY_ALIGN float x_block[kBlock];
  HWY_ALIGN float dy_block[kBlock];
  HWY_ALIGN float product[kBlock];
  HWY_ALIGN float group[kBlock];
  HWY_ALIGN float total[kBlock] = {};
  for (std::int64_t first = 0; first < call.size.rows; first += kGroup) {
    std::fill_n(group, count, 0.0f);
    for (std::int64_t row = first; row < std::min(call.size.rows, first + kGroup); ++row) {
      const float* x = staged(call.x.element(row, begin), call.x.dtype, count, x_block);
      const float* dy = staged(call.dy.element(row, begin), call.dy.dtype, count, dy_block);
      map(Product(), x, dy, product, count);
      map(Plus(), static_cast<const float*>(group), static_cast<const float*>(product), group,
          count);
    }
    map(Plus(), static_cast<const float*>(total), static_cast<const float*>(group), total, count);
  }
  write_block(total, call.dv.element(0, begin), call.dv.dtype, call.accumulate, count);
}

// The sum over one piece of a row.
float piece_dot(const DotCall& call, std::int64_t row, std::int64_t begin, std::int64_t end) {
  HWY_ALIGN float x_block[kBlock];
  HWY_ALIGN float dy_block[kBlock];
  const std::int64_t step = lanes();
  FloatVector a = hn::Zero(FloatTag()), b = hn::Zero(FloatTag());
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t count = std::min(kBlock, end - at);
    const float* x = staged(call.x.element(row, at), call.x.dtype, count, x_block);
    const float* dy = staged(call.dy.element(row, at), call.dy.dtype, count, dy_block);
    std::int64_t i = 0;
    for (; i + 2 * step <= count; i += 2 * step) {
      a = hn::MulAdd(load(x + i), load(dy + i), a);
      b = hn::MulAdd(load(x + i + step), load(dy + i + step), b);
    }
    for (; i + step <= count; i += step) {
      a = hn::MulAdd(load(x + i), load(dy + i), a);
    }
    if (i < count) {
      b = hn::MulAdd(load_first(x + i, count - i), load_first(dy + i, count - i), b);
    }
  }
  return hn::GetLane(hn::SumOfLanes(FloatTag(), hn::Add(a, b)));
}

void piece_run(const DotCall& call, std::int64_t index) {
  const std::int64_t pieces = dot_pieces(call.size.width);
  const std::int64_t begin = index % pieces * kDotElements;
  call.partial[index] =
      piece_dot(call, index / pieces, begin, std::min(call.size.width, begin + kDotElements));
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(product_run);
HWY_EXPORT(times_run);
HWY_EXPORT(column_dots_run);
HWY_EXPORT(piece_run);

float load_factor(const Matrix& v, std::int64_t i) {
  return v.dtype == DType::f32 ? static_cast<const float*>(v.at)[i]
                               : to_float(static_cast<const bfloat16*>(v.at)[i]);
}

void store_sum(const DotCall& call, std::int64_t i, double sum) {
  if (call.accumulate) {
    sum += static_cast<double>(load_factor(call.dv, i));
  }
  if (call.dv.dtype == DType::f32) {
    static_cast<float*>(call.dv.at)[i] = static_cast<float>(sum);
  } else {
    static_cast<bfloat16*>(call.dv.at)[i] = to_bfloat16(static_cast<float>(sum));
  }
}

void fill_partial(const DotCall& call) {
  const std::int64_t pieces = dot_pieces(call.size.width);
  const std::int64_t grain = std::max<std::int64_t>(
      1, kPieceElements / std::max<std::int64_t>(1, std::min(call.size.width, kDotElements)));
  parallel_for(call.size.rows * pieces, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      HWY_DYNAMIC_DISPATCH(piece_run)(call, i);
    }
  });
}

double sum_of(const float* from, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(from[i]);
  }
  return sum;
}

}  // namespace

void scale_by(const Matrix& x, const Matrix& v, FactorSteps steps, const Matrix& y, bool accumulate,
              MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    if (steps.column != 0) {
      HWY_DYNAMIC_DISPATCH(product_run)
      (x.run(row, begin), v.run(0, begin), y.run(row, begin), accumulate, end - begin);
    } else {
      HWY_DYNAMIC_DISPATCH(times_run)
      (x.run(row, begin), load_factor(v, row * steps.row), y.run(row, begin), accumulate,
       end - begin);
    }
  });
}

void column_dots(const DotCall& call) {
  constexpr std::int64_t kColumns = 128;  // at most a block; narrow matrices are shared out too
  parallel_for(call.size.width, kColumns, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(column_dots_run)(call, begin, end - begin);
  });
}

void row_dots(const DotCall& call) {
  fill_partial(call);
  const std::int64_t pieces = dot_pieces(call.size.width);
  for (std::int64_t row = 0; row < call.size.rows; ++row) {
    store_sum(call, row, sum_of(call.partial + row * pieces, pieces));
  }
}

void dot(const DotCall& call) {
  fill_partial(call);
  store_sum(call, 0, sum_of(call.partial, call.size.rows * dot_pieces(call.size.width)));
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

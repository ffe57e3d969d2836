#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/accumulate_cpu.cc"
#include <bit>
#include <cmath>
#include <cstring>

#include "hwy/foreach_target.h"
#include "kernels/accumulate_sides.h"
#include "kernels/pieces.h"
#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

struct SumOf {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector a, FloatVector b) const {
    return hn::Add(a, b);
  }
};

struct Same {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector a) const { return a; }
};

// f32 and bf16 only.
template <class X, class R, class Y>
void sum(const void* x, const void* r, void* y, std::int64_t count) {
  map(SumOf(), static_cast<const X*>(x), static_cast<const R*>(r), static_cast<Y*>(y), count);
}

template <class X, class Y>
void convert(const void* x, void* y, std::int64_t count) {
  map(Same(), static_cast<const X*>(x), static_cast<Y*>(y), count);
}

void sum_run(DType x_dtype, const void* x, DType r_dtype, const void* r, void* y,
             std::int64_t count) {
  const bool x_bf16 = x_dtype == DType::bf16, r_bf16 = r_dtype == DType::bf16;
  if (x_bf16) {
    r_bf16 ? sum<bfloat16, bfloat16, bfloat16>(x, r, y, count)
           : sum<bfloat16, float, bfloat16>(x, r, y, count);
  } else {
    r_bf16 ? sum<float, bfloat16, float>(x, r, y, count) : sum<float, float, float>(x, r, y, count);
  }
}

void convert_run(DType x_dtype, const void* x, DType, void* y, std::int64_t count) {
  x_dtype == DType::bf16 ? convert<bfloat16, float>(x, y, count)
                         : convert<float, bfloat16>(x, y, count);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(sum_run);
HWY_EXPORT(convert_run);

// f64 is for oracles: plain loops.
double load_double(float x) {
  return x;
}
double load_double(double x) {
  return x;
}
double load_double(bfloat16 x) {
  return to_float(x);
}
void store_double(double x, double& to) {
  to = x;
}
void store_double(double x, float& to) {
  to = static_cast<float>(x);
}

// To odd before the second rounding: rounding a double to float and that to bfloat16 would round
// twice, and wrongly where the first lands on a tie of the second.
void store_double(double x, bfloat16& to) {
  float nearest = static_cast<float>(x);
  const double back = nearest;
  if (back != x && std::isfinite(nearest)) {
    auto bits = std::bit_cast<std::uint32_t>(nearest);
    if ((bits & 1u) == 0) {
      bits += (std::abs(back) < std::abs(x)) ? 1u : ~0u;
      nearest = std::bit_cast<float>(bits);
    }
  }
  to = to_bfloat16(nearest);
}

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bfloat16{});
    default:
      return f(double{});
  }
}

// y = x + r, or y = x when r is null.
void double_run(DType x_dtype, const void* x, DType r_dtype, const void* r, DType y_dtype, void* y,
                std::int64_t count) {
  with_type(x_dtype, [&](auto x_type) {
    with_type(r_dtype, [&](auto r_type) {
      with_type(y_dtype, [&](auto y_type) {
        const auto* a = static_cast<const decltype(x_type)*>(x);
        const auto* b = static_cast<const decltype(r_type)*>(r);
        auto* c = static_cast<decltype(y_type)*>(y);
        for (std::int64_t i = 0; i < count; ++i) {
          store_double(b == nullptr ? load_double(a[i]) : load_double(a[i]) + load_double(b[i]),
                       c[i]);
        }
      });
    });
  });
}

}  // namespace

void add(const Matrix& x, const Matrix& r, const Matrix& y, MatrixSize size) {
  const bool doubles = x.dtype == DType::f64 || r.dtype == DType::f64;
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    const void* from = x.element(row, begin);
    const void* other = r.element(row, begin);
    void* to = y.element(row, begin);
    if (doubles) {
      double_run(x.dtype, from, r.dtype, other, y.dtype, to, end - begin);
    } else {
      HWY_DYNAMIC_DISPATCH(sum_run)(x.dtype, from, r.dtype, other, to, end - begin);
    }
  });
}

void accumulate(const Matrix& into, const Matrix& x, MatrixSize size) {
  add(into, x, into, size);
}

void cast(const Matrix& x, const Matrix& y, MatrixSize size) {
  const bool doubles = x.dtype == DType::f64 || y.dtype == DType::f64;
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    const void* from = x.element(row, begin);
    void* to = y.element(row, begin);
    if (x.dtype == y.dtype) {
      std::memmove(to, from, static_cast<std::size_t>(end - begin) * size_bytes(x.dtype));
    } else if (doubles) {
      double_run(x.dtype, from, DType::f32, nullptr, y.dtype, to, end - begin);
    } else {
      HWY_DYNAMIC_DISPATCH(convert_run)(x.dtype, from, y.dtype, to, end - begin);
    }
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

// Functions of f32 vectors, for every Highway target; relative errors are against the exact
// function of the f32 argument, measured over every float in tests/kernels/activation_test.cc.
#if defined(REPRISE_KERNELS_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef REPRISE_KERNELS_VECTOR_MATH_INL_H_
#undef REPRISE_KERNELS_VECTOR_MATH_INL_H_
#else
#define REPRISE_KERNELS_VECTOR_MATH_INL_H_
#endif

#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {

HWY_API FloatVector constant(float value) {
  return hn::Set(FloatTag(), value);
}

// 2^n for n in [-126, 127].
HWY_API FloatVector power_of_two(hn::Vec<hn::RebindToSigned<FloatTag>> n) {
  const hn::RebindToSigned<FloatTag> tag;
  return hn::BitCast(FloatTag(), hn::ShiftLeft<23>(hn::Add(n, hn::Set(tag, 127))));
}

// e^x: relative error below 2e-7, also among subnormal results to their precision; infinity above
// 88.73, 0 below -103.98, NaN for NaN.
HWY_API FloatVector exponential(FloatVector x) {
  const FloatTag tag;
  const auto clamped = hn::Max(hn::Min(x, constant(89.0f)), constant(-105.0f));
  // x = n ln 2 + r; the upper part of ln 2 has few bits, so that n times it is exact.
  const auto n = hn::NearestInt(hn::Mul(clamped, constant(1.44269504f)));
  const auto turns = hn::ConvertTo(tag, n);
  auto r = hn::NegMulAdd(turns, constant(0.693359375f), clamped);
  r = hn::NegMulAdd(turns, constant(-2.12194440e-4f), r);
  // The series to r^7; |r| <= 0.35.
  auto p = hn::MulAdd(r, constant(1.0f / 5040), constant(1.0f / 720));
  p = hn::MulAdd(r, p, constant(1.0f / 120));
  p = hn::MulAdd(r, p, constant(1.0f / 24));
  p = hn::MulAdd(r, p, constant(1.0f / 6));
  p = hn::MulAdd(r, p, constant(0.5f));
  p = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), constant(1.0f));
  // In two steps: 2^n itself may be beyond the normal numbers.
  const auto half = hn::ShiftRight<1>(n);
  const auto y = hn::Mul(hn::Mul(p, power_of_two(half)), power_of_two(hn::Sub(n, half)));
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

// e^x as a softmax needs it, x at most 0 but for rounding: 0 below 2^-100, which no sum beside a 1
// can tell. A product with a matrix of subnormal numbers would be twenty times slower.
HWY_API FloatVector probability(FloatVector x) {
  const auto least = constant(-69.3147181f);
  const auto vanishes = hn::Lt(x, least);
  return hn::IfThenZeroElse(vanishes, exponential(hn::IfThenElse(vanishes, least, x)));
}

// 1 / (1 + e^-x) and its complement to 1, each to full relative precision.
struct Sigmoid {
  FloatVector value, complement;
};
HWY_API Sigmoid sigmoid(FloatVector x) {
  const auto e = exponential(hn::Neg(x));
  const auto value = hn::Div(constant(1.0f), hn::Add(constant(1.0f), e));
  // e may be infinite there, and the value 0.
  const auto far = hn::Lt(x, constant(-87.0f));
  return {value, hn::IfThenElse(far, constant(1.0f), hn::Mul(e, value))};
}

// The normal distribution: its integral up to x, with full relative precision in the lower tail
// also, and its density.
struct Normal {
  FloatVector integral, density;
};
HWY_API Normal normal(FloatVector x) {
  const auto a = hn::Min(hn::Abs(x), constant(14.0f));
  // e^(-a^2 / 2); the square's rounding error would show, so it is found exactly (a = h + l, the
  // squares of both halves fit) and put back.
  const auto bits = hn::Set(hn::RebindToUnsigned<FloatTag>(), 0xfffff000u);
  const auto h = hn::And(a, hn::BitCast(FloatTag(), bits));
  const auto l = hn::Sub(a, h);
  const auto square = hn::Mul(a, a);
  const auto missing =
      hn::Add(hn::Add(hn::Sub(hn::Mul(h, h), square), hn::Mul(hn::Add(h, h), l)), hn::Mul(l, l));
  const auto e = exponential(hn::Mul(square, constant(-0.5f)));
  const auto inside = hn::NegMulAdd(e, hn::Mul(missing, constant(0.5f)), e);
  const auto bell = hn::IfThenZeroElse(hn::Gt(hn::Abs(x), constant(14.0f)), inside);
  // The lower tail over e^(-a^2 / 2) is t times a polynomial of t = 1 / (1 + a / 4): our Chebyshev
  // fit on [0, 14], relative error 2e-8.
  const auto t = hn::Div(constant(4.0f), hn::Add(constant(4.0f), a));
  auto p = hn::MulAdd(t, constant(0.01538360334f), constant(-0.0563454643f));
  p = hn::MulAdd(t, p, constant(0.03661525497f));
  p = hn::MulAdd(t, p, constant(0.04831808338f));
  p = hn::MulAdd(t, p, constant(-0.00367795936f));
  p = hn::MulAdd(t, p, constant(0.09537556828f));
  p = hn::MulAdd(t, p, constant(0.06901163609f));
  p = hn::MulAdd(t, p, constant(0.09615086467f));
  p = hn::MulAdd(t, p, constant(0.09941662313f));
  p = hn::MulAdd(t, p, constant(0.09975179219f));
  const auto tail = hn::Mul(hn::Mul(t, p), bell);
  return {hn::IfThenElse(hn::Lt(x, constant(0.0f)), tail, hn::Sub(constant(1.0f), tail)),
          hn::Mul(bell, constant(0.398942280f))};
}

}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggled

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/adamw_cpu.cc"
#include <algorithm>

#include "hwy/foreach_target.h"
#include "kernels/adamw_sides.h"
#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

struct Moments {
  FloatVector p, m, v;
};

HWY_INLINE Moments stepped(Moments s, FloatVector gradient, const AdamWScalars& c) {
  const FloatTag tag;
  const FloatVector g = hn::Mul(gradient, hn::Set(tag, c.gradient_scale));
  const FloatVector p = hn::Mul(s.p, hn::Set(tag, c.keep));
  const FloatVector difference = hn::Sub(g, s.m);
  // The form of lerp whose rounding vanishes at its nearer end.
  const FloatVector m = c.beta1_rest < 0.5f
                            ? hn::MulAdd(hn::Set(tag, c.beta1_rest), difference, s.m)
                            : hn::NegMulAdd(difference, hn::Set(tag, 1 - c.beta1_rest), g);
  const FloatVector v =
      hn::MulAdd(hn::Mul(hn::Set(tag, c.beta2_rest), g), g, hn::Mul(s.v, hn::Set(tag, c.beta2)));
  const FloatVector denominator =
      hn::Add(hn::Div(hn::Sqrt(v), hn::Set(tag, c.correction2_root)), hn::Set(tag, c.epsilon));
  const FloatVector change = hn::Div(hn::Mul(hn::Set(tag, c.minus_step_size), m), denominator);
  return {hn::Add(p, change), m, v};
}

template <bool kMaster, class P, class G, class S>
void step_all(const AdamWRun& run, const AdamWScalars& scalars, std::int64_t begin,
              std::int64_t end) {
  P* value = static_cast<P*>(run.value);
  const G* gradient = static_cast<const G*>(run.gradient);
  S* m = static_cast<S*>(run.m);
  S* v = static_cast<S*>(run.v);
  const std::int64_t step = lanes();
  std::int64_t i = begin;
  for (; i + step <= end; i += step) {
    Moments s;
    if constexpr (kMaster) {
      s.p = load(run.master + i);
    } else {
      s.p = load(value + i);
    }
    s.m = load(m + i);
    s.v = load(v + i);
    s = stepped(s, load(gradient + i), scalars);
    if constexpr (kMaster) {
      store(s.p, run.master + i);
    }
    store(s.p, value + i);
    store(s.m, m + i);
    store(s.v, v + i);
  }
  if (i < end) {
    const std::int64_t count = end - i;
    Moments s;
    if constexpr (kMaster) {
      s.p = load_first(run.master + i, count);
    } else {
      s.p = load_first(value + i, count);
    }
    s.m = load_first(m + i, count);
    s.v = load_first(v + i, count);
    s = stepped(s, load_first(gradient + i, count), scalars);
    if constexpr (kMaster) {
      store_first(s.p, run.master + i, count);
    }
    store_first(s.p, value + i, count);
    store_first(s.m, m + i, count);
    store_first(s.v, v + i, count);
  }
}

template <class P, class G, class S>
void with_master(const AdamWRun& run, const AdamWScalars& c, std::int64_t begin, std::int64_t end) {
  run.master != nullptr ? step_all<true, P, G, S>(run, c, begin, end)
                        : step_all<false, P, G, S>(run, c, begin, end);
}

template <class P, class G>
void with_state(const AdamWRun& run, const AdamWScalars& c, std::int64_t begin, std::int64_t end) {
  run.state_dtype == DType::bf16 ? with_master<P, G, bfloat16>(run, c, begin, end)
                                 : with_master<P, G, float>(run, c, begin, end);
}

template <class P>
void with_gradient(const AdamWRun& run, const AdamWScalars& c, std::int64_t begin,
                   std::int64_t end) {
  run.gradient_dtype == DType::bf16 ? with_state<P, bfloat16>(run, c, begin, end)
                                    : with_state<P, float>(run, c, begin, end);
}

void dispatched(const AdamWRun& run, const AdamWScalars& c, std::int64_t begin, std::int64_t end) {
  run.value_dtype == DType::bf16 ? with_gradient<bfloat16>(run, c, begin, end)
                                 : with_gradient<float>(run, c, begin, end);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {
HWY_EXPORT(dispatched);
}

void adamw_run(const AdamWRun& run, const AdamWScalars& scalars, std::int64_t begin,
               std::int64_t end) {
  HWY_DYNAMIC_DISPATCH(dispatched)(run, scalars, begin, end);
}

}  // namespace reprise::kernels::cpu
#endif

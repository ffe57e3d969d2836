#include "autograd/scaling.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/scaling.h"

namespace reprise {
namespace {

using kernels::Factors;

bool has(Mask mask, std::size_t i) {
  return (mask >> i & 1u) != 0;
}

class ScaleBy final : public Op {  // x, v -> y
 public:
  explicit ScaleBy(Factors factors) : factors_(factors) {}
  std::string_view name() const override {
    return factors_ == Factors::columns ? "scale_columns"
           : factors_ == Factors::rows  ? "scale_rows"
                                        : "scale_by";
  }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::scale_by(factors_, x, run.input(1), run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask gradients) const override {
    return {.inputs = (has(gradients, 0) ? 0b10u : 0u) | (has(gradients, 1) ? 0b01u : 0u)};
  }
  void backward(Backward& run) const override {
    Target dx, dv;
    if (run.wants(0)) {
      dx = run.into(0, /*reuse=*/0);
    }
    if (run.wants(1)) {
      dv = run.into(1);
      // Before dx, which may be written over dy.
      kernels::scale_by_gradient(factors_, run.input(0), run.gradient(0), dv.tensor, dv.accumulate);
    }
    if (run.wants(0)) {
      kernels::scale_by(factors_, run.gradient(0), run.input(1), dx.tensor, dx.accumulate);
    }
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {call.output(0).numel(), 2 * call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    Cost total;
    if (has(gradients, 0)) {
      total += cost(call);
    }
    if (has(gradients, 1)) {
      total += {2 * call.output(0).numel(), 2 * call.output(0).bytes()};
    }
    return total;
  }

 private:
  Factors factors_;
};

Variable scaled(Factors factors, Variable x, Variable v) {
  return apply(std::make_unique<ScaleBy>(factors), {std::move(x), std::move(v)});
}

}  // namespace

Variable scale_columns(Variable x, Variable v) {
  return scaled(Factors::columns, std::move(x), std::move(v));
}
Variable scale_rows(Variable x, Variable v) {
  return scaled(Factors::rows, std::move(x), std::move(v));
}
Variable scale(Variable x, Variable factor) {
  return scaled(Factors::all, std::move(x), std::move(factor));
}

}  // namespace reprise

#include "autograd/l2_normalize.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/l2_normalize.h"

namespace reprise {
namespace {

class L2Normalize final : public Op {  // x -> y, scale
 public:
  std::string_view name() const override { return "l2_normalize"; }
  std::size_t outputs() const override { return 2; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    const Shape rows(x.shape().sizes().first(static_cast<std::size_t>(std::max(x.rank(), 1) - 1)));
    kernels::l2_normalize(x, run.output(0, x.shape(), x.dtype(), /*reuse=*/0),
                          run.output(1, rows, DType::f32));
  }
  // y rather than x: what comes after, a product, holds it as well.
  Saved saved(Mask) const override { return {.outputs = 0b11}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0, /*reuse=*/0);
    kernels::l2_normalize_backward(run.gradient(0), run.output(0), run.output(1), dx, accumulate);
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {3 * call.input(0).numel(), 2 * call.input(0).bytes()};
  }
};

}  // namespace

Variable l2_normalize(Variable x) {
  return apply(std::make_unique<L2Normalize>(), {std::move(x)});
}

}  // namespace reprise

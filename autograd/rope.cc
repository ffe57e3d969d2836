#include "autograd/rope.h"

#include <memory>
#include <utility>

#include "autograd/op.h"

namespace reprise {
namespace {

class Rope final : public Op {  // x, positions, inv_freq -> y
 public:
  explicit Rope(RopeOptions options) : options_(std::move(options)) {}
  std::string_view name() const override { return "rope"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::rope(x, run.input(1), run.input(2), options_,
                  run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {.inputs = 0b110}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0, /*reuse=*/0);
    kernels::rope(run.gradient(0), run.input(1), run.input(2), options_, dx, /*inverse=*/true,
                  accumulate);
  }
  Cost cost(const Call& call) const override {
    return {3 * call.output(0).numel(), 2 * call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override { return cost(call); }
  Mask differentiable() const override { return 0b1; }

 private:
  RopeOptions options_;
};

}  // namespace

Variable rope(Variable x, Variable positions, Variable inv_freq, RopeOptions options) {
  return apply(std::make_unique<Rope>(std::move(options)),
               {std::move(x), std::move(positions), std::move(inv_freq)});
}

}  // namespace reprise

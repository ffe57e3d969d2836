#include "autograd/resize.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/resize.h"

namespace reprise {
namespace {

class ResizeBicubic final : public Op {  // x -> y
 public:
  ResizeBicubic(std::int64_t height, std::int64_t width) : height_(height), width_(width) {}
  std::string_view name() const override { return "resize_bicubic"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    const std::int64_t channels = x.rank() == 0 ? 1 : x.shape().back();
    kernels::resize_bicubic(x, run.output(0, {height_, width_, channels}, x.dtype()));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0);
    kernels::resize_bicubic_gradient(run.gradient(0), dx, accumulate);
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {32 * call.output(0).numel(), call.input(0).bytes() + call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override { return cost(call); }

 private:
  std::int64_t height_, width_;
};

}  // namespace

Variable resize_bicubic(Variable x, std::int64_t height, std::int64_t width) {
  return apply(std::make_unique<ResizeBicubic>(height, width), {std::move(x)});
}

}  // namespace reprise

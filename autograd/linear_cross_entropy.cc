#include "autograd/linear_cross_entropy.h"

#include <memory>
#include <utility>

#include "autograd/parameter.h"
#include "autograd/value.h"
#include "kernels/linear_cross_entropy.h"

namespace reprise {
namespace {

class LinearCrossEntropy final : public Op {
 public:
  LinearCrossEntropy(const kernels::CrossEntropyOptions& options, DType weight_gradient)
      : options_(options), weight_gradient_(weight_gradient) {}
  std::string_view name() const override { return "linear_cross_entropy"; }
  std::size_t outputs() const override { return 3; }  // loss, dX, dW
  Mask differentiable() const override { return 0b011; }

  void forward(Forward& run) const override {
    const Tensor &x = run.input(0), &w = run.input(1);
    const Tensor loss = run.output(0, Shape{}, DType::f32);
    const Tensor dx = gradient_output(run, 0, x.shape(), x.dtype());
    const Tensor dw = gradient_output(run, 1, w.shape(), weight_gradient_);
    kernels::linear_cross_entropy(x, w, run.input(2), loss, dx, dw, options_);
  }

  // Outputs 1 and 2: what was formed, and nothing else.
  Saved saved(Mask gradients) const override { return {.inputs = 0, .outputs = gradients << 1}; }

  void backward(Backward& run) const override {
    for (const std::size_t i : {0, 1}) {
      if (!run.wants(i)) {
        continue;
      }
      const Tensor& at_one = run.output(i + 1);
      if (run.gradient_is_one(0)) {
        run.give(i, at_one);
      } else {
        const Target target = run.into(i);
        kernels::linear_cross_entropy_backward(run.gradient(0), at_one, target.tensor,
                                               target.accumulate);
      }
    }
  }

  Mask weights() const override { return 0b10; }
  // One product for the logits, one for each gradient that is formed.
  Cost cost(const Call& call) const override {
    const Tensor &x = call.input(0), &w = call.input(1);
    const int formed = (call.output(1).rank() == 2 ? 1 : 0) + (call.output(2).rank() == 2 ? 1 : 0);
    return {
        2 * x.numel() * w.size(0) * (1 + formed),
        (x.bytes() + w.bytes()) * (1 + formed) + call.output(1).bytes() + call.output(2).bytes()};
  }
  // Nothing when the upstream gradient is 1.
  Cost backward_cost(const Call&, Mask) const override { return {}; }

 private:
  // Undefined, and an output of no elements, where none is needed.
  static Tensor gradient_output(Forward& run, std::size_t input, const Shape& shape, DType dtype) {
    const bool needed = run.needs_gradient(input);
    const Tensor output = run.output(input + 1, needed ? shape : Shape{0}, dtype);
    return needed ? output : Tensor();
  }

  kernels::CrossEntropyOptions options_;
  DType weight_gradient_;
};

}  // namespace

Variable linear_cross_entropy(Variable x, Variable weight, const Tensor& labels,
                              const kernels::CrossEntropyOptions& options) {
  DType gradient = DType::f32;
  if (weight.defined()) {
    const Value& value = *weight.value();
    gradient = value.is_parameter() ? value.parameter->grad_dtype() : weight.dtype();
  }
  Variable inputs[] = {std::move(x), std::move(weight), Variable(labels)};
  return std::move(apply_many(std::make_unique<LinearCrossEntropy>(options, gradient), inputs)[0]);
}

Variable linear_cross_entropy(Variable x, Variable weight, const Tensor& labels, double items) {
  return linear_cross_entropy(std::move(x), std::move(weight), labels,
                              kernels::CrossEntropyOptions{.items = items});
}

}  // namespace reprise

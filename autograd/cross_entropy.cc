#include "autograd/cross_entropy.h"

#include <memory>
#include <utility>

namespace reprise {
namespace {

class CrossEntropy final : public Op {
 public:
  explicit CrossEntropy(const kernels::CrossEntropyOptions& options) : options_(options) {}
  std::string_view name() const override { return "cross_entropy"; }
  std::size_t outputs() const override { return 2; }  // loss, log-sum-exp
  Mask differentiable() const override { return 0b01; }
  void forward(Forward& run) const override {
    const Tensor& labels = run.input(1);
    const Tensor loss = run.output(0, Shape{}, DType::f32);
    kernels::cross_entropy(run.input(0), labels, loss, run.output(1, labels.shape(), DType::f32),
                           options_);
  }
  Saved saved(Mask) const override { return {.inputs = 0b11, .outputs = 0b10}; }
  void backward(Backward& run) const override {
    const Target dx = run.into(0);
    kernels::cross_entropy_backward(run.gradient(0), run.input(0), run.input(1), run.output(1),
                                    dx.tensor, options_, dx.accumulate);
  }
  // A maximum, a difference, an exponential and a sum for each logit.
  Cost cost(const Call& call) const override {
    return {4 * call.input(0).numel(), call.input(0).bytes() + call.input(1).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override {
    return {3 * call.input(0).numel(), 2 * call.input(0).bytes()};
  }

 private:
  kernels::CrossEntropyOptions options_;
};

}  // namespace

Variable cross_entropy(Variable logits, const Tensor& labels,
                       const kernels::CrossEntropyOptions& options) {
  Variable inputs[] = {std::move(logits), Variable(labels)};
  return std::move(apply_many(std::make_unique<CrossEntropy>(options), inputs)[0]);
}

Variable cross_entropy(Variable logits, const Tensor& labels, double items) {
  return cross_entropy(std::move(logits), labels, kernels::CrossEntropyOptions{.items = items});
}

}  // namespace reprise

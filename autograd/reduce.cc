#include "autograd/reduce.h"

#include <memory>
#include <utility>

#include "kernels/reduce.h"

namespace reprise {
namespace {

double mean_factor(const Tensor& x) {
  return 1 / static_cast<double>(x.numel());
}

class Sum final : public Op {
 public:
  explicit Sum(bool mean) : mean_(mean) {}
  std::string_view name() const override { return mean_ ? "mean" : "sum"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::sum(x, factor(x), run.output(0, Shape{}, DType::f32));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    const Target dx = run.into(0);
    kernels::sum_backward(run.gradient(0), factor(dx.tensor), dx.tensor, dx.accumulate);
  }
  Cost cost(const Call& call) const override {
    return {call.input(0).numel(), call.input(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override { return {0, call.input(0).bytes()}; }

 private:
  double factor(const Tensor& x) const { return mean_ ? mean_factor(x) : 1; }
  bool mean_;
};

class MeanSquare final : public Op {
 public:
  std::string_view name() const override { return "mean_square"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::sum_squares(x, mean_factor(x), run.output(0, Shape{}, DType::f32));
  }
  Saved saved(Mask) const override { return {.inputs = 0b1}; }
  void backward(Backward& run) const override {
    const Tensor& x = run.input(0);
    const Target dx = run.into(0);
    kernels::sum_squares_backward(run.gradient(0), x, mean_factor(x), dx.tensor, dx.accumulate);
  }
  Cost cost(const Call& call) const override {
    return {2 * call.input(0).numel(), call.input(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override {
    return {call.input(0).numel(), 2 * call.input(0).bytes()};
  }
};

}  // namespace

Variable sum(Variable x) {
  return apply(std::make_unique<Sum>(false), {std::move(x)});
}

Variable mean(Variable x) {
  return apply(std::make_unique<Sum>(true), {std::move(x)});
}

Variable mean_square(Variable x) {
  return apply(std::make_unique<MeanSquare>(), {std::move(x)});
}

}  // namespace reprise

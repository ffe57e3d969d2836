#include "autograd/norm.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/norm.h"

namespace reprise {
namespace {

using kernels::NormGradient;
using kernels::NormGradients;

// Leading dimensions of x: the shape of its statistics.
Shape rows_of(const Tensor& x) {
  return Shape(x.shape().sizes().first(static_cast<std::size_t>(std::max(x.rank(), 1) - 1)));
}

bool wants(Mask gradients, std::size_t i) {
  return (gradients >> i & 1u) != 0;
}

NormGradient target(Backward& run, std::size_t i) {
  if (!run.wants(i)) {
    return {};
  }
  auto [tensor, accumulate] = run.into(i);
  return {std::move(tensor), accumulate};
}

Tensor gradient(const Backward& run, std::size_t k) {
  return run.has_gradient(k) ? run.gradient(k) : Tensor();
}

void clear(const NormGradient& gradient) {
  if (gradient.tensor.defined() && !gradient.accumulate) {
    gradient.tensor.zero();
  }
}

// x and the residual have one gradient, for which neither's own buffer will do.
NormGradients residual_targets(Backward& run, std::size_t weight, std::size_t bias) {
  NormGradients to{{}, target(run, weight), target(run, bias)};
  if (run.wants(0) || run.wants(1)) {
    const Tensor& x = run.input(0);
    to.dx.tensor = Tensor::empty(x.shape(), x.dtype(), x.device());
  }
  return to;
}

void give_to_both(Backward& run, const Tensor& gradient) {
  for (const std::size_t i : {0u, 1u}) {
    if (run.wants(i)) {
      run.give(i, gradient);
    }
  }
}

// Only the sum reached the losses: its gradient passes through.
void sum_only(Backward& run, std::size_t weight, std::size_t bias) {
  clear(target(run, weight));
  clear(target(run, bias));
  give_to_both(run, run.gradient(1));
}

class RmsNorm final : public Op {  // x, weight -> y, scale
 public:
  explicit RmsNorm(double epsilon) : epsilon_(epsilon) {}
  std::string_view name() const override { return "rms_norm"; }
  std::size_t outputs() const override { return 2; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::rms_norm(x, run.input(1), epsilon_, run.output(0, x.shape(), x.dtype(), /*reuse=*/0),
                      run.output(1, rows_of(x), DType::f32));
  }
  Saved saved(Mask gradients) const override {
    return {.inputs = wants(gradients, 0) ? 0b11u : 0b01u, .outputs = 0b10};
  }
  void backward(Backward& run) const override {
    kernels::rms_norm_backward(run.gradient(0), {}, run.input(0), run.input(1), run.output(1),
                               {target(run, 0), target(run, 1), {}});
  }
  Mask weights() const override { return 0b10; }
  Cost cost(const Call& call) const override {
    return {4 * call.input(0).numel(), 2 * call.input(0).bytes()};
  }

 private:
  double epsilon_;
};

class RmsNormResidual final : public Op {  // x, residual, weight -> y, sum, scale
 public:
  explicit RmsNormResidual(double epsilon) : epsilon_(epsilon) {}
  std::string_view name() const override { return "rms_norm_residual"; }
  std::size_t outputs() const override { return 3; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::rms_norm_residual(
        x, run.input(1), run.input(2), epsilon_, run.output(0, x.shape(), x.dtype(), /*reuse=*/1),
        run.output(1, x.shape(), x.dtype(), /*reuse=*/0), run.output(2, rows_of(x), DType::f32));
  }
  Saved saved(Mask) const override { return {.inputs = 0b100, .outputs = 0b110}; }
  void backward(Backward& run) const override {
    if (!run.has_gradient(0)) {
      return sum_only(run, 2, 3);
    }
    const NormGradients to = residual_targets(run, 2, 3);
    kernels::rms_norm_backward(run.gradient(0), gradient(run, 1), run.output(1), run.input(2),
                               run.output(2), to);
    give_to_both(run, to.dx.tensor);
  }
  Mask weights() const override { return 0b100; }
  Cost cost(const Call& call) const override {
    return {5 * call.input(0).numel(), 4 * call.input(0).bytes()};
  }

 private:
  double epsilon_;
};

class LayerNorm final : public Op {  // x, weight, bias -> y, mean, scale
 public:
  explicit LayerNorm(double epsilon) : epsilon_(epsilon) {}
  std::string_view name() const override { return "layer_norm"; }
  std::size_t outputs() const override { return 3; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    const Tensor bias = run.has(2) ? run.input(2) : Tensor();
    kernels::layer_norm(
        x, run.input(1), bias, epsilon_, run.output(0, x.shape(), x.dtype(), /*reuse=*/0),
        run.output(1, rows_of(x), DType::f32), run.output(2, rows_of(x), DType::f32));
  }
  Saved saved(Mask gradients) const override {
    if (!wants(gradients, 0) && !wants(gradients, 1)) {
      return {};  // the bias alone
    }
    return {.inputs = wants(gradients, 0) ? 0b11u : 0b01u, .outputs = 0b110};
  }
  void backward(Backward& run) const override {
    kernels::layer_norm_backward(run.gradient(0), {}, run.input(0), run.input(1), run.output(1),
                                 run.output(2), {target(run, 0), target(run, 1), target(run, 2)});
  }
  Mask weights() const override { return 0b110; }
  Cost cost(const Call& call) const override {
    return {7 * call.input(0).numel(), 2 * call.input(0).bytes()};
  }

 private:
  double epsilon_;
};

class LayerNormResidual final : public Op {  // x, residual, weight, bias -> y, sum, mean, scale
 public:
  explicit LayerNormResidual(double epsilon) : epsilon_(epsilon) {}
  std::string_view name() const override { return "layer_norm_residual"; }
  std::size_t outputs() const override { return 4; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    const Tensor bias = run.has(3) ? run.input(3) : Tensor();
    kernels::layer_norm_residual(x, run.input(1), run.input(2), bias, epsilon_,
                                 run.output(0, x.shape(), x.dtype(), /*reuse=*/1),
                                 run.output(1, x.shape(), x.dtype(), /*reuse=*/0),
                                 run.output(2, rows_of(x), DType::f32),
                                 run.output(3, rows_of(x), DType::f32));
  }
  Saved saved(Mask gradients) const override {
    return gradients == 0b1000 ? Saved{} : Saved{.inputs = 0b100, .outputs = 0b1110};
  }
  void backward(Backward& run) const override {
    if (!run.has_gradient(0)) {
      return sum_only(run, 2, 3);
    }
    const NormGradients to = residual_targets(run, 2, 3);
    kernels::layer_norm_backward(run.gradient(0), gradient(run, 1), run.output(1), run.input(2),
                                 run.output(2), run.output(3), to);
    give_to_both(run, to.dx.tensor);
  }
  Mask weights() const override { return 0b1100; }
  Cost cost(const Call& call) const override {
    return {8 * call.input(0).numel(), 4 * call.input(0).bytes()};
  }

 private:
  double epsilon_;
};

}  // namespace

Variable rms_norm(Variable x, Variable weight, double epsilon) {
  return apply(std::make_unique<RmsNorm>(epsilon), {std::move(x), std::move(weight)});
}

Normed rms_norm_residual(Variable x, Variable residual, Variable weight, double epsilon) {
  std::array inputs{std::move(x), std::move(residual), std::move(weight)};
  auto outputs = apply_many(std::make_unique<RmsNormResidual>(epsilon), inputs);
  return {std::move(outputs[0]), std::move(outputs[1])};
}

Variable layer_norm(Variable x, Variable weight, Variable bias, double epsilon) {
  return apply(std::make_unique<LayerNorm>(epsilon),
               {std::move(x), std::move(weight), std::move(bias)});
}

Normed layer_norm_residual(Variable x, Variable residual, Variable weight, Variable bias,
                           double epsilon) {
  std::array inputs{std::move(x), std::move(residual), std::move(weight), std::move(bias)};
  auto outputs = apply_many(std::make_unique<LayerNormResidual>(epsilon), inputs);
  return {std::move(outputs[0]), std::move(outputs[1])};
}

}  // namespace reprise

#include "autograd/elementwise.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/accumulate.h"
#include "kernels/activation.h"
#include "kernels/elementwise.h"

namespace reprise {
namespace {

using kernels::Activation;

bool has(Mask mask, std::size_t i) {
  return (mask >> i & 1u) != 0;
}

class Add final : public Op {  // x, r -> x + r
 public:
  std::string_view name() const override { return "add"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::add(x, run.input(1), run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    for (const std::size_t i : {0u, 1u}) {
      if (run.wants(i)) {
        run.give(i, run.gradient(0));
      }
    }
  }
  Cost cost(const Call& call) const override {
    return {call.output(0).numel(), 3 * call.output(0).bytes()};
  }
  Cost backward_cost(const Call&, Mask) const override { return {}; }
};

class Mul final : public Op {  // x, r -> x r
 public:
  std::string_view name() const override { return "mul"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::mul(x, run.input(1), run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask gradients) const override {
    return {.inputs = (has(gradients, 0) ? 0b10u : 0u) | (has(gradients, 1) ? 0b01u : 0u)};
  }
  void backward(Backward& run) const override {
    // The gradient's buffer is free for the last product only.
    if (run.wants(0)) {
      const auto [dx, accumulate] = run.into(0, run.wants(1) ? -1 : 0);
      kernels::mul(run.gradient(0), run.input(1), dx, accumulate);
    }
    if (run.wants(1)) {
      const auto [dr, accumulate] = run.into(1, /*reuse=*/0);
      kernels::mul(run.gradient(0), run.input(0), dr, accumulate);
    }
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {call.output(0).numel(), 3 * call.output(0).bytes()};
  }
};

class Scale final : public Op {  // x -> factor x
 public:
  explicit Scale(double factor) : factor_(factor) {}
  std::string_view name() const override { return "scale"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::scale(x, factor_, run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0, /*reuse=*/0);
    kernels::scale(run.gradient(0), factor_, dx, accumulate);
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {call.output(0).numel(), 2 * call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override { return cost(call); }

 private:
  double factor_;
};

class AddBias final : public Op {  // x, bias -> x + bias
 public:
  std::string_view name() const override { return "add_bias"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::add_bias(x, run.input(1), run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    if (run.wants(1)) {
      const auto [dbias, accumulate] = run.into(1);
      kernels::bias_gradient(run.gradient(0), dbias, accumulate);
    }
    if (run.wants(0)) {
      run.give(0, run.gradient(0));
    }
  }
  Mask weights() const override { return 0b10; }
  Cost cost(const Call& call) const override {
    return {call.output(0).numel(), 2 * call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return has(gradients, 1) ? Cost{call.output(0).numel(), call.output(0).bytes()} : Cost{};
  }
};

class Cast final : public Op {  // x -> x in another dtype
 public:
  explicit Cast(DType dtype) : dtype_(dtype) {}
  std::string_view name() const override { return "cast"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::cast(x, run.output(0, x.shape(), dtype_));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0);
    if (accumulate) {
      kernels::accumulate(dx, run.gradient(0));
    } else {
      kernels::cast(run.gradient(0), dx);
    }
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {0, call.input(0).bytes() + call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override { return cost(call); }

 private:
  DType dtype_;
};

class Activate final : public Op {  // x -> f(x)
 public:
  explicit Activate(Activation f) : f_(f) {}
  std::string_view name() const override { return kernels::name(f_); }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::activation(f_, x, run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {.inputs = 0b1}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0, /*reuse=*/0);
    kernels::activation_backward(f_, run.input(0), run.gradient(0), dx, accumulate);
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {20 * call.output(0).numel(), 2 * call.output(0).bytes()};
  }

 private:
  Activation f_;
};

class GatedSilu final : public Op {  // gate, up -> silu(gate) up
 public:
  std::string_view name() const override { return "gated_silu"; }
  void forward(Forward& run) const override {
    const Tensor& gate = run.input(0);
    kernels::gated_silu(gate, run.input(1), run.output(0, gate.shape(), gate.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {.inputs = 0b11}; }
  void backward(Backward& run) const override {
    Target dgate, dup;
    if (run.wants(0)) {
      dgate = run.into(0, /*reuse=*/0);
    }
    if (run.wants(1)) {
      dup = run.into(1, run.wants(0) ? -1 : 0);
    }
    kernels::gated_silu_backward(run.input(0), run.input(1), run.gradient(0), dgate.tensor,
                                 dgate.accumulate, dup.tensor, dup.accumulate);
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {21 * call.output(0).numel(), 3 * call.output(0).bytes()};
  }
};

// Gate and up as the halves of the rows of x [.., 2F].
std::pair<Tensor, Tensor> halves(const Tensor& x) {
  const int last = x.rank() - 1;
  const std::int64_t width = x.shape().back() / 2;
  return {x.slice(last, 0, width), x.slice(last, width, 2 * width)};
}

class FusedGatedSilu final : public Op {  // [gate up] -> silu(gate) up
 public:
  std::string_view name() const override { return "gated_silu"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    if (x.rank() == 0 || x.shape().back() % 2 != 0) {
      fail("gated_silu", "gate_up must be [.., 2F], got {}", to_string(x.shape()));
    }
    const auto [gate, up] = halves(x);
    kernels::gated_silu(gate, up, run.output(0, gate.shape(), x.dtype()));
  }
  Saved saved(Mask) const override { return {.inputs = 0b1}; }
  void backward(Backward& run) const override {
    const auto [gate, up] = halves(run.input(0));
    const auto [dx, accumulate] = run.into(0);
    const auto [dgate, dup] = halves(dx);
    kernels::gated_silu_backward(gate, up, run.gradient(0), dgate, accumulate, dup, accumulate);
  }
  Mask weights() const override { return ~Mask{0}; }
  Cost cost(const Call& call) const override {
    return {21 * call.output(0).numel(), 3 * call.output(0).bytes()};
  }
};

Variable activate(Activation f, Variable x) {
  return apply(std::make_unique<Activate>(f), {std::move(x)});
}

}  // namespace

Variable add(Variable x, Variable r) {
  return apply(std::make_unique<Add>(), {std::move(x), std::move(r)});
}
Variable mul(Variable x, Variable r) {
  return apply(std::make_unique<Mul>(), {std::move(x), std::move(r)});
}
Variable scale(Variable x, double factor) {
  return apply(std::make_unique<Scale>(factor), {std::move(x)});
}
Variable add_bias(Variable x, Variable bias) {
  return apply(std::make_unique<AddBias>(), {std::move(x), std::move(bias)});
}

Variable cast(Variable x, DType dtype) {
  for (const DType each : {x.dtype(), dtype}) {
    if (each != DType::f32 && each != DType::bf16) {
      fail("cast", "goes from and to f32 and bf16, got {} to {}", name(x.dtype()), name(dtype));
    }
  }
  if (x.dtype() == dtype) {
    return x;
  }
  return apply(std::make_unique<Cast>(dtype), {std::move(x)});
}

Variable silu(Variable x) {
  return activate(Activation::silu, std::move(x));
}
Variable gelu(Variable x) {
  return activate(Activation::gelu, std::move(x));
}
Variable gelu_tanh(Variable x) {
  return activate(Activation::gelu_tanh, std::move(x));
}
Variable quick_gelu(Variable x) {
  return activate(Activation::quick_gelu, std::move(x));
}

Variable exp(Variable x) {
  return activate(Activation::exp, std::move(x));
}

Variable gated_silu(Variable gate, Variable up) {
  return apply(std::make_unique<GatedSilu>(), {std::move(gate), std::move(up)});
}
Variable gated_silu(Variable gate_up) {
  return apply(std::make_unique<FusedGatedSilu>(), {std::move(gate_up)});
}

}  // namespace reprise

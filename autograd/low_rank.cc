#include "autograd/low_rank.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "core/error.h"
#include "kernels/low_rank.h"

namespace reprise {
namespace {

bool has(Mask mask, std::size_t i) {
  return (mask >> i & 1u) != 0;
}

// A product of two operands for each gradient of the last two inputs.
Cost gradient_cost(Cost forward, Mask gradients, std::size_t first) {
  Cost total;
  for (std::size_t i = first; i < first + 2; ++i) {
    if (has(gradients, i)) {
      total += forward;
    }
  }
  return total;
}

kernels::LowRankGradient target(Backward& run, std::size_t i) {
  if (!run.wants(i)) {
    return {};
  }
  const auto [tensor, accumulate] = run.into(i);
  return {tensor, accumulate};
}

class LowRankOp final : public Op {  // x, A -> u
 public:
  explicit LowRankOp(const kernels::LowRankOptions& options) : options_(options) {}
  std::string_view name() const override { return "low_rank"; }
  void forward(Forward& run) const override {
    const Tensor &x = run.input(0), &a = run.input(1);
    if (x.rank() == 0 || a.rank() != 2) {
      fail("low_rank", "x must be [.., I] and a [R, I], got {} and {}", to_string(x.shape()),
           to_string(a.shape()));
    }
    kernels::low_rank(x, a, options_,
                      run.output(0, x.shape().with(x.rank() - 1, a.size(0)), a.dtype()));
  }
  Saved saved(Mask gradients) const override {
    return {.inputs = (has(gradients, 1) ? 0b01u : 0u) | (has(gradients, 0) ? 0b10u : 0u)};
  }
  void backward(Backward& run) const override {
    const auto dx = target(run, 0), da = target(run, 1);
    kernels::low_rank_backward(run.gradient(0), run.input(0), run.input(1), options_, dx, da);
  }
  Mask weights() const override { return 0b10; }
  Cost cost(const Call& call) const override {
    return {2 * call.output(0).numel() * call.input(1).size(1),
            call.input(0).bytes() + call.input(1).bytes() + call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return gradient_cost(cost(call), gradients, 0);
  }

 private:
  kernels::LowRankOptions options_;
};

class AddLowRank final : public Op {  // y, u, B -> y + u B^T
 public:
  std::string_view name() const override { return "add_low_rank"; }
  void forward(Forward& run) const override {
    const Tensor& y = run.input(0);
    kernels::add_low_rank(y, run.input(1), run.input(2),
                          run.output(0, y.shape(), y.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask gradients) const override {
    return {.inputs = (has(gradients, 2) ? 0b010u : 0u) | (has(gradients, 1) ? 0b100u : 0u)};
  }
  void backward(Backward& run) const override {
    const auto du = target(run, 1), db = target(run, 2);
    if (du.tensor.defined() || db.tensor.defined()) {
      kernels::add_low_rank_backward(run.gradient(0), run.input(1), run.input(2), du, db);
    }
    if (run.wants(0)) {
      run.give(0, run.gradient(0));
    }
  }
  Mask weights() const override { return 0b100; }
  Cost cost(const Call& call) const override {
    return {2 * call.output(0).numel() * call.input(2).size(1),
            2 * call.output(0).bytes() + call.input(1).bytes() + call.input(2).bytes()};
  }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return gradient_cost(cost(call), gradients, 1);
  }
};

class MergedNorms final : public Op {  // W, A, B -> 1 / |W + s B A|
 public:
  MergedNorms(bool in_out, double scale) : in_out_(in_out), scale_(scale) {}
  std::string_view name() const override { return "merged_norms"; }
  void forward(Forward& run) const override {
    const Tensor& w = run.input(0);
    const std::int64_t out = w.rank() == 2 ? w.size(in_out_ ? 1 : 0) : 0;
    kernels::merged_norms(w, in_out_, run.input(1), run.input(2), scale_,
                          run.output(0, Shape{out}, DType::f32));
  }
  Mask differentiable() const override { return 0; }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward&) const override {}
  Cost cost(const Call& call) const override {
    const Tensor &w = call.input(0), &a = call.input(1);
    return {w.numel() * (2 * a.size(0) + 3), w.bytes() + a.bytes() + call.input(2).bytes()};
  }

 private:
  bool in_out_;
  double scale_;
};

}  // namespace

Variable low_rank(Variable x, Variable a, const LowRank& options, Generator* generator) {
  kernels::LowRankOptions kernel{.scale = options.scale, .probability = options.dropout};
  if (!(options.dropout >= 0 && options.dropout < 1)) {
    fail("low_rank", "dropout must be in [0, 1), got {}", options.dropout);
  }
  if (options.dropout > 0) {
    if (generator == nullptr) {
      fail("low_rank", "dropout needs a generator");
    }
    kernel.seed = generator->seed;
    kernel.offset = generator->reserve(static_cast<std::uint64_t>(x.shape().numel()));
  }
  return apply(std::make_unique<LowRankOp>(kernel), {std::move(x), std::move(a)});
}

Variable add_low_rank(Variable y, Variable u, Variable b) {
  return apply(std::make_unique<AddLowRank>(), {std::move(y), std::move(u), std::move(b)});
}

Variable merged_norms(Variable w, bool in_out, Variable a, Variable b, double scale) {
  return apply(std::make_unique<MergedNorms>(in_out, scale),
               {std::move(w), std::move(a), std::move(b)});
}

}  // namespace reprise

#include "autograd/rows.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/rows.h"

namespace reprise {
namespace {

bool has(Mask mask, std::size_t i) {
  return (mask >> i & 1u) != 0;
}

Target target(Backward& run, std::size_t i, int reuse = -1) {
  return run.wants(i) ? run.into(i, reuse) : Target();
}

void take_gradient_of_y(const Backward& run, const Target& dy) {
  if (dy.tensor.defined()) {
    kernels::take_rows(run.gradient(0), run.input(1), dy.tensor, dy.accumulate);
  }
}

class TakeRows final : public Op {  // x, rows -> y
 public:
  std::string_view name() const override { return "take_rows"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    const std::int64_t width = x.rank() == 0 ? 1 : x.shape().back();
    kernels::take_rows(x, run.input(1), run.output(0, {run.input(1).numel(), width}, x.dtype()));
  }
  Saved saved(Mask) const override { return {.inputs = 0b10}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0);
    kernels::take_rows_gradient(run.input(1), run.gradient(0), dx, accumulate);
  }
  Mask weights() const override { return 0b01; }
  Cost cost(const Call& call) const override { return {0, 2 * call.output(0).bytes()}; }
  Cost backward_cost(const Call& call, Mask) const override {
    return {0, call.output(0).bytes() + call.input(0).bytes()};
  }
  Mask differentiable() const override { return 0b01; }
};

class AddRows final : public Op {  // x, rows, y -> out
 public:
  std::string_view name() const override { return "add_rows"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::add_rows(x, run.input(1), run.input(2),
                      run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask gradients) const override { return {.inputs = has(gradients, 2) ? 0b10u : 0u}; }
  void backward(Backward& run) const override {
    take_gradient_of_y(run, target(run, 2));
    if (run.wants(0)) {
      run.give(0, run.gradient(0));
    }
  }
  Mask weights() const override { return 0b100; }
  Cost cost(const Call& call) const override {
    return {call.input(2).numel(), 3 * call.input(2).bytes()};
  }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return {0, has(gradients, 2) ? 2 * call.input(2).bytes() : 0};
  }
  Mask differentiable() const override { return 0b101; }
};

class PutRows final : public Op {  // x, rows, y -> out
 public:
  std::string_view name() const override { return "put_rows"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::put_rows(x, run.input(1), run.input(2),
                      run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {.inputs = 0b10}; }
  void backward(Backward& run) const override {
    const Target dx = target(run, 0, /*reuse=*/0), dy = target(run, 2);
    // The first takes workspace when it accumulates; when it does not, it may be written over the
    // gradient of the result, and comes last.
    if (dx.accumulate) {
      kernels::put_rows_gradient(run.input(1), run.gradient(0), dx.tensor, true);
    }
    take_gradient_of_y(run, dy);
    if (dx.tensor.defined() && !dx.accumulate) {
      kernels::put_rows_gradient(run.input(1), run.gradient(0), dx.tensor);
    }
  }
  Mask weights() const override { return 0b101; }
  Cost cost(const Call& call) const override { return {0, 2 * call.input(2).bytes()}; }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return {0, (has(gradients, 0) ? call.input(2).bytes() : 0) +
                   (has(gradients, 2) ? 2 * call.input(2).bytes() : 0)};
  }
  Mask differentiable() const override { return 0b101; }
};

// On other devices the kernels check at every call.
void check_on_cuda(std::string_view operation, const Variable& x, const Variable& rows) {
  if (x.device().kind == DeviceKind::cuda && x.rank() > 0) {
    kernels::expect_distinct_rows(operation, rows.tensor(), x.shape().rows(), x.device());
  }
}

}  // namespace

Variable take_rows(Variable x, Variable rows) {
  check_on_cuda("take_rows", x, rows);
  return apply(std::make_unique<TakeRows>(), {std::move(x), std::move(rows)});
}

Variable add_rows(Variable x, Variable rows, Variable y) {
  check_on_cuda("add_rows", x, rows);
  return apply(std::make_unique<AddRows>(), {std::move(x), std::move(rows), std::move(y)});
}

Variable put_rows(Variable x, Variable rows, Variable y) {
  check_on_cuda("put_rows", x, rows);
  return apply(std::make_unique<PutRows>(), {std::move(x), std::move(rows), std::move(y)});
}

}  // namespace reprise

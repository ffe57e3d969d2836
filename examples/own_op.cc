// An op of your own: softplus, y = log(1 + e^x), with its saved set and its cost. Only engine
// operations can be replayed; wrapping a kernel like this makes it one.
#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "autograd/tape.h"
#include "core/error.h"

namespace {

using namespace reprise;

class Softplus final : public Op {
 public:
  std::string_view name() const override { return "softplus"; }

  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    if (x.dtype() != DType::f32 || !x.is_contiguous()) {
      fail("softplus", "x must be contiguous f32, got {} {}", reprise::name(x.dtype()),
           to_string(x.shape()));
    }
    // The output may take the input's buffer when nobody else needs that.
    const Tensor y = run.output(0, x.shape(), x.dtype(), /*reuse=*/0);
    if (x.is_meta()) {
      return;  // a dry run: shapes and bytes only
    }
    for (std::int64_t i = 0; i < x.numel(); ++i) {
      y.data<float>()[i] = std::log1p(std::exp(x.data<float>()[i]));
    }
  }

  // dy/dx = 1 - e^-y: the output is enough, so the input need not be held.
  Saved saved(Mask) const override { return {.inputs = 0, .outputs = 1}; }

  void backward(Backward& run) const override {
    const Tensor& y = run.output(0);
    const Tensor& dy = run.gradient(0);
    const Target dx = run.into(0, /*reuse=*/0);
    if (y.is_meta()) {
      return;
    }
    for (std::int64_t i = 0; i < y.numel(); ++i) {
      const float slope = dy.data<float>()[i] * (1 - std::exp(-y.data<float>()[i]));
      float& out = dx.tensor.data<float>()[i];
      out = dx.accumulate ? out + slope : slope;
    }
  }

  Cost cost(const Call& call) const override {
    return {.flops = 4 * call.input(0).numel(), .bytes = 2 * call.input(0).bytes()};
  }
};

Variable softplus(Variable x) {
  return apply(std::make_unique<Softplus>(), {std::move(x)});
}

}  // namespace

int main() {
  const Tensor at = Tensor::from(std::vector<float>{-2, -1, 0, 1, 2}, {5});
  std::vector<std::vector<float>> gradients;
  for (const char* policy : {"keep-all", "inputs-only"}) {
    Tape tape;
    Tape::Scope scope(tape, Policies::named(policy));
    const Variable x = Variable::leaf(at);
    const Variable y = checkpoint(
        "twice", [](Variable v) { return softplus(softplus(std::move(v))); }, x);
    // A scalar loss: the middle element of y.
    class Pick final : public ViewOp {
     public:
      std::string_view name() const override { return "pick"; }
      Tensor view(const Tensor& v) const override { return v.slice(0, 2, 3); }
      void backward(Backward& run) const override {
        Tensor dx = Tensor::zeros(run.input(0).shape(), DType::f32);
        dx.slice(0, 2, 3).copy_from(run.gradient(0));
        run.give(0, dx);
      }
    };
    const Variable loss = apply(std::make_unique<Pick>(), {y});
    const Variable losses[] = {loss}, inputs[] = {x};
    gradients.push_back(grad(losses, inputs)[0].to_vector<float>());
    std::printf("%-12s replayed %lld records, d loss / d x[2] = %.6f\n", policy,
                static_cast<long long>(tape.report().replayed_records), gradients.back()[2]);
  }
  // By the chain rule: sigmoid(0) * sigmoid(log 2) = 1/2 * 2/3.
  const bool right =
      std::abs(gradients[0][2] - 1.0f / 3.0f) < 1e-6f && gradients[0] == gradients[1];
  return right ? 0 : 1;
}

#include "autograd/dropout.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/dropout.h"

namespace reprise {
namespace {

class Dropout final : public Op {  // x -> x m / (1 - p)
 public:
  Dropout(double p, std::uint64_t seed, std::uint64_t offset)
      : p_(p), seed_(seed), offset_(offset) {}
  std::string_view name() const override { return "dropout"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    kernels::dropout(x, p_, seed_, offset_, run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0, /*reuse=*/0);
    kernels::dropout(run.gradient(0), p_, seed_, offset_, dx, accumulate);
  }
  Cost cost(const Call& call) const override {
    return {2 * call.output(0).numel(), 2 * call.output(0).bytes()};
  }
  Cost backward_cost(const Call& call, Mask) const override { return cost(call); }

 private:
  double p_;
  std::uint64_t seed_, offset_;
};

}  // namespace

Variable dropout(Variable x, double p, Generator& generator) {
  if (!(p >= 0 && p < 1)) {
    fail("dropout", "p must be in [0, 1), got {}", p);
  }
  if (p == 0) {
    return x;
  }
  const std::uint64_t offset = generator.reserve(static_cast<std::uint64_t>(x.shape().numel()));
  return apply(std::make_unique<Dropout>(p, generator.seed, offset), {std::move(x)});
}

}  // namespace reprise

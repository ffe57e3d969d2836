#include "autograd/embedding.h"

#include <memory>
#include <utility>
#include <vector>

#include "autograd/op.h"
#include "kernels/embedding.h"

namespace reprise {
namespace {

class Embedding final : public Op {  // ids, table -> y
 public:
  explicit Embedding(std::int64_t padding) : padding_(padding) {}
  std::string_view name() const override { return "embedding"; }
  void forward(Forward& run) const override {
    const Tensor& ids = run.input(0);
    const Tensor& table = run.input(1);
    if (table.rank() != 2) {
      fail("embedding", "table must be [V, C], got {}", to_string(table.shape()));
    }
    if (padding_ >= table.size(0)) {
      fail("embedding", "padding must be below V = {}, got {}", table.size(0), padding_);
    }
    std::vector<std::int64_t> sizes(ids.shape().sizes().begin(), ids.shape().sizes().end());
    sizes.push_back(table.size(1));
    kernels::embedding(ids, table,
                       run.output(0, Shape(std::span<const std::int64_t>(sizes)), table.dtype()));
  }
  Saved saved(Mask) const override { return {.inputs = 0b01}; }
  void backward(Backward& run) const override {
    const auto [dtable, accumulate] = run.into(1);
    kernels::embedding_gradient(run.input(0), run.gradient(0), padding_, dtable, accumulate);
  }
  Mask weights() const override { return 0b10; }
  Cost cost(const Call& call) const override { return {0, 2 * call.output(0).bytes()}; }
  Cost backward_cost(const Call& call, Mask) const override {
    return {call.output(0).numel(), call.output(0).bytes() + call.input(1).bytes()};
  }
  Mask differentiable() const override { return 0b10; }

 private:
  std::int64_t padding_;
};

}  // namespace

Variable embedding(Variable ids, Variable table, std::int64_t padding) {
  return apply(std::make_unique<Embedding>(padding), {std::move(ids), std::move(table)});
}

}  // namespace reprise

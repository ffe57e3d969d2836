#include "autograd/attention.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "core/error.h"
#include "kernels/attention.h"

namespace reprise {
namespace {

constexpr Mask bit(std::size_t i) {
  return Mask{1} << i;
}

enum Input : std::size_t { kQ, kK, kV, kMask, kDocuments };
constexpr Mask kQkv = bit(kQ) | bit(kK) | bit(kV);

template <class Run>
kernels::AttentionInputs inputs_of(const Run& run) {
  kernels::AttentionInputs in{run.input(kQ), run.input(kK), run.input(kV), {}, {}};
  if (run.has(kMask)) {
    in.mask = run.input(kMask);
  }
  if (run.has(kDocuments)) {
    in.documents = run.input(kDocuments);
  }
  return in;
}

class Attention final : public Op {
 public:
  Attention(const kernels::AttentionOptions& options, Mask given, std::int64_t pairs)
      : options_(options), given_(given), pairs_(pairs) {}
  std::string_view name() const override { return "attention"; }
  std::size_t outputs() const override { return 2; }
  Mask differentiable() const override { return kQkv; }

  void forward(Forward& run) const override {
    const Tensor& q = run.input(kQ);
    const Tensor out = run.output(0, q.shape(), q.dtype());
    const Tensor log_sum_exp = run.output(1, Shape{q.size(0), q.size(2), q.size(1)}, DType::f32);
    kernels::attention(inputs_of(run), out, log_sum_exp, options_);
  }

  // All that is needed for the probabilities, whichever gradient is asked for.
  Saved saved(Mask) const override { return {given_, bit(0) | bit(1)}; }

  void backward(Backward& run) const override {
    kernels::AttentionGradients to;
    const auto ask = [&run](std::size_t i, Tensor& tensor, bool& accumulate) {
      if (run.wants(i)) {
        Target target = run.into(i);
        tensor = std::move(target.tensor);
        accumulate = target.accumulate;
      }
    };
    ask(kQ, to.dq, to.accumulate_q);
    ask(kK, to.dk, to.accumulate_k);
    ask(kV, to.dv, to.accumulate_v);
    kernels::attention_backward(inputs_of(run), run.output(0), run.output(1), run.gradient(0), to,
                                options_);
  }

  // Scores and outputs: 2 D each a visible pair and head.
  Cost cost(const Call& call) const override {
    const Tensor& q = call.input(kQ);
    return {4 * pairs_ * q.size(2) * q.size(3),
            q.bytes() + call.input(kK).bytes() + call.input(kV).bytes() + call.output(0).bytes()};
  }
  // Scores again, and four products.
  Cost backward_cost(const Call& call, Mask) const override {
    const Cost forward = cost(call);
    return {forward.flops / 2 * 5, 2 * forward.bytes + call.output(0).bytes()};
  }

 private:
  kernels::AttentionOptions options_;
  Mask given_;          // inputs that are there
  std::int64_t pairs_;  // visible, of one head
};

Variable constant(const Tensor& tensor) {
  return tensor.defined() ? Variable(tensor) : Variable();
}

}  // namespace

Variable attention(Variable q, Variable k, Variable v, const AttentionSpec& spec) {
  kernels::AttentionOptions options{.scale = spec.scale,
                                    .causal = spec.causal,
                                    .window = spec.window,
                                    .dropout = spec.dropout,
                                    .padded_right = spec.padded_right,
                                    .most_documents = spec.most_documents};
  const kernels::AttentionInputs in{q.tensor(), k.tensor(), v.tensor(), spec.mask, spec.documents};
  const std::int64_t pairs = kernels::visible_pairs(in, options);
  if (spec.dropout > 0) {
    if (spec.generator == nullptr) {
      fail("attention", "dropout {} needs a generator", spec.dropout);
    }
    const std::int64_t blocks =
        kernels::attention_dropout_blocks(q.size(0), q.size(2), q.size(1), k.size(1));
    options.seed = spec.generator->seed;
    options.offset = spec.generator->reserve(static_cast<std::uint64_t>(4 * blocks));
  }
  const Mask given = kQkv | (spec.mask.defined() ? bit(kMask) : 0) |
                     (spec.documents.defined() ? bit(kDocuments) : 0);
  std::vector<Variable> inputs{std::move(q), std::move(k), std::move(v), constant(spec.mask),
                               constant(spec.documents)};
  return apply_many(std::make_unique<Attention>(options, given, pairs), inputs).front();
}

}  // namespace reprise

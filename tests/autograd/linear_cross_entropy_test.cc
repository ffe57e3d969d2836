// The loss head on the tape: what it forms, saves, hands over and scales.
#include "autograd/linear_cross_entropy.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "tests/random_tensor.h"

namespace reprise {
namespace {

using testing::normal;

constexpr std::int64_t kTokens = 20, kWidth = 8, kWords = 50;

Tensor labels() {
  std::vector<std::int64_t> values;
  for (std::int64_t n = 0; n < kTokens; ++n) {
    values.push_back(n % 3 == 0 ? -100 : n * 7 % kWords);
  }
  return Tensor::from(values, Shape{kTokens});
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())) == 0;
}

struct Head {
  explicit Head(DType dtype = DType::f32)
      : x("x", normal({kTokens, kWidth}, dtype, 1)), w("w", normal({kWords, kWidth}, dtype, 2)) {}
  Parameter x, w;
};

TEST(LinearCrossEntropyOnTheTape, GradientsChangeHandsWithoutACopy) {
  Head head;
  Tape tape;
  Tape::Scope scope(tape);
  const Variable loss = linear_cross_entropy(head.x, head.w, labels());
  const BytesByKind before = allocator(cpu).report().live;
  // Formed in the forward already: the sweep allocates nothing.
  allocator(cpu).reset_peak();
  const std::int64_t live = allocator(cpu).report().live_bytes;
  backward(loss);
  EXPECT_EQ(allocator(cpu).report().peak_bytes, live + loss.tensor().bytes());
  const auto kind = static_cast<std::size_t>(MemoryKind::gradients);
  EXPECT_EQ(allocator(cpu).report().live[kind] - before[kind],
            head.x.gradient().bytes() + head.w.gradient().bytes());
  const auto saved = static_cast<std::size_t>(MemoryKind::saved);
  EXPECT_EQ(allocator(cpu).report().live[saved], 0);
}

TEST(LinearCrossEntropyOnTheTape, TheUpstreamGradientScales) {
  Head one, three;
  Tape tape;
  {
    Tape::Scope scope(tape);
    backward(linear_cross_entropy(one.x, one.w, labels(), 7));
  }
  Tape::Scope scope(tape);
  BackwardOptions options;
  options.scale = {4};
  backward(linear_cross_entropy(three.x, three.w, labels(), 7), options);
  for (const auto& [a, b] : {std::pair(&one.x, &three.x), std::pair(&one.w, &three.w)}) {
    const std::vector<float> g = a->gradient().to_vector<float>(),
                             g4 = b->gradient().to_vector<float>();
    for (std::size_t i = 0; i < g.size(); ++i) {
      EXPECT_EQ(g4[i], 4 * g[i]);
    }
  }
}

TEST(LinearCrossEntropyOnTheTape, ASecondContributionAddsUp) {
  Head once, twice;
  for (Head* head : {&once, &twice, &twice}) {
    Tape tape;
    Tape::Scope scope(tape);
    backward(linear_cross_entropy(head->x, head->w, labels()));
  }
  const std::vector<float> g = once.w.gradient().to_vector<float>(),
                           g2 = twice.w.gradient().to_vector<float>();
  for (std::size_t i = 0; i < g.size(); ++i) {
    EXPECT_EQ(g2[i], 2 * g[i]);
  }
}

TEST(LinearCrossEntropyOnTheTape, TheLossTwiceAndKeptGradientsAreNotDestroyed) {
  Head kept, fresh;
  Tape tape;
  Tape::Scope scope(tape);
  const Variable loss = linear_cross_entropy(kept.x, kept.w, labels());
  BackwardOptions options;
  options.keep = true;
  backward(loss, options);
  kept.w.zero_gradient();
  kept.x.zero_gradient();
  backward(loss);
  Tape other;
  Tape::Scope second(other);
  backward(linear_cross_entropy(fresh.x, fresh.w, labels()));
  EXPECT_TRUE(same_bits(kept.w.gradient(), fresh.w.gradient()));
  EXPECT_TRUE(same_bits(kept.x.gradient(), fresh.x.gradient()));
}

TEST(LinearCrossEntropyOnTheTape, FrozenAndWithoutGradient) {
  const auto kind = static_cast<std::size_t>(MemoryKind::saved);
  Head head;
  head.w.set_trainable(false);
  Tape tape;
  Tape::Scope scope(tape);
  const std::int64_t before = allocator(cpu).report().live[kind];
  Variable loss = linear_cross_entropy(head.x, head.w, labels());
  EXPECT_EQ(allocator(cpu).report().live[kind] - before, head.x.value().bytes());  // dX only
  backward(loss);
  EXPECT_TRUE(head.x.has_gradient());
  EXPECT_FALSE(head.w.has_gradient());
  const Variable quiet = no_grad([&] { return linear_cross_entropy(head.x, head.w, labels()); });
  EXPECT_FALSE(quiet.needs_gradient());
  EXPECT_TRUE(same_bits(quiet.tensor(), loss.tensor()));
}

TEST(LinearCrossEntropyOnTheTape, EveryPolicyGivesTheSameBits) {
  Head plain;
  {
    Tape tape;
    Tape::Scope scope(tape);
    backward(linear_cross_entropy(plain.x, plain.w, labels()));
  }
  for (const std::string& policy : Policies::names()) {
    Head head;
    Tape tape;
    Tape::Scope scope(tape, Policies::named(policy));
    const Variable loss =
        checkpoint("head", [&] { return linear_cross_entropy(head.x, head.w, labels()); });
    backward(loss);
    EXPECT_TRUE(same_bits(head.w.gradient(), plain.w.gradient())) << policy;
    EXPECT_TRUE(same_bits(head.x.gradient(), plain.x.gradient())) << policy;
  }
}

TEST(LinearCrossEntropyOnTheTape, TheWeightsGradientHasItsGradDType) {
  Head half(DType::bf16), full(DType::bf16);
  full.w.set_grad_dtype(DType::f32);
  for (Head* head : {&half, &full}) {
    Tape tape;
    Tape::Scope scope(tape);
    backward(linear_cross_entropy(head->x, head->w, labels()));
  }
  EXPECT_EQ(half.w.gradient().dtype(), DType::bf16);
  ASSERT_EQ(full.w.gradient().dtype(), DType::f32);
  for (std::int64_t i = 0; i < kWords * kWidth; ++i) {
    EXPECT_EQ(to_float(half.w.gradient().data<bfloat16>()[i]),
              to_float(to_bfloat16(full.w.gradient().data<float>()[i])));
  }
}

TEST(LinearCrossEntropyOnTheTape, TheDryRunPredictsThePeak) {
  const auto peak = [](Device device) {
    allocator(device).reset_peak();
    const std::int64_t before = allocator(device).report().live_bytes;
    Parameter x("x", Tensor::zeros({600, 16}, DType::f32, device)),
        w("w", Tensor::zeros({100'000, 16}, DType::f32, device));
    Tape tape;
    Tape::Scope scope(tape);
    backward(linear_cross_entropy(x, w, Tensor::zeros({600}, DType::i64, device)));
    return allocator(device).report().peak_bytes - before;
  };
  EXPECT_EQ(peak(meta), peak(cpu));
}

}  // namespace
}  // namespace reprise

// A model's step whose blocks lie where its dry run says.
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "nn/models/llama.h"

namespace reprise::testing {
namespace {

struct Subject {
  explicit Subject(Device device)
      : model(config(), {device, DType::f32}),
        ids(Tensor::from(std::vector<std::int64_t>(32, 7), {2, 16}).to(device)) {
    Generator generator{3};
    model.initialize(generator);
  }
  static nn::LlamaConfig config() {
    nn::LlamaConfig config{.vocabulary = 97, .width = 64, .inner = 172, .layers = 4, .heads = 4};
    config.kv_heads = 4;
    config.head_size = config.rope.dim = 16;
    return config;
  }
  // Gradients are read, and gone at the end.
  std::vector<std::vector<float>> step(const Policies& policies) {
    Tape tape;
    const Tape::Scope scope(tape, policies);
    backward(model.loss({.ids = ids, .labels = ids}));
    std::vector<std::vector<float>> gradients;
    for (Parameter* p : model.parameters()) {
      if (p->has_gradient() && !p->gradient().is_meta()) {
        gradients.push_back(p->gradient().to_vector<float>());
      }
      p->zero_gradient();
    }
    return gradients;
  }
  nn::Llama model;
  Tensor ids;
};

TEST(PlannedStep, LiesWhereItsDryRunSaysUnderEveryPolicy) {
  Subject shadow(meta), real(cpu);
  for (const std::string& name : Policies::names()) {
    const Policies policies = Policies::named(name);
    const auto expected = real.step(policies);
    const auto plan = std::make_shared<const MemoryPlan>(plan_step([&] { shadow.step(policies); }));
    ASSERT_GT(plan->bytes, 0) << name;
    EXPECT_LE(static_cast<double>(plan->bytes), 1.03 * static_cast<double>(plan->live_bytes))
        << name;
    for (int i = 0; i < 2; ++i) {
      allocator(cpu).begin_plan(plan);
      EXPECT_TRUE(real.step(policies) == expected) << name;
      const Allocator::PlanUse use = allocator(cpu).end_plan();
      EXPECT_EQ(use.strays, 0) << name;
      EXPECT_GE(use.reserved_bytes, plan->bytes) << name;
    }
  }
  // Another policy's plan does not fit, and changes nothing.
  const auto plan = std::make_shared<const MemoryPlan>(
      plan_step([&] { shadow.step(Policies::named("inputs-only")); }));
  const auto expected = real.step(Policies::named("keep-all"));
  allocator(cpu).begin_plan(plan);
  EXPECT_TRUE(real.step(Policies::named("keep-all")) == expected);
  EXPECT_GT(allocator(cpu).end_plan().strays, 0);
}

}  // namespace
}  // namespace reprise::testing

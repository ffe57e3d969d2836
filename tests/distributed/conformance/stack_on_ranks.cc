// The story of ms-swift, end to end on ranks: Qwen2-VL with LoRA, its tower and its base frozen,
// segments on, gradients reduced while backward runs. There: "Expected to mark a variable ready
// only once".
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "nn/lora.h"
#include "nn/optimizer/adamw.h"
#include "nn/optimizer/clip.h"
#include "nn/weights/folder.h"
#include "tests/distributed/conformance/net.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::Reducer;
using distributed::ReducerEvent;

const std::string kFolder = std::string(REPRISE_SOURCE_DIR) + "/tests/golden/qwen2_vl_lora";

// Text around an image of 2 tokens, other for each rank and step.
nn::Batch batch_of(int rank, int step) {
  auto token = [&](int i) {
    return static_cast<std::int64_t>((5 * i + 11 * rank + 3 * step) % 90);
  };
  nn::Batch batch;
  const std::vector<std::int64_t> ids{token(0), 100,      103,      103,     101,
                                      token(1), token(2), token(3), token(4)};
  std::vector<std::int64_t> labels = ids;
  labels[2] = labels[3] = -100;
  batch.ids = Tensor::from(ids, {1, 9});
  batch.labels = Tensor::from(labels, {1, 9});
  batch.grids = Tensor::from(std::vector<std::int64_t>{1, 2, 4}, {1, 3});
  std::vector<float> pixels;
  for (std::int64_t i = 0; i < 8 * 96; ++i) {
    pixels.push_back(std::sin(0.37f * static_cast<float>(i) + static_cast<float>(rank)));
  }
  batch.pixels = Tensor::from(pixels, {8, 96});
  return batch;
}

std::unique_ptr<nn::Model> load() {
  auto model = nn::load_model(kFolder);
  EXPECT_TRUE(model.ok()) << model.status();
  const auto adapter = nn::load_adapter(**model, kFolder + "/adapter");
  EXPECT_TRUE(adapter.ok()) << adapter.status();
  return *std::move(model);
}

struct Trained {
  std::vector<double> losses;
  std::vector<Values> gradients;
  Values adapters;  // in the end
};

constexpr int kSteps = 4;

Trained train_on(Communicator& ranks, const char* policy) {
  const auto model = load();
  const std::vector<Parameter*> adapters = model->trainable_parameters();
  EXPECT_FALSE(adapters.empty());
  for (const nn::NamedParameter& entry : model->named_parameters()) {
    EXPECT_EQ(entry.parameter->trainable(), entry.adapter) << entry.path;
  }
  Reducer reducer(ranks, adapters, {{512, 2048}});
  nn::AdamW optimizer(adapters);
  Trained run;
  for (int step = 0; step < kSteps; ++step) {
    optimizer.zero_gradients();
    Tape tape;
    const Tape::Scope scope(tape, Policies::named(policy));
    std::vector<Parameter*> announced, ready;
    BackwardOptions options;
    options.reach_all = true;
    options.on_plan = [&](const Plan& plan) {
      for (const Ready& entry : plan.order) {
        announced.push_back(entry.parameter);
      }
    };
    options.on_ready = [&](Parameter& p) { ready.push_back(&p); };
    const Variable loss = model->loss(batch_of(ranks.rank(), 0));
    run.losses.push_back(
        all_reduce_value(ranks, loss.tensor().item<float>(), distributed::Reduce::sum, "loss") /
        ranks.size());
    reducer.backward(loss, options);
    EXPECT_EQ(ready, announced);
    EXPECT_EQ(ready.size(), adapters.size());
    // A replay costs more only where something was dropped, and of the tower nothing was recorded.
    EXPECT_EQ(tape.report().replayed_records > 0, std::string(policy) != "keep-all");
    Values& gradients = run.gradients.emplace_back();
    for (const Parameter* p : adapters) {
      gradients.push_back(p->gradient().to_vector<float>());
    }
    nn::clip_global_norm(adapters, 1.0);
    optimizer.step(2e-2);
  }
  for (const Parameter* p : adapters) {
    run.adapters.push_back(p->value().to_vector<float>());
  }
  std::int64_t first_launch = -1, last_ready = -1;
  for (const ReducerEvent& e : reducer.events()) {
    if (e.kind == ReducerEvent::Kind::launch && first_launch < 0) {
      first_launch = e.sequence;
    } else if (e.kind == ReducerEvent::Kind::ready) {
      last_ready = e.sequence;
    }
  }
  EXPECT_LT(first_launch, last_ready);
  return run;
}

TEST(StackOnRanks, MsSwiftQwen2VlWithLora) {
  on_ranks([](Communicator& ranks) {
    const Trained plain = train_on(ranks, "keep-all");
    for (const char* policy : {"inputs-only", "keep-products", "nested"}) {
      const Trained segments = train_on(ranks, policy);
      EXPECT_EQ(segments.losses, plain.losses) << policy;
      EXPECT_TRUE(same_bits(segments.gradients, plain.gradients)) << policy;
      EXPECT_EQ(segments.adapters, plain.adapters) << policy;
    }
    EXPECT_LT(plain.losses.back(), plain.losses.front() - 0.01);
    // The first step's gradients are those of one process with every rank's batch.
    const auto alone = load();
    Tape tape;
    const Tape::Scope scope(tape);
    std::vector<Variable> losses;
    for (int r = 0; r < ranks.size(); ++r) {
      losses.push_back(alone->loss(batch_of(r, 0)));
    }
    BackwardOptions options;
    options.scale.assign(losses.size(), 1.0 / ranks.size());
    backward(losses, options);
    Values expected;
    for (const Parameter* p : alone->trainable_parameters()) {
      expected.push_back(p->gradient().to_vector<float>());
    }
    expect_close({plain.gradients[0]}, {expected});
  });
}

}  // namespace
}  // namespace reprise::testing

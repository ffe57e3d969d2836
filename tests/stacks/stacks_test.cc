// The five fine-tuning stacks that broke where checkpointing met the rest (docs/architecture.md):
// each failure as a program of ours, whose gradients with segments are those without, bit for bit.
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/tape.h"
#include "distributed/reducer.h"
#include "nn/linear.h"
#include "nn/lora.h"
#include "nn/models/model.h"
#include "nn/norm.h"
#include "nn/weights/json.h"

namespace reprise {
namespace {

using Gradients = std::map<std::string, std::vector<float>>;
constexpr std::int64_t kWidth = 24, kVocabulary = 19;

std::unique_ptr<nn::Model> qwen2() {
  nn::JsonReader json = *nn::JsonReader::parse(R"({"model_type": "qwen2", "hidden_size": 24,
      "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
      "num_key_value_heads": 2, "vocab_size": 19, "max_position_embeddings": 16})",
                                               "config.json");
  auto model = nn::build_model(json, {});
  EXPECT_TRUE(model.ok()) << model.status();
  Generator generator{3, 0};
  (*model)->initialize(generator);
  return *std::move(model);
}

nn::Batch batch() {
  const std::vector<std::int64_t> ids{3, 7, 1, 0, 18, 5, 2, 9, 9, 4, 11, 6};
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {2, 6});
  return batch;
}

Gradients gradients_of(nn::Module& module) {
  Gradients gradients;
  for (const nn::NamedParameter& entry : module.named_parameters()) {
    Parameter& p = *entry.parameter;
    if (p.trainable() && p.has_gradient()) {
      gradients[entry.path] = p.gradient().to_vector<float>();
    }
    p.zero_gradient();
  }
  return gradients;
}

bool all_zero(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return x == 0; });
}

struct Run {
  Gradients gradients;
  TapeReport report;
};

// One forward and backward of `loss` under the policy.
Run run(
    const char* policy, nn::Module& module, const std::function<Variable()>& loss,
    const std::function<void(const Variable&)>& sweep = [](const Variable& l) { backward(l); }) {
  Tape tape;
  const Tape::Scope scope(tape, Policies::named(policy));
  sweep(loss());
  Run run{gradients_of(module), tape.report()};
  return run;
}

void expect_same_under_every_policy(
    nn::Module& module, const std::function<Variable()>& loss,
    const std::function<void(const Variable&)>& sweep = [](const Variable& l) { backward(l); }) {
  const Run plain = run("keep-all", module, loss, sweep);
  EXPECT_EQ(plain.report.replayed_records, 0);
  EXPECT_FALSE(plain.gradients.empty());
  for (const char* policy : {"keep-products", "inputs-only", "nested"}) {
    const Run segments = run(policy, module, loss, sweep);
    EXPECT_GT(segments.report.replayed_records, 0) << policy;
    ASSERT_EQ(segments.gradients.size(), plain.gradients.size()) << policy;
    for (const auto& [name, gradient] : plain.gradients) {
      const std::vector<float>& other = segments.gradients.at(name);
      ASSERT_EQ(other.size(), gradient.size());
      EXPECT_EQ(std::memcmp(other.data(), gradient.data(), 4 * gradient.size()), 0)
          << policy << ": " << name;
    }
  }
}

// A block of somebody else's encoder. It knows nothing of checkpointing: no attribute, no base
// class that would carry one, no function to be replaced.
struct TowerBlock : nn::Module {
  explicit TowerBlock(nn::Place place)
      : norm(kWidth, 1e-5, place),
        up(kWidth, 2 * kWidth, {.bias = true}, place),
        down(2 * kWidth, kWidth, {.bias = true}, place) {
    add("norm", norm);
    add("up", up);
    add("down", down);
  }
  Variable forward(Variable x) const {
    Variable y = down(quick_gelu(up(norm(x))));
    return reprise::add(std::move(y), std::move(x));
  }
  nn::LayerNorm norm;
  nn::Linear up, down;
};

struct Tower : nn::Module {
  explicit Tower(nn::Place place = {}) {
    add("blocks", blocks);
    for (int i = 0; i < 3; ++i) {
      blocks.append(place);
    }
    name_parameters();
    std::uint64_t seed = 5;
    for (Parameter* p : parameters()) {
      const Tensor value = p->write();
      for (std::int64_t i = 0; i < value.numel(); ++i) {
        value.data<float>()[i] =
            static_cast<float>(philox(seed, static_cast<std::uint64_t>(i))[0] % 1000) / 2500.0f -
            0.2f;
      }
      ++seed;
    }
  }
  nn::ModuleList<TowerBlock> blocks;
};

Variable pixels() {
  std::vector<float> values(5 * kWidth);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = 0.01f * static_cast<float>(i % 37) - 0.15f;
  }
  return Variable(Tensor::from(values, {5, kWidth}));
}

// XComposer: "CLIPEncoder has no attribute _gradient_checkpointing_func". Any span of any class is
// a segment; the input (pixels) needs no gradient, the weights that it meets do.
TEST(Stacks, XComposerEncoderWithoutACheckpointingAttribute) {
  Tower tower;
  expect_same_under_every_policy(tower, [&] {
    Variable x = pixels();
    for (std::size_t i = 0; i < tower.blocks.size(); ++i) {
      x = checkpoint("tower." + std::to_string(i), &TowerBlock::forward, &tower.blocks[i],
                     std::move(x));
    }
    return mean(std::move(x));
  });
}

// Axolotl: "functools.partial has no attribute __self__". The callable is never looked into.
TEST(Stacks, AxolotlPartialAroundABoundMethod) {
  Tower tower;
  expect_same_under_every_policy(tower, [&] {
    Variable x = pixels();
    for (std::size_t i = 0; i < tower.blocks.size(); ++i) {
      auto partial = std::bind(&TowerBlock::forward, &tower.blocks[i], std::placeholders::_1);
      x = checkpoint("tower." + std::to_string(i), partial, std::move(x));
    }
    return mean(std::move(x));
  });
}

// LLaMA-Factory: the same behind a forward that another library has wrapped, all weights trained,
// gradients reduced in buckets while backward runs.
TEST(Stacks, LlamaFactoryWrappedForwardWithReduction) {
  Tower tower;
  const auto ranks = distributed::world_of_one();
  distributed::Reducer reducer(*ranks, tower.parameters());
  int calls = 0;
  const std::function<Variable(const TowerBlock&, Variable)> inner = &TowerBlock::forward;
  const auto wrapped = [&](const TowerBlock& block, Variable x) {
    ++calls;
    return inner(block, std::move(x));
  };
  const std::function<Variable(const TowerBlock&, Variable)> outer = wrapped;
  expect_same_under_every_policy(
      tower,
      [&] {
        Variable x = pixels();
        for (std::size_t i = 0; i < tower.blocks.size(); ++i) {
          x = checkpoint("tower." + std::to_string(i), outer, tower.blocks[i], std::move(x));
        }
        return mean(std::move(x));
      },
      [&](const Variable& loss) { reducer.backward(loss); });
  EXPECT_EQ(calls, 4 * 3) << "the callable runs once per forward, never in backward";
}

// ms-swift: "Expected to mark a variable ready only once": LoRA under data parallelism, segments
// on. Each adapter weight becomes ready once, in the order that was announced.
TEST(Stacks, MsSwiftLoraIsReadyOnce) {
  const auto model = qwen2();
  Generator generator{4, 0};
  nn::add_lora(*model, {.rank = 4, .init = nn::LoraInit::random, .all_linear = true}, generator);
  const auto ranks = distributed::world_of_one();
  distributed::Reducer reducer(*ranks, model->trainable_parameters());
  expect_same_under_every_policy(
      *model, [&] { return model->loss(batch()); },
      [&](const Variable& loss) {
        std::vector<Parameter*> announced, ready;
        BackwardOptions options;
        options.on_plan = [&](const Plan& plan) {
          for (const Ready& entry : plan.order) {
            announced.push_back(entry.parameter);
          }
        };
        options.on_ready = [&](Parameter& p) { ready.push_back(&p); };
        reducer.backward(loss, options);
        EXPECT_EQ(ready, announced);
        EXPECT_EQ(ready.size(), model->trainable_parameters().size());
      });
}

struct Options {
  bool enable = true;
  double factor = 1;
};

// self-llm: "unexpected keyword argument 'enable'", and no gradient unless the inputs were made to
// need one. Options go through untouched; a frozen embedding feeds segments whose adapters train.
TEST(Stacks, SelfLlmOptionsAndFrozenInputs) {
  const auto model = qwen2();
  Generator generator{4, 0};
  nn::add_lora(*model, {.rank = 4, .init = nn::LoraInit::random}, generator);
  const auto loss_with = [&](const nn::Batch& in, Options options) {
    EXPECT_TRUE(options.enable);
    return scale(model->loss(in), options.factor);
  };
  const auto loss = [&] {
    return checkpoint("all", loss_with, batch(), Options{.enable = true, .factor = 2});
  };
  expect_same_under_every_policy(*model, loss);
  for (const auto& [name, gradient] : run("nested", *model, loss).gradients) {
    EXPECT_FALSE(all_zero(gradient)) << name;
    EXPECT_NE(name.find("lora_"), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace reprise

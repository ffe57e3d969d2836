// The five fine-tuning stacks that broke where checkpointing met the rest (docs/architecture.md):
// each failure as a program of ours on the model of that story. With segments its gradients are
// those without, bit for bit; the callable runs once a forward and never in backward; the loss
// falls.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/elementwise.h"
#include "autograd/linear_cross_entropy.h"
#include "autograd/shape.h"
#include "autograd/tape.h"
#include "distributed/reducer.h"
#include "nn/lora.h"
#include "nn/models/glm.h"
#include "nn/models/llama.h"
#include "nn/models/model.h"
#include "nn/optimizer/adamw.h"
#include "nn/weights/json.h"

namespace reprise {
namespace {

using Ids = std::vector<std::int64_t>;
using Gradients = std::map<std::string, std::vector<float>>;
using Loss = std::function<Variable()>;
using Sweep = std::function<void(const Variable&)>;

std::unique_ptr<nn::Model> build(const std::string& config) {
  nn::JsonReader json = *nn::JsonReader::parse(config, "config.json");
  auto model = nn::build_model(json, {});
  EXPECT_TRUE(model.ok()) << model.status();
  Generator generator{3, 0};
  (*model)->initialize(generator);
  // Larger than usual, so that a few steps matter, also to an adapter under a frozen head.
  for (Parameter* parameter : (*model)->parameters()) {
    const Tensor value = parameter->write();
    for (std::int64_t i = 0; value.rank() > 1 && i < value.numel(); ++i) {
      value.data<float>()[i] *= 8;
    }
  }
  return *std::move(model);
}

const std::string kSizes = R"("hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 19,
    "max_position_embeddings": 16)";

nn::Batch batch() {
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(Ids{3, 7, 1, 0, 18, 5, 2, 9, 9, 4, 11, 6}, {2, 6});
  return batch;
}

Tensor pixels(const Shape& shape) {
  std::vector<float> values(static_cast<std::size_t>(shape.numel()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = std::sin(0.37f * static_cast<float>(i));
  }
  return Tensor::from(values, shape);
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

void sweep_alone(const Variable& loss) {
  backward(loss);
}

struct Pass {
  double loss = 0;
  Gradients gradients;
  TapeReport report;
};

// One forward and backward of `loss` under the policy.
Pass run(const char* policy, nn::Module& module, const Loss& loss,
         const Sweep& sweep = sweep_alone) {
  Tape tape;
  const Tape::Scope scope(tape, Policies::named(policy));
  Pass pass;
  {
    const Variable value = loss();
    pass.loss = static_cast<double>(value.tensor().item<float>());
    sweep(value);
  }
  pass.gradients = gradients_of(module);
  pass.report = tape.report();
  return pass;
}

void expect_same_under_every_policy(nn::Module& module, const Loss& loss,
                                    const Sweep& sweep = sweep_alone) {
  const Pass plain = run("keep-all", module, loss, sweep);
  EXPECT_EQ(plain.report.replayed_records, 0);
  EXPECT_FALSE(plain.gradients.empty());
  for (const char* policy : {"keep-products", "inputs-only", "nested"}) {
    const Pass segments = run(policy, module, loss, sweep);
    EXPECT_EQ(segments.loss, plain.loss) << policy;
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

// A few steps on the same batch, in segments.
void expect_the_loss_falls(nn::Module& module, const Loss& loss, const Sweep& sweep = sweep_alone) {
  nn::AdamW optimizer(module.trainable_parameters());
  std::vector<double> losses;
  for (int step = 0; step < 6; ++step) {
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("inputs-only"));
    const Variable value = loss();
    losses.push_back(static_cast<double>(value.tensor().item<float>()));
    sweep(value);
    optimizer.step(5e-3);
    optimizer.zero_gradients();
  }
  EXPECT_LT(losses.back(), losses.front() - 0.02);
  EXPECT_TRUE(std::ranges::all_of(losses, [](double x) { return std::isfinite(x); }));
}

// The calls of every forward; none is in backward.
struct Calls {
  int all = 0;
  void expect(int a_forward, int forwards) const { EXPECT_EQ(all, a_forward * forwards); }
};
constexpr int kComparisons = 4, kSteps = 6;

// Of what the last norm gave for batch(), [2, 6, C].
Variable next_token_loss(nn::LanguageModel& model, Variable x) {
  const Tensor targets = Tensor::from(Ids{7, 1, 0, 18, 5, -100, 9, 9, 4, 11, 6, -100}, {12});
  x = reshape(std::move(x), {12, x.size(2)});
  return linear_cross_entropy(std::move(x), model.head()->weight, targets);
}
nn::Rotation rotation_of(const nn::RopeConfig& rope, RopeStyle style) {
  return nn::rotation_of(rope, Tensor::from(Ids{0, 1, 2, 3, 4, 5}, {6}), cpu, {.style = style});
}

// XComposer: "CLIPEncoder has no attribute _gradient_checkpointing_func". No class of the tower or
// of the decoder knows of segments; the tower's input (pixels) needs no gradient, its weights do.
TEST(Stacks, XComposerTowerAndPartialLora) {
  const auto model = build(R"({"model_type": "internlmxcomposer2", "bias": false,
      "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
      "num_key_value_heads": 1, "vocab_size": 19, "max_position_embeddings": 64, "pad_token_id": 2,
      "plora_rank": 3, "img_size": 8, "vision_config": {"hidden_size": 8, "intermediate_size": 12,
      "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 8}})");
  nn::Batch in;  // text; text around the four tokens of an image
  in.ids = Tensor::from(Ids{3, 7, 1, 4, 18, 5, 2, 9, 0, 0, 0, 0, 11, 6}, {2, 7});
  in.labels = Tensor::from(Ids{3, 7, 1, 4, 18, 5, 2, 9, -100, -100, -100, -100, 11, 6}, {2, 7});
  in.image_tokens = Tensor::from(Ids{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0}, {2, 7});
  in.pixels = pixels({1, 3, 8, 8});
  Calls calls;
  const Loss loss = [&] {
    ++calls.all;
    return model->loss(in);
  };
  expect_same_under_every_policy(*model, loss);
  const Pass one = run("inputs-only", *model, loss);
  EXPECT_GE(one.report.segments, 2 + 3) << "every block of the tower and of the decoder";
  // They reach every part of it.
  for (const char* part : {"vit.", "vision_proj.", "Plora_", "wqkv.weight", "tok_embeddings"}) {
    EXPECT_TRUE(std::ranges::any_of(one.gradients, [&](const auto& entry) {
      return entry.first.find(part) != std::string::npos && !all_zero(entry.second);
    })) << part;
  }
  expect_the_loss_falls(*model, loss);
  calls.expect(1, kComparisons + 1 + kSteps);
}

// Axolotl: "functools.partial has no attribute __self__". The callable is never looked into.
TEST(Stacks, AxolotlPartialAroundABoundMethod) {
  const auto model = build(R"({"model_type": "qwen2", )" + kSizes + "}");
  auto& qwen2 = dynamic_cast<nn::Llama&>(*model);
  Calls calls;
  const Loss loss = [&] {
    const nn::Batch in = batch();
    const nn::Visible visible = nn::visible_of(in);
    const nn::Rotation rotation = rotation_of(qwen2.config().rope, RopeStyle::half);
    Variable x = qwen2.model.embed_tokens(in.ids);
    for (std::size_t i = 0; i < qwen2.model.layers.size(); ++i) {
      const nn::LlamaBlock& block = qwen2.model.layers[i];
      const auto counted = [&calls](const nn::LlamaBlock& self, Variable y, const auto&... rest) {
        ++calls.all;
        return self(std::move(y), rest...);
      };
      const auto partial = std::bind(counted, std::cref(block), std::placeholders::_1,
                                     std::cref(visible), std::cref(rotation));
      x = checkpoint("layers." + std::to_string(i), partial, std::move(x));
    }
    return next_token_loss(qwen2, qwen2.model.norm(std::move(x)));
  };
  expect_same_under_every_policy(*model, loss);
  expect_the_loss_falls(*model, loss);
  calls.expect(3, kComparisons + kSteps);
}

// LLaMA-Factory: the same behind forwards that another library has wrapped, function objects around
// bound callables, all weights of GLM-4 trained, gradients reduced in buckets while backward runs.
TEST(Stacks, LlamaFactoryWrappedForwardsWithReduction) {
  const auto model =
      build(R"({"model_type": "glm4", "head_dim": 8, "pad_token_id": 2, )" + kSizes + "}");
  auto& glm = dynamic_cast<nn::Glm&>(*model);
  const auto ranks = distributed::world_of_one();
  distributed::Reducer reducer(*ranks, model->trainable_parameters());
  using Forward = std::function<Variable(const nn::GlmBlock&, Variable, const nn::Visible&,
                                         const nn::Rotation&)>;
  const Forward bound = &nn::GlmBlock::operator();
  struct Wrapped {
    const Forward& inner;
    Calls& calls;
    Variable operator()(const nn::GlmBlock& block, Variable x, const nn::Visible& visible,
                        const nn::Rotation& rotation) const {
      ++calls.all;
      return inner(block, std::move(x), visible, rotation);
    }
  };
  Calls inner_calls, outer_calls;
  const Forward once = Wrapped{bound, inner_calls};
  const Wrapped twice{once, outer_calls};
  const Loss loss = [&] {
    const nn::Batch in = batch();
    const nn::Visible visible = nn::visible_of(in);
    const nn::Rotation rotation = rotation_of(glm.config().rope, RopeStyle::interleaved);
    Variable x = glm.model.embed_tokens(in.ids);
    for (std::size_t i = 0; i < glm.model.layers.size(); ++i) {
      x = checkpoint("layers." + std::to_string(i), twice, glm.model.layers[i], std::move(x),
                     visible, rotation);
    }
    return next_token_loss(glm, glm.model.norm(std::move(x)));
  };
  // It is the model's own loss.
  EXPECT_EQ(run("nested", *model, loss).gradients,
            run("nested", *model, [&] { return model->loss(batch()); }).gradients);
  const Sweep sweep = [&](const Variable& value) { reducer.backward(value); };
  expect_same_under_every_policy(*model, loss, sweep);
  expect_the_loss_falls(*model, loss, sweep);
  inner_calls.expect(3, 1 + kComparisons + kSteps);
  outer_calls.expect(3, 1 + kComparisons + kSteps);
}

// ms-swift: "Expected to mark a variable ready only once": LoRA under data parallelism, a frozen
// tower, segments on, the model used twice in a step. Each adapter weight becomes ready once, in
// the order that was announced; the tower records nothing that a sweep would need.
TEST(Stacks, MsSwiftLoraIsReadyOnce) {
  const auto model = build(R"({"model_type": "qwen2_vl", "vocab_size": 21, "hidden_size": 16,
      "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
      "num_key_value_heads": 1, "max_position_embeddings": 64, "image_token_id": 19,
      "video_token_id": 20, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]},
      "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2,
      "patch_size": 2, "hidden_size": 16}})");
  Generator generator{4, 0};
  nn::add_lora(
      *model,
      {.rank = 4, .init = nn::LoraInit::random, .targets = {.regex = ".*language_model.*(_proj)"}},
      generator);
  EXPECT_EQ(model->trainable_parameters().size(), 3u * 7 * 2);
  nn::Batch image;
  image.ids = Tensor::from(Ids{3, 7, 19, 19, 4, 11, 6}, {1, 7});
  image.labels = Tensor::from(Ids{3, 7, -100, -100, 4, 11, 6}, {1, 7});
  image.grids = Tensor::from(Ids{1, 2, 4}, {1, 3});
  image.pixels = pixels({8, 24});
  Calls calls;
  const auto called = [&](const nn::Batch& in) {
    ++calls.all;
    return model->loss(in);
  };
  const Loss loss = [&] { return add(called(image), called(batch())); };
  const auto ranks = distributed::world_of_one();
  distributed::Reducer reducer(*ranks, model->trainable_parameters());
  const Sweep sweep = [&](const Variable& value) {
    std::vector<Parameter*> announced, ready;
    BackwardOptions options;
    options.on_plan = [&](const Plan& plan) {
      for (const Ready& entry : plan.order) {
        announced.push_back(entry.parameter);
        EXPECT_EQ(entry.expected, 2) << "one contribution a use";
      }
    };
    options.on_ready = [&](Parameter& p) { ready.push_back(&p); };
    reducer.backward(value, options);
    EXPECT_EQ(ready, announced);
    EXPECT_EQ(ready.size(), model->trainable_parameters().size());
  };
  expect_same_under_every_policy(*model, loss, sweep);
  expect_the_loss_falls(*model, loss, sweep);
  calls.expect(2, kComparisons + kSteps);
}

struct Options {
  bool enable = false;
  double factor = 1;
};

// self-llm: "unexpected keyword argument 'enable'", and no gradient unless the inputs were made to
// need one. Options go through untouched; a frozen embedding feeds segments whose adapters train.
TEST(Stacks, SelfLlmOptionsAndFrozenInputs) {
  const auto model = build(R"({"model_type": "qwen", "hidden_size": 24, "intermediate_size": 80,
      "num_hidden_layers": 3, "num_attention_heads": 3, "kv_channels": 8, "vocab_size": 19,
      "seq_length": 16})");
  Generator generator{4, 0};
  // c_proj is that of the attention and that of the feed-forward.
  nn::add_lora(*model,
               {.rank = 4,
                .alpha = 16,
                .init = nn::LoraInit::random,
                .targets = {.names = {"c_attn", "c_proj", "w1", "w2"}}},
               generator);
  EXPECT_EQ(model->trainable_parameters().size(), 3u * 5 * 2);
  EXPECT_FALSE(model->find_parameter("transformer.wte.weight")->trainable());
  Calls calls;
  const auto loss_with = [&](const nn::Batch& in, Options options) {
    ++calls.all;
    EXPECT_TRUE(options.enable);
    return scale(model->loss(in), options.factor);
  };
  const Loss loss = [&] {
    return checkpoint("all", loss_with, batch(), Options{.enable = true, .factor = 2});
  };
  expect_same_under_every_policy(*model, loss);
  const Pass one = run("nested", *model, loss);
  EXPECT_EQ(one.gradients.size(), 3u * 5 * 2);
  for (const auto& [name, gradient] : one.gradients) {
    EXPECT_FALSE(all_zero(gradient)) << name;
    EXPECT_NE(name.find("lora_"), std::string::npos) << name;
  }
  expect_the_loss_falls(*model, loss);
  calls.expect(1, kComparisons + 1 + kSteps);
}

}  // namespace
}  // namespace reprise

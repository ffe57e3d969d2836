// InternLM2 beyond the agreement with the reference that the parity case shows: which file is one,
// defaults, the order of wqkv's rows, the rotary base of long rows.
#include "nn/models/internlm2.h"

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

using ::testing::HasSubstr;

const std::string kSizes = R"("hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 19,
    "max_position_embeddings": 8)";
const std::string kSmall = R"({"model_type": "internlm2", )" + kSizes;

absl::StatusOr<std::unique_ptr<Model>> build(const std::string& text, Place place = {}) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

InternLm2Config config_of(const std::string& text) {
  const auto model = build(text, {meta, DType::f32});
  EXPECT_TRUE(model.ok()) << model.status();
  return dynamic_cast<InternLm2&>(**model).config();
}

std::string problem(const std::string& text) {
  return std::string(build(text, {meta, DType::f32}).status().message());
}

// A value that is never the same twice, large enough that every path counts.
void fill(Model& model) {
  std::uint64_t at = 0;
  for (Parameter* parameter : model.parameters()) {
    const Tensor value = parameter->write();
    for (std::int64_t i = 0; i < value.numel(); ++i) {
      const float x = static_cast<float>(philox(3, ++at)[0] % 2001) / 1000 - 1;
      value.data<float>()[i] = value.rank() > 1 ? 0.4f * x : 1 + 0.2f * x;
    }
  }
}

std::unique_ptr<LanguageModel> filled(const std::string& text) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  auto model = build_language_model(json, {});
  EXPECT_TRUE(model.ok()) << model.status();
  fill(**model);
  return *std::move(model);
}

std::vector<float> logits(LanguageModel& model, const std::vector<std::int64_t>& ids) {
  Batch batch;
  batch.ids = Tensor::from(ids, {1, static_cast<std::int64_t>(ids.size())});
  return model.logits(batch).tensor().to_vector<float>();
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    largest = std::max(largest, static_cast<double>(std::abs(a[i] - b[i])));
  }
  return largest;
}

// The file's model_type is that of a relative as often as its own.
TEST(InternLm2, TheClassOfTheFileTellsTheFamilyApart) {
  for (const std::string& names : {
           R"("model_type": "internlm2")",
           R"("model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"])",
           R"("model_type": "internlm", "architectures": ["InternLM2ForCausalLM"])",
           R"("model_type": "internlm", "architectures": ["Other"], "auto_map":
              {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"})",
           R"("model_type": "internlm", "auto_map":
              {"AutoModel": "internlm/internlm2-7b--modeling_internlm2.InternLM2ForCausalLM"})",
           R"("architectures": ["InternLM2ForCausalLM"])",
       }) {
    const auto model = build("{" + names + ", " + kSizes + "}", {meta, DType::f32});
    ASSERT_TRUE(model.ok()) << names << model.status();
    EXPECT_EQ((*model)->type(), "internlm2") << names;
  }
  // The first InternLM is another model, of which only the type is left to go by.
  EXPECT_THAT(problem(R"({"model_type": "internlm", "architectures": ["InternLMForCausalLM"]})"),
              HasSubstr("model_type must be one of "));
  EXPECT_THAT(problem(R"({"model_type": "internlm", "auto_map": {"AutoModel": 3}})"),
              HasSubstr("auto_map.AutoModel must be a string, got 3"));
  // Nobody else's class counts against its type.
  const auto qwen2 = build(R"({"model_type": "qwen2", "num_hidden_layers": 0,
      "architectures": ["InternLM2ForCausalLM"]})",
                           {meta, DType::f32});
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_EQ((*qwen2)->type(), "qwen2");
}

// Biases are on and row 0 is padding unless the file says otherwise: the published ones all do.
TEST(InternLm2, DefaultsAreThoseOfTheClass) {
  const InternLm2Config config = config_of(R"({"model_type": "internlm2"})");
  EXPECT_TRUE(config.bias);
  EXPECT_EQ(config.padding, 0);
  EXPECT_EQ(config.vocabulary, 103168);
  EXPECT_EQ(config.inner, 11008);
  EXPECT_EQ(config.kv_heads, 32);
  EXPECT_EQ(config.epsilon, 1e-6);
  EXPECT_EQ(config.rope.theta, 10000);
  EXPECT_EQ(config.rope.scaling, RopeScaling::none);
  EXPECT_EQ(config.positions, 2048);
  EXPECT_FALSE(config.tied);
  EXPECT_EQ(config_of(R"({"model_type": "internlm2", "pad_token_id": null})").padding,
            std::nullopt);
  EXPECT_EQ(config_of(R"({"model_type": "internlm2", "num_attention_heads": 16})").kv_heads, 16);

  const auto biased = build(kSmall + "}");
  for (const char* path : {"attention.wqkv.bias", "attention.wo.bias"}) {
    EXPECT_NE((*biased)->find_parameter("model.layers.1." + std::string(path)), nullptr) << path;
  }
  for (const char* path : {"w1.bias", "w2.bias", "w3.bias"}) {
    EXPECT_EQ((*biased)->find_parameter("model.layers.1.feed_forward." + std::string(path)),
              nullptr);
  }
  const auto plain = build(kSmall + R"(, "bias": false})");
  EXPECT_EQ((*biased)->parameters().size(), (*plain)->parameters().size() + 4);
}

// q, k and v of each key/value head lie together: exchanging the two groups, with the columns of
// wo that read them, is the same model; exchanging the thirds of a layout Q, K, V is not.
TEST(InternLm2, RowsOfWqkvAreGroupedByKeyValueHead) {
  const std::vector<std::int64_t> ids{3, 1, 4, 1, 5, 9};
  const auto model = filled(kSmall + "}");
  const auto before = logits(*model, ids);
  constexpr std::int64_t C = 24, D = 4, G = 3, kGroup = (G + 2) * D;
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    const Tensor w = model->find_parameter(layer + "attention.wqkv.weight")->write();
    const Tensor b = model->find_parameter(layer + "attention.wqkv.bias")->write();
    const Tensor o = model->find_parameter(layer + "attention.wo.weight")->write();
    ASSERT_EQ(w.shape(), (Shape{2 * kGroup, C}));
    std::swap_ranges(w.data<float>(), w.data<float>() + kGroup * C, w.data<float>() + kGroup * C);
    std::swap_ranges(b.data<float>(), b.data<float>() + kGroup, b.data<float>() + kGroup);
    for (std::int64_t row = 0; row < C; ++row) {
      float* const at = o.data<float>() + row * C;
      std::swap_ranges(at, at + G * D, at + G * D);
    }
  }
  EXPECT_LT(largest_difference(logits(*model, ids), before), 1e-5);
  // Query heads 0 and 1 of the first group, with their columns.
  const Tensor w = model->find_parameter("model.layers.0.attention.wqkv.weight")->write();
  const Tensor b = model->find_parameter("model.layers.0.attention.wqkv.bias")->write();
  const Tensor o = model->find_parameter("model.layers.0.attention.wo.weight")->write();
  std::swap_ranges(w.data<float>(), w.data<float>() + D * C, w.data<float>() + D * C);
  std::swap_ranges(b.data<float>(), b.data<float>() + D, b.data<float>() + D);
  for (std::int64_t row = 0; row < C; ++row) {
    float* const at = o.data<float>() + row * C;
    std::swap_ranges(at, at + D, at + D);
  }
  EXPECT_LT(largest_difference(logits(*model, ids), before), 1e-5);
  // The last query head and the key of a group cannot be exchanged.
  const Tensor k = w.slice(0, G * D, (G + 1) * D);
  std::swap_ranges(k.data<float>() - D * C, k.data<float>(), k.data<float>());
  EXPECT_GT(largest_difference(logits(*model, ids), before), 1e-3);
}

// silu(w1 x) (w3 x): a w3 of zeros silences the feed-forward for good, a w1 of zeros too, but only
// of w3 is the product linear.
TEST(InternLm2, W1IsTheGate) {
  const std::vector<std::int64_t> ids{3, 1, 4, 1, 5, 9};
  const auto model = filled(kSmall + "}");
  const auto scale = [&](const char* name, float factor) {
    const Tensor value =
        model->find_parameter("model.layers.0.feed_forward." + std::string(name) + ".weight")
            ->write();
    for (std::int64_t i = 0; i < value.numel(); ++i) {
      value.data<float>()[i] *= factor;
    }
  };
  const auto before = logits(*model, ids);
  scale("w3", 2);
  scale("w2", 0.5f);
  EXPECT_LT(largest_difference(logits(*model, ids), before), 1e-5);
  scale("w3", 0.5f);
  scale("w1", 2);
  EXPECT_GT(largest_difference(logits(*model, ids), before), 1e-3);
}

TEST(InternLm2, ThePaddingRowHasNoGradient) {
  for (const std::string& padding : {R"(, "pad_token_id": 2})", R"(, "pad_token_id": null})"}) {
    const auto model = filled(kSmall + padding);
    Batch batch;
    batch.ids = batch.labels = Tensor::from(std::vector<std::int64_t>{3, 2, 4, 2, 5, 9}, {1, 6});
    backward(model->loss(batch));
    const auto gradient = model->embedding_table().gradient().to_vector<float>();
    const bool zero = std::all_of(gradient.begin() + 2 * 24, gradient.begin() + 3 * 24,
                                  [](float g) { return g == 0; });
    EXPECT_EQ(zero, padding.find("null") == padding.npos);
  }
}

// Up to max_position_embeddings = 8 the base is as in the file; longer rows have a larger one, and
// rows after them, of any length, their own again.
TEST(InternLm2, TheRotaryBaseOfLongRows) {
  const auto plain = filled(kSmall + "}");
  const auto dynamic = filled(kSmall + R"(, "rope_scaling": {"type": "dynamic", "factor": 2.0}})");
  const std::vector<std::int64_t> inside{3, 1, 4, 1, 5, 9, 2, 6};
  const std::vector<std::int64_t> longer{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8};
  const auto before = logits(*dynamic, inside);
  EXPECT_EQ(before, logits(*plain, inside));
  EXPECT_GT(largest_difference(logits(*dynamic, longer), logits(*plain, longer)), 1e-4);
  EXPECT_EQ(logits(*dynamic, inside), before);
  // theta (2 * 12 / 8 - 1)^(D / (D - 2)), D = 4
  const auto larger = filled(kSmall + R"(, "rope_theta": 40000.0})");
  EXPECT_LT(largest_difference(logits(*dynamic, longer), logits(*larger, longer)), 1e-5);
}

TEST(InternLm2, ATiedHead) {
  const auto model = build(kSmall + R"(, "tie_word_embeddings": true})");
  EXPECT_EQ((*model)->head(), nullptr);
  EXPECT_EQ((*model)->find_parameter("output.weight"), nullptr);
  EXPECT_TRUE((*model)->is_buffer("output.weight"));
  EXPECT_FALSE((*build(kSmall + "}"))->is_buffer("output.weight"));
}

TEST(InternLm2, ErrorsOfTheConfig) {
  EXPECT_EQ(problem(R"({"model_type": "internlm2", "num_attention_heads": 30})"),
            "c.json: num_attention_heads must divide hidden_size = 4096, got 30");
  EXPECT_EQ(problem(R"({"model_type": "internlm2", "num_key_value_heads": 5})"),
            "c.json: num_key_value_heads must divide num_attention_heads = 32, got 5");
  EXPECT_EQ(problem(R"({"model_type": "internlm2", "bias": 1})"),
            "c.json: bias must be true or false, got 1");
  EXPECT_EQ(problem(R"({"model_type": "internlm2", "pad_token_id": 103168})"),
            "c.json: pad_token_id must be from -103168 to below vocab_size = 103168, got 103168");
}

TEST(InternLm2, WhatIsWrittenBuildsTheSameModel) {
  for (const std::string& text :
       {kSmall + "}",
        kSmall + R"(, "bias": false, "pad_token_id": null, "tie_word_embeddings": true,
          "hidden_act": "gelu", "rope_scaling": {"type": "dynamic", "factor": 3.0}})"}) {
    const auto first = build(text);
    (*first)->set_source("");
    const std::string written = (*first)->config_json();
    const auto second = build(written);
    ASSERT_TRUE(second.ok()) << second.status();
    (*second)->set_source("");
    EXPECT_EQ((*second)->config_json(), written);
    const InternLm2Config& a = dynamic_cast<InternLm2&>(**first).config();
    const InternLm2Config& b = dynamic_cast<InternLm2&>(**second).config();
    EXPECT_EQ(a.bias, b.bias);
    EXPECT_EQ(a.padding, b.padding);
    EXPECT_EQ(a.activation, b.activation);
    EXPECT_EQ((*first)->parameters().size(), (*second)->parameters().size());
    EXPECT_EQ(rope_frequencies(a.rope, 100), rope_frequencies(b.rope, 100));
  }
}

}  // namespace
}  // namespace reprise::nn

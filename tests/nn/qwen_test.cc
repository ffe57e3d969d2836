// The first Qwen beyond the agreement with the reference that the parity cases show: old spellings,
// defaults, the gate, and what it does about long rows in evaluation.
#include "nn/models/qwen.h"

#include <cmath>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/philox.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t kVocabulary = 19, kTrained = 4;

// Without the measures against long rows; `more`: keys besides.
std::string small(const std::string& more, int layers = 2) {
  return fmt::format(R"({{"model_type": "qwen", "hidden_size": 24, "intermediate_size": 40,
      "num_hidden_layers": {}, "num_attention_heads": 3, "kv_channels": 8, "vocab_size": 19,
      "seq_length": {}, "max_position_embeddings": 64{}}})",
                     layers, kTrained, more);
}
const std::string kNeither = R"(, "use_dynamic_ntk": false, "use_logn_attn": false)";
const std::string kNtk = R"(, "use_logn_attn": false)";
const std::string kLog = R"(, "use_dynamic_ntk": false)";

absl::StatusOr<std::unique_ptr<Model>> build(const std::string& text, Place place = {}) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

QwenConfig config_of(const std::string& text) {
  const auto model = build(text, {meta, DType::f32});
  EXPECT_TRUE(model.ok()) << model.status();
  return dynamic_cast<Qwen&>(**model).config();
}

std::string problem(const std::string& text) {
  return std::string(build(text, {meta, DType::f32}).status().message());
}

std::unique_ptr<LanguageModel> filled(const std::string& text) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  auto model = build_language_model(json, {});
  EXPECT_TRUE(model.ok()) << model.status();
  std::uint64_t at = 0;
  for (Parameter* parameter : (*model)->parameters()) {
    const Tensor value = parameter->write();
    for (std::int64_t i = 0; i < value.numel(); ++i) {
      const float x = static_cast<float>(philox(3, ++at)[0] % 2001) / 1000 - 1;
      value.data<float>()[i] = value.rank() > 1 ? 0.4f * x : 1 + 0.2f * x;
    }
  }
  return *std::move(model);
}

Batch batch_of(const Ids& ids) {
  Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {1, static_cast<std::int64_t>(ids.size())});
  return batch;
}

std::vector<float> logits(LanguageModel& model, const Ids& ids) {
  return model.logits(batch_of(ids)).tensor().to_vector<float>();
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b,
                          std::size_t from = 0, std::size_t to = SIZE_MAX) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t i = from; i < std::min({a.size(), b.size(), to}); ++i) {
    largest = std::max(largest, static_cast<double>(std::abs(a[i] - b[i])));
  }
  return largest;
}

const Ids kInside = {3, 1, 4, 1};
const Ids kLonger = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5};

TEST(Qwen, DefaultsAreThoseOfTheClass) {
  const QwenConfig config = config_of(R"({"model_type": "qwen", "seq_length": 8192})");
  EXPECT_EQ(config.vocabulary, 151936);
  EXPECT_EQ(config.width, 4096);
  EXPECT_EQ(config.inner, 11008);  // half of 22016: the two branches are counted together
  EXPECT_EQ(config.heads, 32);
  EXPECT_EQ(config.head_size, 128);
  EXPECT_EQ(config.rotated, 128);
  EXPECT_EQ(config.positions, 8192);
  EXPECT_EQ(config.epsilon, 1e-6);
  EXPECT_TRUE(config.dynamic_ntk && config.log_attention && config.scale_attention);
  EXPECT_FALSE(config.bias || config.tied);
  EXPECT_EQ(config.embedding_dropout, 0);
  EXPECT_EQ(config.attention_dropout, 0);
}

TEST(Qwen, OlderSpelling) {
  const QwenConfig old = config_of(R"({"model_type": "qwen", "n_embd": 48, "n_layer": 3,
      "n_head": 6, "ffn_hidden_size": 70, "kv_channels": 8, "n_positions": 77, "seq_length": 16,
      "embd_pdrop": 0.25, "attn_pdrop": 0.5})");
  EXPECT_EQ(old.width, 48);
  EXPECT_EQ(old.layers, 3);
  EXPECT_EQ(old.heads, 6);
  EXPECT_EQ(old.inner, 35);
  EXPECT_EQ(old.positions, 77);
  EXPECT_EQ(old.trained_length, 16);
  EXPECT_EQ(old.embedding_dropout, 0.25);
  EXPECT_EQ(old.attention_dropout, 0.5);
  // Where a file has both, today's counts.
  EXPECT_EQ(config_of(R"({"model_type": "qwen", "n_layer": 3, "num_hidden_layers": 2,
                          "seq_length": 16})")
                .layers,
            2);
}

TEST(Qwen, OnlyTheFusedProjectionHasABias) {
  const auto model = build(small(kNeither));
  EXPECT_EQ((*model)->find_parameter("transformer.h.0.attn.c_attn.bias")->shape(), Shape{72});
  for (const char* path : {"attn.c_proj.bias", "mlp.w1.bias", "mlp.w2.bias", "mlp.c_proj.bias"}) {
    EXPECT_EQ((*model)->find_parameter("transformer.h.0." + std::string(path)), nullptr) << path;
  }
  EXPECT_EQ((*model)->find_parameter("transformer.h.0.mlp.w2.weight")->shape(), (Shape{20, 24}));
  const auto biased = build(small(kNeither + R"(, "no_bias": false)"));
  EXPECT_EQ((*biased)->parameters().size(), (*model)->parameters().size() + 2 * 4);
}

// w1(x) silu(w2(x)): the product is linear in w1 and not in w2, unlike InternLM2's.
TEST(Qwen, W2IsTheGate) {
  const auto model = filled(small(kNeither, 1));
  const auto scale = [&](const char* name, float factor) {
    const Tensor value =
        model->find_parameter("transformer.h.0.mlp." + std::string(name) + ".weight")->write();
    for (std::int64_t i = 0; i < value.numel(); ++i) {
      value.data<float>()[i] *= factor;
    }
  };
  const auto before = logits(*model, kInside);
  scale("w1", 2);
  scale("c_proj", 0.5f);
  EXPECT_LT(largest_difference(logits(*model, kInside), before), 1e-5);
  scale("w1", 0.5f);
  scale("w2", 2);
  EXPECT_GT(largest_difference(logits(*model, kInside), before), 1e-3);
}

// alpha = 2^ceil(log2(T / 4) + 1) - 1, theta' = theta alpha^(8 / 6).
TEST(Qwen, LongRowsHaveALargerRotaryBase) {
  const auto dynamic = filled(small(kNtk));
  EXPECT_EQ(logits(*dynamic, kInside), logits(*filled(small(kNeither)), kInside));
  for (const auto& [T, alpha] :
       std::vector<std::pair<std::ptrdiff_t, double>>{{5, 3}, {8, 3}, {9, 7}, {11, 7}}) {
    const Ids ids(kLonger.begin(), kLonger.begin() + T);
    const auto explicitly = filled(small(
        kNeither + fmt::format(R"(, "rotary_emb_base": {})", 10000 * std::pow(alpha, 8.0 / 6))));
    EXPECT_LT(largest_difference(logits(*dynamic, ids), logits(*explicitly, ids)), 1e-5) << T;
    EXPECT_GT(largest_difference(logits(*dynamic, ids), logits(*filled(small(kNeither)), ids)),
              1e-4)
        << T;
  }
}

// The query at position p, counted from 1, is multiplied by log(p) / log(4) where p > 4: there the
// logits of one layer are those of a model whose rows of q are multiplied.
TEST(Qwen, LateQueriesAreLarger) {
  const auto model = filled(small(kLog, 1)), plain = filled(small(kNeither, 1));
  EXPECT_EQ(logits(*model, kInside), logits(*plain, kInside));
  const auto found = logits(*model, kLonger), without = logits(*plain, kLonger);
  for (std::size_t p = 1; p <= kLonger.size(); ++p) {
    const std::size_t from = (p - 1) * kVocabulary, to = p * kVocabulary;
    if (p <= kTrained) {
      EXPECT_LT(largest_difference(found, without, from, to), 1e-5) << p;
      continue;
    }
    const auto scaled = filled(small(kNeither, 1));
    const float factor =
        static_cast<float>(std::log(static_cast<double>(p)) / std::log(double{kTrained}));
    for (const char* name : {"weight", "bias"}) {
      Parameter& c_attn =
          *scaled->find_parameter("transformer.h.0.attn.c_attn." + std::string(name));
      const Tensor q = c_attn.write().slice(0, 0, 24);
      for (std::int64_t i = 0; i < q.numel(); ++i) {
        q.data<float>()[i] *= factor;
      }
    }
    EXPECT_LT(largest_difference(found, logits(*scaled, kLonger), from, to), 1e-5) << p;
    EXPECT_GT(largest_difference(found, without, from, to), 1e-4) << p;
  }
}

TEST(Qwen, InTrainingNeitherIsDone) {
  const auto model = filled(small("")), plain = filled(small(kNeither));
  const auto evaluated = logits(*model, kLonger);
  EXPECT_GT(largest_difference(evaluated, logits(*plain, kLonger)), 1e-4);
  Generator generator{1, 0};
  model->train(generator);
  EXPECT_EQ(logits(*model, kLonger), logits(*plain, kLonger));
  model->evaluate();
  EXPECT_EQ(logits(*model, kLonger), evaluated);
}

// Dropout has the places that the reference gives it, and no others.
TEST(Qwen, DropoutOfEmbeddingAndAttention) {
  for (const char* key : {"emb_dropout_prob", "attn_dropout_prob"}) {
    const auto model = filled(small(fmt::format(R"(, "{}": 0.5)", key)));
    const auto still = logits(*model, kInside);
    Generator generator{1, 0};
    model->train(generator);
    EXPECT_GT(largest_difference(logits(*model, kInside), still), 1e-3) << key;
    EXPECT_GT(generator.next_offset, 0u);
  }
}

TEST(Qwen, ErrorsOfTheConfig) {
  EXPECT_EQ(problem(R"({"model_type": "qwen"})"), "c.json: seq_length is missing");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "num_attention_heads": 30})"),
            "c.json: kv_channels times num_attention_heads = 30 must be hidden_size = 4096, got "
            "128");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "n_head": 4, "n_embd": 24})"),
            "c.json: kv_channels times n_head = 4 must be n_embd = 24, got 128");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 1})"),
            "c.json: seq_length must be at least 2, got 1");
  for (const auto& [share, rotated] :
       {std::pair("0.0", 0), std::pair("1.5", -1), std::pair("0.01", 1), std::pair("-1.0", -1)}) {
    EXPECT_EQ(problem(fmt::format(R"({{"model_type": "qwen", "seq_length": 8, "rotary_pct": {}}})",
                                  share)),
              fmt::format("c.json: rotary_pct must leave an even number of rotated elements from 2 "
                          "to kv_channels = 128, got {}",
                          rotated));
  }
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "rotary_emb_base": 1.0})"),
            "c.json: rotary_emb_base must be above 1 and at most 1e30, got 1");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "intermediate_size": 1})"),
            "c.json: intermediate_size must be at least 2, got 1");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "ffn_hidden_size": 0})"),
            "c.json: ffn_hidden_size must be at least 2, got 0");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "attn_pdrop": 1.0})"),
            "c.json: attn_pdrop must be from 0 to below 1, got 1");
  EXPECT_EQ(problem(R"({"model_type": "qwen", "seq_length": 8, "rotary_pct": 0.016})"),
            "c.json: kv_channels must have more than 2 rotated elements with use_dynamic_ntk");
}

TEST(Qwen, WhatIsWrittenBuildsTheSameModel) {
  for (const std::string& text :
       {small(""), small(kNeither + R"(, "no_bias": false, "tie_word_embeddings": true,
           "rotary_pct": 0.5, "attn_dropout_prob": 0.25, "scale_attn_weights": false)")}) {
    const auto first = build(text);
    ASSERT_TRUE(first.ok()) << first.status();
    (*first)->set_source("");
    const std::string written = (*first)->config_json();
    const auto second = build(written);
    ASSERT_TRUE(second.ok()) << second.status();
    (*second)->set_source("");
    EXPECT_EQ((*second)->config_json(), written);
    const QwenConfig& a = dynamic_cast<Qwen&>(**first).config();
    const QwenConfig& b = dynamic_cast<Qwen&>(**second).config();
    EXPECT_EQ(a.rotated, b.rotated);
    EXPECT_EQ(a.inner, b.inner);
    EXPECT_EQ(a.bias, b.bias);
    EXPECT_EQ(a.tied, b.tied);
    EXPECT_EQ(a.trained_length, b.trained_length);
    EXPECT_EQ(a.scale_attention, b.scale_attention);
    EXPECT_EQ((*first)->parameters().size(), (*second)->parameters().size());
  }
}

}  // namespace
}  // namespace reprise::nn

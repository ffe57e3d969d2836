// What the models compute, beyond the agreement with the reference that the parity cases show.
#include <cmath>
#include <cstring>

#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "nn/models/gpt2.h"
#include "nn/models/llama.h"
#include "nn/weights/json.h"
#include "tests/error_of.h"
#include "tests/nn/predicted_peak.h"

namespace reprise::nn {
namespace {

using testing::error_of;
using testing::expect_predicted_peak;

using Ids = std::vector<std::int64_t>;

const std::string kGpt2 = R"({"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2,
    "vocab_size": 19, "n_positions": 16)";
const std::string kLlama = R"({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 19,
    "max_position_embeddings": 16)";
const std::string kQwen2 = R"({"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 19,
    "max_position_embeddings": 16)";

const std::string kQwen3 = R"({"model_type": "qwen3", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 19,
    "head_dim": 10, "max_position_embeddings": 16)";
const std::string kGlm4 = R"({"model_type": "glm4", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 19,
    "head_dim": 8, "max_position_embeddings": 16, "pad_token_id": null)";
const std::string kGlm = R"({"model_type": "glm", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 19,
    "head_dim": 8, "max_position_embeddings": 16, "pad_token_id": null)";

const std::string kInternLm2 = R"({"model_type": "internlm2", "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 19, "max_position_embeddings": 16,
    "pad_token_id": null)";
const std::string kQwen = R"({"model_type": "qwen", "hidden_size": 24, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 3, "kv_channels": 8, "vocab_size": 19,
    "max_position_embeddings": 16, "seq_length": 16)";

std::unique_ptr<LanguageModel> build(const std::string& text, Place place = {}) {
  JsonReader json = *JsonReader::parse(text + "}", "c.json");
  auto model = build_language_model(json, place);
  EXPECT_TRUE(model.ok()) << model.status();
  Generator generator{11, 0};
  (*model)->initialize(generator);
  if (place.device == cpu && place.dtype == DType::f32) {
    // Larger than usual, biases too, so that every path counts.
    for (const NamedParameter& entry : (*model)->named_parameters()) {
      const Tensor value = entry.parameter->write();
      for (std::int64_t i = 0; i < value.numel(); ++i) {
        float& x = value.data<float>()[i];
        if (value.rank() > 1) {
          x *= entry.parameter->shape()[0] == 19 ? 25 : 10;
        } else {
          x += 0.1f * static_cast<float>(i % 5 - 2);
        }
      }
    }
  }
  return *std::move(model);
}

Batch batch_of(const Ids& ids, std::int64_t rows = 1) {
  const Shape shape{rows, static_cast<std::int64_t>(ids.size()) / rows};
  Batch batch;
  batch.ids = Tensor::from(ids, shape);
  batch.labels = Tensor::from(ids, shape);
  return batch;
}

std::vector<float> logits(LanguageModel& model, const Batch& batch) {
  return model.logits(batch).tensor().to_vector<float>();
}

double loss(Model& model, const Batch& batch, const LossOptions& options = {}) {
  return static_cast<double>(model.loss(batch, options).tensor().item<float>());
}

// Mean cross-entropy by its formula.
double loss_of(const std::vector<float>& logits, const Ids& targets, double items = 0) {
  const std::size_t V = logits.size() / targets.size();
  double sum = 0, count = 0;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    if (targets[t] < 0) {
      continue;
    }
    double total = 0;
    for (std::size_t v = 0; v < V; ++v) {
      total += std::exp(static_cast<double>(logits[t * V + v]));
    }
    sum +=
        std::log(total) - static_cast<double>(logits[t * V + static_cast<std::size_t>(targets[t])]);
    ++count;
  }
  return sum / (items > 0 ? items : count);
}

const Ids kIds = {3, 1, 4, 1, 5, 9, 2, 6};

TEST(Models, LossIsOverTheNextTokens) {
  for (const std::string& text :
       {kGpt2, kLlama, kQwen2, kQwen3, kGlm4, kGlm, kInternLm2, kQwen,
        kLlama + R"(, "tie_word_embeddings": true)", kGpt2 + R"(, "tie_word_embeddings": false)"}) {
    const auto model = build(text);
    Batch batch = batch_of(kIds);
    const auto out = logits(*model, batch);
    ASSERT_EQ(out.size(), kIds.size() * 19);
    EXPECT_NEAR(loss(*model, batch), loss_of(out, {1, 4, 1, 5, 9, 2, 6, -100}), 1e-5);
    batch.labels = Tensor::from(Ids{3, -100, 4, 1, -100, 9, 2, 6}, Shape{1, 8});
    EXPECT_NEAR(loss(*model, batch), loss_of(out, {-100, 4, 1, -100, 9, 2, 6, -100}), 1e-5);
    EXPECT_NEAR(loss(*model, batch, {.items = 20}),
                loss_of(out, {-100, 4, 1, -100, 9, 2, 6, -100}, 20), 1e-5);
  }
}

TEST(Models, ATokenSeesOnlyWhatIsBeforeIt) {
  for (const std::string& text : {kGpt2, kLlama, kQwen2, kQwen3, kGlm4, kGlm, kInternLm2, kQwen}) {
    const auto model = build(text);
    Ids changed = kIds;
    changed[5] = 7;
    const auto a = logits(*model, batch_of(kIds)), b = logits(*model, batch_of(changed));
    EXPECT_TRUE(std::equal(a.begin(), a.begin() + 5 * 19, b.begin()));
    EXPECT_FALSE(std::equal(a.begin() + 7 * 19, a.end(), b.begin() + 7 * 19));
  }
}

TEST(Models, PaddingIsNotSeen) {
  for (const std::string& text : {kGpt2, kLlama, kQwen2, kQwen3, kGlm4, kGlm, kInternLm2, kQwen}) {
    const auto model = build(text);
    // Padded on the left, so that causality does not hide it; positions as without the padding.
    Batch padded = batch_of({8, 8, 3, 1, 4, 1, 5, 9});
    padded.mask = Tensor::from(Ids{0, 0, 1, 1, 1, 1, 1, 1}, Shape{1, 8});
    padded.positions = Tensor::from(Ids{0, 0, 0, 1, 2, 3, 4, 5}, Shape{1, 8});
    const auto a = logits(*model, padded), b = logits(*model, batch_of({3, 1, 4, 1, 5, 9}));
    for (std::size_t i = 0; i < b.size(); ++i) {
      EXPECT_NEAR(a[2 * 19 + i], b[i], 1e-4);
    }
    padded.mask = {};
    EXPECT_GT(std::abs(logits(*model, padded)[5 * 19] - b[3 * 19]), 1e-4);
  }
}

TEST(Models, PackedTextsSeeThemselvesOnly) {
  for (const std::string& text : {kGpt2, kLlama, kQwen2, kQwen3, kGlm4, kGlm, kInternLm2, kQwen}) {
    const auto model = build(text);
    Batch packed = batch_of(kIds);
    packed.starts = {{0, 3}};
    const auto a = logits(*model, packed);
    const auto first = logits(*model, batch_of({3, 1, 4}));
    const auto second = logits(*model, batch_of({1, 5, 9, 2, 6}));
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(a[i], i < first.size() ? first[i] : second[i - first.size()], 1e-4);
    }
    EXPECT_NEAR(loss(*model, packed), loss_of(a, {1, 4, -100, 5, 9, 2, 6, -100}), 1e-5);
  }
}

TEST(Models, WindowsLimitWhatQwen2Sees) {
  // Two layers of window 2: a token reaches two back.
  const auto narrow = build(kQwen2 + R"(, "use_sliding_window": true, "sliding_window": 2,
                                         "max_window_layers": 0)");
  const auto upper = build(kQwen2 + R"(, "use_sliding_window": true, "sliding_window": 2,
                                         "max_window_layers": 1)");
  const auto off = build(kQwen2 + R"(, "use_sliding_window": false, "sliding_window": 2,
                                       "max_window_layers": 0)");
  Ids changed = kIds;
  changed[0] = 7;
  const auto same_after = [&](LanguageModel& model, std::size_t t) {
    const auto a = logits(model, batch_of(kIds)), b = logits(model, batch_of(changed));
    return std::equal(a.begin() + static_cast<std::ptrdiff_t>(t * 19), a.end(),
                      b.begin() + static_cast<std::ptrdiff_t>(t * 19));
  };
  EXPECT_TRUE(same_after(*narrow, 3));
  EXPECT_FALSE(same_after(*narrow, 2));
  EXPECT_FALSE(same_after(*upper, 7));
  EXPECT_FALSE(same_after(*off, 7));
}

TEST(Models, PositionsMatter) {
  const auto model = build(kLlama);
  Batch shifted = batch_of(kIds);
  shifted.positions = Tensor::from(Ids{5, 6, 7, 8, 9, 10, 11, 12}, Shape{1, 8});
  const auto a = logits(*model, batch_of(kIds)), b = logits(*model, shifted);
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(a[i], b[i], 1e-4);  // rotary positions are relative
  }
  shifted.positions = Tensor::from(Ids{0, 2, 4, 6, 8, 10, 12, 14}, Shape{1, 8});
  EXPECT_GT(std::abs(logits(*model, shifted)[7 * 19] - a[7 * 19]), 1e-4);
}

std::vector<std::pair<std::string, std::vector<float>>> gradients(Model& model, const Batch& batch,
                                                                  const Policies& policies = {}) {
  Tape tape;
  Tape::Scope scope(tape, policies);
  for (Parameter* parameter : model.parameters()) {
    parameter->zero_gradient();
  }
  backward(model.loss(batch));
  std::vector<std::pair<std::string, std::vector<float>>> result;
  for (const NamedParameter& entry : model.named_parameters()) {
    if (entry.parameter->has_gradient()) {
      result.emplace_back(entry.path, entry.parameter->gradient().to_vector<float>());
    }
  }
  return result;
}

// One direction through all parameters at once, against central differences.
void expect_gradients(Model& model, const Batch& batch) {
  const auto found = gradients(model, batch);
  ASSERT_EQ(found.size(), model.parameters().size());
  for (const auto& [path, gradient] : found) {
    Parameter& parameter = *model.find_parameter(path);
    const std::vector<float> before = parameter.value().to_vector<float>();
    double norm = 0;
    for (const float g : gradient) {
      norm += static_cast<double>(g) * static_cast<double>(g);
    }
    norm = std::sqrt(norm);
    if (norm < 1e-6) {
      continue;  // a bias of keys: softmax does not see it
    }
    const double h = 3e-3;
    const auto at = [&](double step) {
      const Tensor value = parameter.write();
      for (std::size_t i = 0; i < before.size(); ++i) {
        value.data<float>()[i] =
            before[i] + static_cast<float>(step * static_cast<double>(gradient[i]) / norm);
      }
      return loss(model, batch);
    };
    const double slope = (at(h) - at(-h)) / (2 * h);
    at(0);
    EXPECT_NEAR(slope, norm, 0.02 * norm + 2e-3) << path;
  }
}

TEST(Models, GradientsOfEveryOptionAgreeWithDifferences) {
  for (const std::string& text :
       {kGpt2 + R"(, "n_inner": 30, "tie_word_embeddings": false, "activation_function": "gelu",
                   "scale_attn_by_inverse_layer_idx": true)",
        kGpt2 + R"(, "scale_attn_weights": false)",
        kLlama + R"(, "head_dim": 10, "attention_bias": true, "mlp_bias": true)",
        kLlama + R"(, "hidden_act": "gelu_new", "rope_scaling": {"type": "yarn", "factor": 4},
                    "partial_rotary_factor": 0.67, "tie_word_embeddings": true)",
        kQwen2 + R"(, "use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1,
                    "rope_scaling": {"type": "dynamic", "factor": 2})",
        kQwen3 + R"(, "attention_bias": true, "tie_word_embeddings": true)",
        kGlm4 + R"(, "attention_bias": false, "partial_rotary_factor": 0.25)",
        kGlm + R"(, "hidden_act": "gelu", "tie_word_embeddings": true)",
        kInternLm2 + R"(, "hidden_act": "gelu", "tie_word_embeddings": true)",
        kInternLm2 + R"(, "bias": false, "max_position_embeddings": 4,
                        "rope_scaling": {"type": "dynamic", "factor": 3})",
        kQwen + R"(, "no_bias": false, "rotary_pct": 0.75, "tie_word_embeddings": true)",
        kQwen + R"(, "seq_length": 3, "scale_attn_weights": false)"}) {
    SCOPED_TRACE(text);
    const auto model = build(text);
    Batch batch = batch_of({3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 0, 0}, 2);
    batch.mask = Tensor::from(Ids{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0}, Shape{2, 7});
    batch.labels = Tensor::from(Ids{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, -100, -100}, Shape{2, 7});
    expect_gradients(*model, batch);
  }
}

TEST(Models, ThePaddingRowHasNoGradient) {
  const auto model = build(kLlama + R"(, "pad_token_id": 1)");
  EXPECT_EQ(model->embedding_table().value().to_vector<float>()[24], 0);  // from the start
  for (const auto& [path, gradient] : gradients(*model, batch_of(kIds))) {
    if (path == "model.embed_tokens.weight") {
      for (std::size_t i = 0; i < 24; ++i) {
        EXPECT_EQ(gradient[24 + i], 0);
        EXPECT_NE(gradient[3 * 24 + i], 0);
      }
    }
  }
}

TEST(Models, PoliciesAreBitwiseEqualWithDropout) {
  const auto model = build(kGpt2);
  const auto llama = build(kLlama + R"(, "attention_dropout": 0.3)");
  const Batch batch = batch_of(kIds);
  const auto qwen = build(kQwen + R"(, "attn_dropout_prob": 0.3, "emb_dropout_prob": 0.1)");
  for (LanguageModel* each : {model.get(), llama.get(), qwen.get()}) {
    const auto still = gradients(*each, batch);
    Generator generator;
    each->train(generator);
    const auto run = [&](const std::string& policy) {
      generator = {5, 100};
      return gradients(*each, batch, Policies::named(policy));
    };
    const auto expected = run("keep-all");
    EXPECT_NE(expected, still);
    EXPECT_GT(generator.next_offset, 100u);
    for (const std::string& name : Policies::names()) {
      EXPECT_EQ(run(name), expected) << name;
    }
    each->evaluate();
    EXPECT_EQ(gradients(*each, batch), still);
  }
}

TEST(Models, ADryRunPredictsThePeak) {
  for (const std::string& text : {kGpt2, kLlama, kQwen2, kQwen3, kGlm4, kGlm, kInternLm2, kQwen}) {
    const auto real = build(text), shapes = build(text, {meta, DType::f32});
    const Batch batch = batch_of(kIds, 2);
    expect_predicted_peak(*real, *shapes, batch);
  }
}

TEST(Models, InitialValuesFollowThePaper) {
  JsonReader json = *JsonReader::parse(kGpt2 + "}", "c.json");
  const auto model = *build_language_model(json, Place{});
  Generator generator{1, 0};
  model->initialize(generator);
  const auto deviation = [&](const std::string& path) {
    double sum = 0;
    const auto values = model->find_parameter(path)->value().to_vector<float>();
    for (const float v : values) {
      sum += static_cast<double>(v) * static_cast<double>(v);
    }
    return std::sqrt(sum / static_cast<double>(values.size()));
  };
  EXPECT_NEAR(deviation("transformer.h.0.mlp.c_fc.weight"), 0.02, 0.002);
  EXPECT_NEAR(deviation("transformer.h.0.mlp.c_proj.weight"), 0.02 / 2, 0.001);
  EXPECT_EQ(deviation("transformer.h.1.ln_1.weight"), 1);
  EXPECT_EQ(deviation("transformer.h.1.attn.c_attn.bias"), 0);
  Generator again{1, 0};
  const auto before = model->embedding_table().value().to_vector<float>();
  model->initialize(again);
  EXPECT_EQ(model->embedding_table().value().to_vector<float>(), before);
}

TEST(Models, Mistakes) {
  const auto model = build(kLlama);
  const auto with = [&](const std::function<void(Batch&)>& change) {
    return error_of([&] {
      Batch batch = batch_of(kIds);
      change(batch);
      (void)model->loss(batch);
    });
  };
  EXPECT_EQ(with([](Batch&) {}), "no error");
  EXPECT_EQ(with([](Batch& b) { b.ids = {}; }), "[model] ids must be i64 [B, T], got nothing");
  EXPECT_EQ(with([](Batch& b) { b.ids = Tensor::zeros(Shape{8}, DType::i64); }),
            "[model] ids must be i64 [B, T], got i64 [8]");
  EXPECT_EQ(with([](Batch& b) {
              b.ids = Tensor::zeros(Shape{1, 8}, DType::i32);
            }),
            "[model] ids must be i64 [B, T], got i32 [1, 8]");
  EXPECT_EQ(with([](Batch& b) { b.labels = {}; }), "[loss] the batch has no labels");
  EXPECT_EQ(with([](Batch& b) {
              b.mask = Tensor::zeros(Shape{1, 7}, DType::i64);
            }),
            "[model] mask must be i64 [B, T] = [1, 8], got i64 [1, 7]");
  EXPECT_EQ(with([](Batch& b) {
              b.positions = Tensor::zeros(Shape{3, 1, 8}, DType::i64);
            }),
            "[model] positions must be i64 [B, T] = [1, 8], got i64 [3, 1, 8]");
  EXPECT_EQ(with([](Batch& b) {
              b.starts = {{0}, {0}};
            }),
            "[model] starts must have B = 1 rows, got 2");
  for (const Ids& row : {Ids{}, Ids{1}, Ids{0, 3, 3}, Ids{0, 8}}) {
    EXPECT_NE(with([&](Batch& b) {
                b.starts = {row};
              }).find("[model] starts of a row must ascend from 0 and stay below T = 8, got ["),
              std::string::npos);
  }
  EXPECT_EQ(error_of([&] { (void)model->loss(batch_of(kIds), {.items = 0}); }),
            "[loss] items must be above 0, got 0");
  EXPECT_NE(error_of([&] { (void)model->loss(batch_of({19, 0})); }), "no error");  // no such token
  EXPECT_NE(error_of([&] { (void)build(kGpt2)->loss(batch_of(Ids(17, 1))); }),
            "no error");  // positions end
}

TEST(Models, ABatchOfNoRowsMayHaveAnyLength) {
  for (const std::string& text : {kLlama, kGpt2, kInternLm2, kQwen}) {
    const auto model = build(text);
    Batch batch;
    batch.ids = Tensor::empty(Shape{0, std::int64_t{1} << 40}, DType::i64);
    EXPECT_EQ(model->hidden(batch).tensor().numel(), 0);
  }
}

TEST(Models, RotaryPositionsHaveARange) {
  const auto model = build(kLlama);
  const auto at = [&](std::int64_t position) {
    return error_of([&] {
      Batch batch = batch_of({1, 2});
      batch.positions = Tensor::from(Ids{0, position}, Shape{1, 2});
      (void)model->loss(batch);
    });
  };
  EXPECT_EQ(at((std::int64_t{1} << 31) - 1), "no error");
  for (const std::int64_t bad : {INT64_MAX, INT64_MIN, std::int64_t{-1}, std::int64_t{1} << 31}) {
    EXPECT_EQ(at(bad),
              "[model] positions must be from 0 to 2147483647, got " + std::to_string(bad));
  }
}

}  // namespace
}  // namespace reprise::nn

// GLM beyond the agreement with the reference that the parity cases show: defaults, the files of
// the first release, sizes.
#include "nn/models/glm.h"

#include <cmath>
#include <functional>
#include <span>

#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::Folder;

// Half of a head of 8 is rotated; two query heads read one key/value head.
const std::string kGlm = R"({"model_type": "glm", "vocab_size": 19, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 50000.0,
    "pad_token_id": 3})";
// The same as the first release says it.
const std::string kChatGlm = R"({"model_type": "chatglm", "padded_vocab_size": 19,
    "hidden_size": 24, "ffn_hidden_size": 20, "num_layers": 2, "num_attention_heads": 4,
    "multi_query_attention": true, "multi_query_group_num": 2, "kv_channels": 8, "seq_length": 64,
    "rope_ratio": 5, "layernorm_epsilon": 1.5625e-07, "add_qkv_bias": true,
    "add_bias_linear": false, "rmsnorm": true, "post_layer_norm": true,
    "apply_residual_connection_post_layernorm": false, "tie_word_embeddings": false,
    "pad_token_id": 3})";

absl::StatusOr<std::unique_ptr<Model>> build(const std::string& text, Place place = {}) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

std::string problem(const std::string& text) {
  return std::string(build(text, {meta, DType::f32}).status().message());
}

GlmConfig config_of(const std::string& text) {
  const auto model = build(text, {meta, DType::f32});
  EXPECT_TRUE(model.ok()) << model.status();
  return dynamic_cast<Glm&>(**model).config();
}

std::int64_t count(Model& model) {
  std::int64_t sum = 0;
  for (const Parameter* parameter : model.parameters()) {
    sum += parameter->shape().numel();
  }
  return sum;
}

std::unique_ptr<Model> random_model(const std::string& text) {
  auto model = *build(text);
  Generator generator{7, 0};
  model->initialize(generator);
  float x = 0;
  for (Parameter* parameter : model->parameters()) {
    for (float& value : std::span(parameter->write().data<float>(),
                                  static_cast<std::size_t>(parameter->shape().numel()))) {
      value = 10 * value + 0.05f * static_cast<float>(std::fmod(x += 1, 7)) - 0.15f;
    }
  }
  return model;
}

std::vector<float> logits(Model& model) {
  Batch batch;
  batch.ids = Tensor::from(std::vector<std::int64_t>{3, 1, 4, 1, 5, 9, 2, 6}, Shape{2, 4});
  return dynamic_cast<LanguageModel&>(model).logits(batch).tensor().to_vector<float>();
}

TEST(Glm, SizesOfPublishedModels) {
  // Everything else is the default of the classes.
  for (const auto& [text, parameters] : std::vector<std::pair<std::string, std::int64_t>>{
           {R"({"model_type": "glm4"})", 9'400'279'040},
           {R"({"model_type": "glm"})", 9'399'951'360}}) {
    const auto model = build(text, {meta, DType::bf16});
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(count(**model), parameters);
  }
}

TEST(Glm, DefaultsAreThoseOfTheClasses) {
  for (const std::string type : {"glm", "glm4"}) {
    const GlmConfig config = config_of(R"({"model_type": ")" + type + "\"}");
    EXPECT_EQ(config.type, type);
    EXPECT_EQ(config.epsilon, 1.5625e-7);  // the published file of glm4 says 1e-5
    EXPECT_EQ(config.rope.dim, 64);
    EXPECT_EQ(config.rope.theta, 10000);
    EXPECT_EQ(config.padding, 151329);
    EXPECT_TRUE(config.qkv_bias);
    EXPECT_FALSE(config.output_bias || config.mlp_bias || config.tied);
    EXPECT_EQ(config.kv_heads, 2);
    EXPECT_EQ(config.head_size, 128);
    EXPECT_EQ(config.positions, 131072);
  }
}

TEST(Glm, TheFileDecidesOverTheDefaults) {
  // rope_theta differs between uploads; both spellings.
  EXPECT_EQ(config_of(R"({"model_type": "glm", "rope_theta": 5000000.0})").rope.theta, 5e6);
  const GlmConfig newer = config_of(R"({"model_type": "glm4", "rms_norm_eps": 1e-05,
      "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0,
                          "partial_rotary_factor": 0.25}})");
  EXPECT_EQ(newer.rope.theta, 5000);
  EXPECT_EQ(newer.rope.dim, 32);
  EXPECT_EQ(newer.epsilon, 1e-5);
  EXPECT_EQ(config_of(R"({"model_type": "glm4", "partial_rotary_factor": 1.0})").rope.dim, 128);
  EXPECT_EQ(config_of(R"({"model_type": "glm4", "pad_token_id": null})").padding, std::nullopt);
  EXPECT_FALSE(config_of(R"({"model_type": "glm4", "attention_bias": false})").qkv_bias);
}

TEST(Glm, ThePaddingRowHasNoGradient) {
  const auto model = random_model(kGlm);
  Batch batch;
  batch.ids = Tensor::from(std::vector<std::int64_t>{3, 1, 4, 3}, Shape{1, 4});
  batch.labels = batch.ids;
  Tape tape;
  const Tape::Scope scope(tape, {});
  backward(model->loss(batch));
  const auto gradient = dynamic_cast<Glm&>(*model).embedding_table().gradient().to_vector<float>();
  for (std::size_t i = 0; i < 24; ++i) {
    EXPECT_EQ(gradient[3 * 24 + i], 0);
    EXPECT_NE(gradient[4 * 24 + i], 0);
  }
}

TEST(Glm, RotatesHalfOfEachHead) {
  // Keys whose rotated half is zero do not tell where they are.
  const auto moved = [](const std::string& text) {
    const auto model = random_model(text);
    for (const NamedParameter& entry : model->named_parameters()) {
      if (entry.path.find("k_proj") == std::string::npos) {
        continue;
      }
      for (std::int64_t row = 0; row < 16; ++row) {
        if (row % 8 < 4) {
          entry.parameter->write().slice(0, row, row + 1).zero();
        }
      }
    }
    Batch batch;
    batch.ids = Tensor::from(std::vector<std::int64_t>{1, 2, 4, 5}, Shape{1, 4});
    auto& language = dynamic_cast<LanguageModel&>(*model);
    const auto here = language.logits(batch).tensor().to_vector<float>();
    batch.positions = Tensor::from(std::vector<std::int64_t>{9, 0, 30, 2}, Shape{1, 4});
    const auto there = language.logits(batch).tensor().to_vector<float>();
    float largest = 0;
    for (std::size_t i = 0; i < here.size(); ++i) {
      largest = std::max(largest, std::abs(here[i] - there[i]));
    }
    return largest;
  };
  EXPECT_LT(moved(kGlm), 1e-5);
  EXPECT_GT(moved(kGlm.substr(0, kGlm.size() - 1) + R"(, "partial_rotary_factor": 1.0})"), 1e-3);
}

Tensor stacked(Model& model, const std::string& layer, const std::string& kind) {
  std::vector<float> values;
  Shape shape;
  std::int64_t rows = 0;
  for (const std::string part : {"q", "k", "v"}) {
    const Tensor value =
        model.find_parameter(layer + "self_attn." + part + "_proj." + kind)->value();
    const auto all = value.to_vector<float>();
    values.insert(values.end(), all.begin(), all.end());
    rows += value.size(0);
    shape = value.shape().with(0, rows);
  }
  return Tensor::from(values, shape);
}

// The weights of `model` as the first release's files have them.
std::vector<NamedTensor> chatglm_tensors(Model& model) {
  const auto value = [&](const std::string& path) { return model.find_parameter(path)->value(); };
  std::vector<NamedTensor> tensors = {
      {"transformer.embedding.word_embeddings.weight", value("model.embed_tokens.weight")},
      {"transformer.rotary_pos_emb.inv_freq", Tensor::zeros(Shape{2}, DType::f32)},
      {"transformer.encoder.final_layernorm.weight", value("model.norm.weight")},
      {"transformer.output_layer.weight", value("lm_head.weight")}};
  for (const std::string i : {"0", "1"}) {
    const std::string ours = "model.layers." + i + ".";
    const std::string theirs = "transformer.encoder.layers." + i + ".";
    for (const std::string kind : {"weight", "bias"}) {
      tensors.push_back(
          {theirs + "self_attention.query_key_value." + kind, stacked(model, ours, kind)});
    }
    for (const auto& [to, from] :
         {std::pair<std::string, std::string>("self_attention.dense", "self_attn.o_proj"),
          std::pair<std::string, std::string>("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
          std::pair<std::string, std::string>("mlp.dense_4h_to_h", "mlp.down_proj"),
          std::pair<std::string, std::string>("input_layernorm", "input_layernorm"),
          std::pair<std::string, std::string>("post_attention_layernorm",
                                              "post_attention_layernorm")}) {
      tensors.push_back({theirs + to + ".weight", value(ours + from + ".weight")});
    }
  }
  return tensors;
}

TEST(Glm, LoadsTheFilesOfTheFirstRelease) {
  const auto model = random_model(kGlm);
  for (const std::string& config : {kGlm, kChatGlm}) {
    const Folder folder;
    testing::write(folder.at("config.json"), config);
    ASSERT_TRUE(write_safetensors(folder.at("model.safetensors"), chatglm_tensors(*model)).ok());
    for (const bool map : {false, true}) {
      const auto loaded = load_model(folder.path().string(), {.map = map});
      ASSERT_TRUE(loaded.ok()) << loaded.status();
      EXPECT_EQ(logits(**loaded), logits(*model));
      // What is saved is of today's form.
      const Folder out;
      ASSERT_TRUE(save_model(**loaded, out.path().string()).ok());
      const auto saved = JsonReader::open(out.at("config.json"));
      EXPECT_EQ(saved->value("model_type"), "glm");
      const auto file = SafetensorsFile::open(out.at("model.safetensors"));
      EXPECT_NE(file->find("model.layers.1.self_attn.k_proj.bias"), nullptr);
      EXPECT_EQ(file->tensors().size(), model->parameters().size());
      const auto again = load_model(out.path().string());
      ASSERT_TRUE(again.ok()) << again.status();
      EXPECT_EQ(logits(**again), logits(*model));
    }
    const auto narrow = load_model(folder.path().string(), {.place = {cpu, DType::bf16}});
    ASSERT_TRUE(narrow.ok()) << narrow.status();
    EXPECT_EQ((*narrow)
                  ->find_parameter("model.layers.0.self_attn.v_proj.weight")
                  ->value()
                  .data<bfloat16>()[5]
                  .bits,
              to_bfloat16(model->find_parameter("model.layers.0.self_attn.v_proj.weight")
                              ->value()
                              .data<float>()[5])
                  .bits);
  }
}

TEST(Glm, FilesOfTheFirstReleaseThatAreWrong) {
  const auto model = random_model(kGlm);
  const auto load = [&](const std::function<void(std::vector<NamedTensor>&)>& change) {
    const Folder folder;
    testing::write(folder.at("config.json"), kChatGlm);
    std::vector<NamedTensor> tensors = chatglm_tensors(*model);
    change(tensors);
    EXPECT_TRUE(write_safetensors(folder.at("model.safetensors"), tensors).ok());
    return std::string(load_model(folder.path().string()).status().message());
  };
  const std::string fused = "transformer.encoder.layers.1.self_attention.query_key_value.weight";
  EXPECT_NE(load([&](auto& tensors) {
              for (NamedTensor& entry : tensors) {
                if (entry.name == fused) {
                  entry.tensor = entry.tensor.slice(0, 0, 63).clone();
                }
              }
            }).find("tensor \"" + fused + "\" must have shape [64, 24], got [63, 24]"),
            std::string::npos);
  EXPECT_NE(load([&](auto& tensors) {
              std::erase_if(tensors, [&](const NamedTensor& entry) { return entry.name == fused; });
            })
                .find("3 tensors are missing: model.layers.1.self_attn.q_proj.weight, "
                      "model.layers.1.self_attn.k_proj.weight, "
                      "model.layers.1.self_attn.v_proj.weight"),
            std::string::npos);
}

TEST(Glm, ConfigsThatAreWrong) {
  const auto with = [](const std::string& from, const std::string& to) {
    std::string text = kChatGlm;
    text.replace(text.find(from), from.size(), to);
    return problem(text);
  };
  EXPECT_EQ(
      with("\"kv_channels\": 8", "\"kv_channels\": 6"),
      "c.json: kv_channels must be a multiple of 4: half of a head is rotated, in pairs; got 6");
  EXPECT_EQ(with("\"multi_query_group_num\": 2", "\"multi_query_group_num\": 3"),
            "c.json: multi_query_group_num must divide num_attention_heads = 4, got 3");
  EXPECT_EQ(with("\"rope_ratio\": 5", "\"rope_ratio\": -1"),
            "c.json: rope_ratio must be above 0 and below 1e20, got -1");
  EXPECT_EQ(with("\"rmsnorm\": true", "\"rmsnorm\": false"),
            "c.json: rmsnorm must be true, got false");
  EXPECT_EQ(with("\"add_bias_linear\": false", "\"add_bias_linear\": true"),
            "c.json: add_bias_linear must be false, got true");
  EXPECT_EQ(with("\"seq_length\": 64", "\"seq_length\": null"), "c.json: seq_length is missing");
  EXPECT_EQ(problem(R"({"model_type": "glm4", "vocab_size": 100})"),
            "c.json: pad_token_id must be from -100 to below vocab_size = 100, got 151329");
  EXPECT_EQ(problem(R"({"model_type": "glm", "num_key_value_heads": 3})"),
            "c.json: num_key_value_heads must divide num_attention_heads = 32, got 3");
  EXPECT_EQ(problem(R"({"model_type": "glm", "partial_rotary_factor": 0.01})"),
            "c.json: partial_rotary_factor must leave an even number of rotated elements from 2 to "
            "head_dim = 128, got 1.28");
}

TEST(Glm, WhatIsWrittenBuildsTheSameModel) {
  for (const std::string& text :
       {kGlm, kChatGlm,
        std::string(R"({"model_type": "glm4", "num_hidden_layers": 1, "pad_token_id": null,
            "attention_bias": false, "tie_word_embeddings": true, "partial_rotary_factor": 0.25})")}) {
    const auto first = build(text, {meta, DType::f32});
    ASSERT_TRUE(first.ok()) << first.status();
    (*first)->set_source("");
    const std::string written = (*first)->config_json();
    const auto second = build(written, {meta, DType::f32});
    ASSERT_TRUE(second.ok()) << second.status();
    (*second)->set_source("");
    EXPECT_EQ((*second)->config_json(), written);
    EXPECT_EQ(count(**first), count(**second));
    EXPECT_EQ(config_of(text).padding, config_of(written).padding);
    EXPECT_EQ(config_of(text).rope.dim, config_of(written).rope.dim);
    EXPECT_EQ(config_of(text).rope.theta, config_of(written).rope.theta);
  }
}

}  // namespace
}  // namespace reprise::nn

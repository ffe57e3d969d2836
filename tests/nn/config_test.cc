// What config files mean: defaults, spellings, errors; the models' sizes on meta.
#include <cstdint>
#include <functional>
#include <tuple>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "nn/models/gpt2.h"
#include "nn/models/llama.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

absl::StatusOr<std::unique_ptr<Model>> build(const std::string& text,
                                             Place place = {meta, DType::bf16}) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

std::string problem(const std::string& text) {
  return std::string(build(text).status().message());
}

LlamaConfig llama(const std::string& text, std::string_view type = "llama") {
  JsonReader json = *JsonReader::parse(text, "c.json");
  const LlamaConfig config = read_llama_config(json, type);
  EXPECT_TRUE(json.status().ok()) << json.status();
  return config;
}

std::int64_t count(Model& model) {
  std::int64_t sum = 0;
  for (const Parameter* parameter : model.parameters()) {
    sum += parameter->shape().numel();
  }
  return sum;
}

TEST(Config, SizesOfPublishedModels) {
  for (const auto& [text, parameters] : std::vector<std::pair<std::string, std::int64_t>>{
           {R"({"model_type": "gpt2"})", 124'439'808},
           {R"({"model_type": "llama"})", 6'738'415'616},
           {R"({"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336,
                "num_key_value_heads": 8})",
            8'030'261'248},
           {R"({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
                "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                "tie_word_embeddings": true})",
            494'032'768},
           {R"({"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
                "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                "tie_word_embeddings": true})",
            1'543'714'304},
           {R"({"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                "vocab_size": 152064})",
            7'615'616'512},
           {R"({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
                "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                "tie_word_embeddings": true})",
            596'049'920},
           {R"({"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
                "num_hidden_layers": 36, "num_key_value_heads": 8})",
            8'190'735'360},
       }) {
    const auto model = build(text);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(count(**model), parameters) << text;
  }
}

TEST(Config, DefaultsAreThoseOfTheClasses) {
  const LlamaConfig l = llama("{}");
  EXPECT_EQ(l.kv_heads, 32);
  EXPECT_EQ(l.head_size, 128);
  EXPECT_EQ(l.positions, 2048);
  EXPECT_EQ(l.epsilon, 1e-6);
  EXPECT_EQ(l.rope.theta, 10000);
  EXPECT_FALSE(l.qkv_bias || l.output_bias || l.mlp_bias || l.tied || l.padding);
  const LlamaConfig q = llama("{}", "qwen2");
  EXPECT_EQ(q.vocabulary, 151936);
  EXPECT_EQ(q.inner, 22016);
  EXPECT_EQ(q.positions, 32768);
  EXPECT_TRUE(q.qkv_bias);
  EXPECT_FALSE(q.output_bias || q.mlp_bias);
  const LlamaConfig q3 = llama("{}", "qwen3");
  EXPECT_EQ(q3.head_size, 128);
  EXPECT_EQ(q3.epsilon, 1e-6);
  EXPECT_TRUE(q3.qk_norm);
  EXPECT_FALSE(q3.qkv_bias || q3.output_bias || q3.mlp_bias || q.qk_norm || l.qk_norm);
  // The size of a head of qwen3 does not follow from the others, unless it is null.
  EXPECT_EQ(
      llama(R"({"hidden_size": 48, "num_attention_heads": 5, "num_key_value_heads": 5})", "qwen3")
          .head_size,
      128);
  EXPECT_EQ(llama(R"({"hidden_size": 64, "head_dim": null})", "qwen3").head_size, 2);
  // Null counts as the number of heads, absent as the class default.
  EXPECT_EQ(llama(R"({"num_attention_heads": 64})").kv_heads, 64);
  EXPECT_EQ(llama(R"({"num_attention_heads": 64})", "qwen2").kv_heads, 32);
  EXPECT_EQ(llama(R"({"num_attention_heads": 64, "num_key_value_heads": null})", "qwen2").kv_heads,
            64);
  JsonReader json = *JsonReader::parse(R"({"n_embd": 32, "n_head": 4})", "c.json");
  const Gpt2Config g = read_gpt2_config(json);
  EXPECT_EQ(g.inner, 128);
  EXPECT_EQ(g.positions, 1024);
  EXPECT_EQ(g.attention_dropout, 0.1);
  EXPECT_EQ(g.activation, Activation::gelu_tanh);
  EXPECT_TRUE(g.tied);
}

TEST(Config, OptionsOfLlama) {
  const LlamaConfig config = llama(R"({"attention_bias": true, "mlp_bias": true, "head_dim": 16,
      "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "gelu_new",
      "pad_token_id": 7, "tie_word_embeddings": true, "attention_dropout": 0.25})");
  EXPECT_TRUE(config.qkv_bias && config.output_bias && config.mlp_bias && config.tied);
  EXPECT_EQ(config.head_size, 16);
  EXPECT_EQ(config.rope.dim, 16);
  EXPECT_EQ(config.activation, Activation::gelu_tanh);
  EXPECT_EQ(config.padding, 7);
  EXPECT_EQ(config.attention_dropout, 0.25);
  // Counted from the end, as the reference's embedding does.
  EXPECT_EQ(llama(R"({"pad_token_id": -1})").padding, 31999);
  EXPECT_EQ(llama(R"({"pad_token_id": -32000})").padding, 0);
  EXPECT_EQ(llama(R"({"pad_token_id": null})").padding, std::nullopt);
  // attention_bias is for all four projections of qwen3 too.
  const LlamaConfig biased = llama(R"({"attention_bias": true, "mlp_bias": true})", "qwen3");
  EXPECT_TRUE(biased.qkv_bias && biased.output_bias);
  EXPECT_FALSE(biased.mlp_bias);
  // Not options of Qwen2.
  const LlamaConfig qwen = llama(R"({"attention_bias": false, "mlp_bias": true})", "qwen2");
  EXPECT_TRUE(qwen.qkv_bias);
  EXPECT_FALSE(qwen.mlp_bias);
}

TEST(Config, Qwen3HasTheWindowsOfQwen2) {
  using ::testing::ElementsAre;
  EXPECT_TRUE(llama(R"({"sliding_window": 8, "max_window_layers": 1})", "qwen3").windows.empty());
  EXPECT_THAT(llama(R"({"use_sliding_window": true, "sliding_window": 8, "num_hidden_layers": 30})",
                    "qwen3")
                  .windows[28],
              8);
  EXPECT_THAT(llama(R"({"use_sliding_window": true, "sliding_window": 8, "num_hidden_layers": 2,
                        "layer_types": ["sliding_attention", "full_attention"]})",
                    "qwen3")
                  .windows,
              ElementsAre(8, 0));
}

TEST(Config, WindowsOfQwen2) {
  using ::testing::ElementsAre;
  EXPECT_TRUE(llama(R"({"sliding_window": 8, "max_window_layers": 1})", "qwen2").windows.empty());
  EXPECT_THAT(llama(R"({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1,
                        "num_hidden_layers": 3})",
                    "qwen2")
                  .windows,
              ElementsAre(0, 8, 8));
  EXPECT_TRUE(llama(R"({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 5,
                        "num_hidden_layers": 3})",
                    "qwen2")
                  .windows.empty());
  EXPECT_THAT(llama(R"({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0,
                        "num_hidden_layers": 3, "layer_types":
                        ["sliding_attention", "full_attention", "sliding_attention"]})",
                    "qwen2")
                  .windows,
              ElementsAre(8, 0, 8));
  // Null is no window, also when windows are on; absent is the class default.
  EXPECT_TRUE(llama(R"({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0,
                        "num_hidden_layers": 2})",
                    "qwen2")
                  .windows.empty());
  EXPECT_THAT(
      llama(R"({"use_sliding_window": true, "max_window_layers": 1, "num_hidden_layers": 2})",
            "qwen2")
          .windows,
      ElementsAre(0, 4096));
  // What no layer uses may be anything.
  for (const std::string unused : {"0", "-1"}) {
    EXPECT_TRUE(llama(R"({"use_sliding_window": false, "sliding_window": )" + unused + "}", "qwen2")
                    .windows.empty());
    EXPECT_TRUE(
        llama(R"({"use_sliding_window": true, "max_window_layers": 99, "sliding_window": )" +
                  unused + "}",
              "qwen2")
            .windows.empty());
  }
  EXPECT_TRUE(llama(R"({"num_hidden_layers": 1, "layer_types": ["full_attention"]})", "qwen2")
                  .windows.empty());
}

TEST(Config, NestedAndNewerSpelling) {
  const std::string flat = R"("hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
      "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11)";
  const auto older = build(R"({"model_type": "qwen2", "rope_theta": 5000.0, )" + flat + "}");
  const auto newer = build(R"({"model_type": "qwen2", "text_config": {"rope_parameters":
      {"rope_type": "default", "rope_theta": 5000.0}, )" +
                           flat + "}}");
  ASSERT_TRUE(older.ok() && newer.ok()) << older.status() << newer.status();
  EXPECT_EQ(count(**older), count(**newer));
  EXPECT_EQ(dynamic_cast<Llama&>(**newer).config().rope.theta, 5000);
  const auto by_architecture = build(R"({"architectures": ["LlamaForCausalLM"], )" + flat + "}");
  ASSERT_TRUE(by_architecture.ok()) << by_architecture.status();
  EXPECT_EQ((*by_architecture)->type(), "llama");
}

TEST(Config, ErrorsNameFileKeyExpectedAndActual) {
  const std::string supported = fmt::format("{}", fmt::join(supported_models(), ", "));
  EXPECT_EQ(problem("{}"), "c.json: model_type is missing");
  EXPECT_EQ(problem(R"({"model_type": "mamba"})"),
            "c.json: model_type must be one of " + supported + ", got \"mamba\"");
  EXPECT_EQ(problem(R"({"model_type": 3})"), "c.json: model_type must be a string, got 3");
  EXPECT_EQ(problem(R"({"architectures": ["MambaForCausalLM"]})"),
            "c.json: architectures must be one of " + supported + ", got \"MambaForCausalLM\"");
  EXPECT_EQ(problem(R"({"architectures": "GPT2LMHeadModel"})"),
            "c.json: architectures must be a list of strings, got \"GPT2LMHeadModel\"");
  EXPECT_EQ(problem(R"({"model_type": "gpt2", "n_layer": "12"})"),
            "c.json: n_layer must be a whole number, got \"12\"");
  EXPECT_EQ(problem(R"({"model_type": "gpt2", "n_head": 7})"),
            "c.json: n_head must divide n_embd = 768, got 7");
  EXPECT_EQ(problem(R"({"model_type": "gpt2", "n_head": 0})"),
            "c.json: n_head must be at least 1, got 0");
  EXPECT_EQ(problem(R"({"model_type": "gpt2", "activation_function": "relu"})"),
            "c.json: activation_function must be one of silu, swish, gelu, gelu_new, "
            "gelu_pytorch_tanh, gelu_fast, quick_gelu, got \"relu\"");
  EXPECT_EQ(problem(R"({"model_type": "gpt2", "resid_pdrop": 1.0})"),
            "c.json: resid_pdrop must be from 0 to below 1, got 1");
  EXPECT_EQ(problem(R"({"model_type": "gpt2", "add_cross_attention": true})"),
            "c.json: add_cross_attention must be false: there is no encoder to attend to");
  EXPECT_EQ(problem(R"({"model_type": "llama", "num_attention_heads": 30})"),
            "c.json: num_attention_heads must divide hidden_size = 4096, got 30");
  EXPECT_EQ(problem(R"({"model_type": "llama", "num_key_value_heads": 5})"),
            "c.json: num_key_value_heads must divide num_attention_heads = 32, got 5");
  EXPECT_EQ(problem(R"({"model_type": "llama", "pad_token_id": 32000})"),
            "c.json: pad_token_id must be from -32000 to below vocab_size = 32000, got 32000");
  EXPECT_EQ(problem(R"({"model_type": "llama", "pad_token_id": -32001})"),
            "c.json: pad_token_id must be from -32000 to below vocab_size = 32000, got -32001");
  EXPECT_EQ(problem(R"({"model_type": "llama", "text_config": {"hidden_size": -1}})"),
            "c.json: text_config.hidden_size must be at least 1, got -1");
  EXPECT_EQ(
      problem(
          R"({"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": ["full_attention"]})"),
      "c.json: layer_types must have num_hidden_layers = 2 entries, got 1");
  EXPECT_EQ(problem(R"({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["x"]})"),
            "c.json: layer_types must hold full_attention or sliding_attention, got \"x\"");
  EXPECT_EQ(problem(R"({"model_type": "qwen2", "num_hidden_layers": 1,
                        "layer_types": ["sliding_attention"]})"),
            "c.json: layer_types must not have sliding_attention without use_sliding_window and a "
            "sliding_window");
  EXPECT_EQ(problem(R"({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 0,
                        "max_window_layers": 0})"),
            "c.json: sliding_window must be at least 1, got 0");
}

// Sizes that only serve to overflow or to fill the memory.
TEST(Config, SizesHaveAnUpperBound) {
  const std::vector<std::tuple<std::string, std::string, std::int64_t>> bounds = {
      {"llama", "vocab_size", 67108864},
      {"llama", "hidden_size", 1048576},
      {"llama", "intermediate_size", 1048576},
      {"llama", "num_hidden_layers", 10000},
      {"llama", "num_attention_heads", 16384},
      {"llama", "num_key_value_heads", 16384},
      {"llama", "head_dim", 16384},
      {"llama", "max_position_embeddings", 2147483648},
      {"gpt2", "vocab_size", 67108864},
      {"gpt2", "n_positions", 2147483648},
      {"gpt2", "n_embd", 1048576},
      {"gpt2", "n_inner", 4194304},
      {"gpt2", "n_layer", 10000},
      {"gpt2", "n_head", 16384}};
  for (const auto& [type, key, most] : bounds) {
    for (const std::int64_t size :
         {most + 1, std::int64_t{1'000'000'000'000}, std::int64_t{1} << 62, INT64_MAX}) {
      EXPECT_EQ(problem(fmt::format(R"({{"model_type": "{}", "{}": {}}})", type, key, size)),
                fmt::format("c.json: {} must be at most {}, got {}", key, most, size));
    }
  }
}

// A model that was not read from a file writes a config that builds the same one.
TEST(Config, WhatIsWrittenBuildsTheSameModel) {
  for (const std::string text : {
           R"({"model_type": "gpt2", "n_inner": 100, "n_embd": 24, "n_head": 3, "n_layer": 2,
               "tie_word_embeddings": false, "scale_attn_by_inverse_layer_idx": true,
               "activation_function": "gelu", "attn_pdrop": 0.5})",
           R"({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "head_dim": 16,
               "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 9, "mlp_bias": true,
               "attention_bias": true, "pad_token_id": 3, "partial_rotary_factor": 0.5,
               "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
               "high_freq_factor": 4, "original_max_position_embeddings": 64}})",
           R"({"model_type": "llama", "num_hidden_layers": 0,
               "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 16, "truncate": false}})",
           R"({"model_type": "llama", "num_hidden_layers": 0,
               "rope_scaling": {"type": "dynamic", "factor": 2}})",
           R"({"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4,
               "num_key_value_heads": 4, "num_hidden_layers": 2, "use_sliding_window": true,
               "sliding_window": 3, "max_window_layers": 1, "tie_word_embeddings": true,
               "rope_scaling": {"type": "linear", "factor": 2}})",
           R"({"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 4, "head_dim": 6,
               "num_key_value_heads": 2, "num_hidden_layers": 2, "attention_bias": true,
               "use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1})",
       }) {
    const auto first = build(text);
    ASSERT_TRUE(first.ok()) << first.status();
    EXPECT_NE((*first)->config_json().find("\"model_type\""), std::string::npos);
    (*first)->set_source("");
    const std::string written = (*first)->config_json();
    const auto second = build(written);
    ASSERT_TRUE(second.ok()) << second.status();
    (*second)->set_source("");
    EXPECT_EQ((*second)->config_json(), written);
    ASSERT_EQ(count(**first), count(**second));
    if (const auto* one = dynamic_cast<Llama*>(first->get())) {
      const auto& two = dynamic_cast<Llama&>(**second);
      EXPECT_EQ(one->config().windows, two.config().windows);
      EXPECT_EQ(one->config().padding, two.config().padding);
      EXPECT_EQ(rope_frequencies(one->config().rope, 5000),
                rope_frequencies(two.config().rope, 5000));
      EXPECT_EQ(one->config().rope.attention_factor, two.config().rope.attention_factor);
    }
  }
}

}  // namespace
}  // namespace reprise::nn

// Llama and its relatives Qwen2 (biases on q, k and v, a window on some layers) and Qwen3 (windows
// too, no biases, norms on q and k), which differ in their configs alone; also the decoder of
// Qwen2-VL. Touvron et al., "LLaMA: open and efficient foundation language models", 2023; "Llama
// 2", 2023; Yang et al., "Qwen2 technical report", 2024; "Qwen3 technical report", 2025: pre-norm
// blocks with rms_norm, rotary positions, grouped key/value heads, gated feed-forward.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/activation.h"
#include "nn/models/attend.h"
#include "nn/models/language_model.h"
#include "nn/models/rotation.h"
#include "nn/norm.h"

namespace reprise::nn {

struct LlamaConfig {
  std::string type = "llama";                //     model_type
  std::int64_t vocabulary = 32000;           // V   vocab_size
  std::int64_t width = 4096;                 // C   hidden_size
  std::int64_t inner = 11008;                // F   intermediate_size
  std::int64_t layers = 32;                  //     num_hidden_layers
  std::int64_t heads = 32;                   // H   num_attention_heads
  std::int64_t kv_heads = 32;                // K   num_key_value_heads
  std::int64_t head_size = 128;              // D   head_dim, or C / H
  std::int64_t positions = 2048;             //     max_position_embeddings
  Activation activation = Activation::silu;  //  hidden_act
  double epsilon = 1e-6;                     //     rms_norm_eps
  RopeConfig rope{.dim = 128, .max_positions = 2048};
  bool qkv_bias = false, output_bias = false;  // attention_bias: both; qwen2: always, never
  bool mlp_bias = false;
  bool qk_norm = false;  // qwen3: rms_norm of each head of q and k, before they are rotated
  double attention_dropout = 0;
  std::vector<std::int64_t> windows;  //     a layer's window, 0: none; empty: none at all
  double initializer_range = 0.02;
  std::optional<std::int64_t> padding;  //     pad_token_id: its row of the table has no gradient
  bool tied = false;                    //     tie_word_embeddings
};

// Problems are noted in `json`. `type`: "llama", "qwen2", "qwen3", or "qwen2_vl" for the keys of
// its decoder.
LlamaConfig read_llama_config(JsonReader& json, std::string_view type);
// The way back: every key that read_llama_config reads.
nlohmann::json llama_json(const LlamaConfig& config);

class LlamaAttention : public Module {
 public:
  LlamaAttention(const LlamaConfig& config, std::int64_t layer, Place place);
  Variable operator()(Variable x, const Visible& visible, const Rotation& rotation) const;

  Linear q_proj, k_proj, v_proj, o_proj;
  std::optional<RmsNorm> q_norm, k_norm;  // with qk_norm

 private:
  std::int64_t heads_, kv_heads_, head_size_, window_;
  double dropout_;
};

class LlamaMlp : public Module {
 public:
  LlamaMlp(const LlamaConfig& config, Place place);
  Variable operator()(Variable x) const;

  Linear gate_proj, up_proj, down_proj;

 private:
  Activation activation_;
};

class LlamaBlock : public Module {
 public:
  LlamaBlock(const LlamaConfig& config, std::int64_t layer, Place place);
  Variable operator()(Variable x, const Visible& visible, const Rotation& rotation) const;

  LlamaAttention self_attn;
  LlamaMlp mlp;
  RmsNorm input_layernorm, post_attention_layernorm;
};

class LlamaTrunk : public Module {
 public:
  LlamaTrunk(const LlamaConfig& config, Place place);
  // x [B, T, C]: what embed_tokens gave, with images in it where there are some.
  Variable operator()(Variable x, const Visible& visible, const Rotation& rotation) const;

  Embedding embed_tokens;
  ModuleList<LlamaBlock> layers;
  RmsNorm norm;
};

class Llama : public LanguageModel {
 public:
  Llama(const LlamaConfig& config, Place place);

  Variable hidden(const Batch& batch) override;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return config_.type; }
  std::int64_t vocabulary() const override { return config_.vocabulary; }
  std::int64_t max_positions() const override { return config_.positions; }
  Linear* head() override { return lm_head ? &*lm_head : nullptr; }
  Parameter& embedding_table() override { return model.embed_tokens.weight; }
  std::string_view trunk_prefix() const override { return "model."; }
  bool is_buffer(std::string_view key) const override;
  const LlamaConfig& config() const { return config_; }

  LlamaTrunk model;
  std::optional<Linear> lm_head;  // unless tied

 private:
  std::string write_config() const override;  // in llama_config.cc, beside its reader

  LlamaConfig config_;
};

}  // namespace reprise::nn

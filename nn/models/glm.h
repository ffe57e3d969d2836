// GLM-4-9B of 2024 (model type "glm") and of April 2025 ("glm4"). Team GLM, "ChatGLM: a family of
// large language models from GLM-130B to GLM-4 All Tools", 2024: blocks as Llama's, with biases on
// q, k and v, rotary positions on half of each head and on pairs of neighbours, gate and up in one
// projection. The later one also norms what attention and feed-forward give (sandwich norms): there
// post_attention_layernorm, for all its name, stands before the feed-forward.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/language_model.h"
#include "nn/models/llama.h"
#include "nn/models/rotation.h"
#include "nn/norm.h"

namespace reprise::nn {

// Attention is Llama's, and so are the fields; `type` is "glm" or "glm4".
using GlmConfig = LlamaConfig;

// Problems are noted in `json`.
GlmConfig read_glm_config(JsonReader& json, std::string_view type);
// The config.json of the first release, whose model type is "chatglm": a "glm" under other keys.
GlmConfig read_chatglm_config(JsonReader& json);

class GlmMlp : public Module {
 public:
  GlmMlp(const GlmConfig& config, Place place);
  Variable operator()(Variable x) const;

  Linear gate_up_proj, down_proj;

 private:
  Activation activation_;
  std::int64_t inner_;
};

class GlmBlock : public Module {
 public:
  GlmBlock(const GlmConfig& config, std::int64_t layer, Place place);
  Variable operator()(Variable x, const Visible& visible, const Rotation& rotation) const;

  LlamaAttention self_attn;
  GlmMlp mlp;
  RmsNorm input_layernorm, post_attention_layernorm;
  std::optional<RmsNorm> post_self_attn_layernorm, post_mlp_layernorm;  // of glm4
};

class GlmTrunk : public Module {
 public:
  GlmTrunk(const GlmConfig& config, Place place);
  Variable operator()(const Batch& batch, const Rotation& rotation) const;

  Embedding embed_tokens;
  ModuleList<GlmBlock> layers;
  RmsNorm norm;
};

class Glm : public LanguageModel {
 public:
  Glm(const GlmConfig& config, Place place);

  Variable hidden(const Batch& batch) override;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return config_.type; }
  std::int64_t vocabulary() const override { return config_.vocabulary; }
  std::int64_t max_positions() const override { return config_.positions; }
  Linear* head() override { return lm_head ? &*lm_head : nullptr; }
  Parameter& embedding_table() override { return model.embed_tokens.weight; }
  std::string_view trunk_prefix() const override { return "model."; }
  // For glm also those of ChatGLM's files, which have q, k and v in one tensor.
  std::vector<FileKey> file_keys(const std::string& path) const override;
  bool is_buffer(std::string_view key) const override;
  const GlmConfig& config() const { return config_; }

  GlmTrunk model;
  std::optional<Linear> lm_head;  // unless tied

 private:
  std::string write_config() const override;

  GlmConfig config_;
};

}  // namespace reprise::nn

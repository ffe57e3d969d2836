// InternLM2. Cai et al., "InternLM2 technical report", 2024: blocks as Llama's, with q, k and v in
// one projection whose rows are grouped by key/value head (its query heads, its key, its value),
// and w1, w3 and w2 for gate, up and down. The decoder of InternLM-XComposer2, whose five linears
// of a block have a term more at image tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/activation.h"
#include "nn/models/attend.h"
#include "nn/models/language_model.h"
#include "nn/models/rotation.h"
#include "nn/norm.h"

namespace reprise::nn {

struct InternLm2Config {
  std::int64_t vocabulary = 103168;          // V   vocab_size
  std::int64_t width = 4096;                 // C   hidden_size
  std::int64_t inner = 11008;                // F   intermediate_size
  std::int64_t layers = 32;                  //     num_hidden_layers
  std::int64_t heads = 32;                   // H   num_attention_heads
  std::int64_t kv_heads = 32;                // K   num_key_value_heads
  std::int64_t head_size = 128;              // D   C / H
  std::int64_t positions = 2048;             //     max_position_embeddings
  Activation activation = Activation::silu;  // hidden_act
  double epsilon = 1e-6;                     // rms_norm_eps
  RopeConfig rope{.dim = 128, .max_positions = 2048};
  bool bias = true;  // of wqkv and wo: on unless the file says otherwise, as all published ones do
  double initializer_range = 0.02;
  std::optional<std::int64_t> padding = 0;  // pad_token_id: its row of the table has no gradient
  bool tied = false;                        // tie_word_embeddings
};

// Problems are noted in `json`.
InternLm2Config read_internlm2_config(JsonReader& json);
// The way back: every key that read_internlm2_config reads.
nlohmann::json internlm2_json(const InternLm2Config& config);

// One of a block's five linears. `images`: which tokens are images, i64 [M], numbers in [B T]; no
// Variable where the model takes none. Here it is not read.
class InternLm2Linear : public Linear {
 public:
  using Linear::Linear;
  virtual Variable operator()(Variable x, const Variable& images) const;
};

// Makes the linear of that name, "wqkv", "wo", "w1", "w2" or "w3".
using MakeInternLm2Linear = std::function<std::unique_ptr<InternLm2Linear>(
    std::string_view name, std::int64_t in, std::int64_t out, LinearOptions options, Place place)>;
std::unique_ptr<InternLm2Linear> plain_internlm2_linear(std::string_view name, std::int64_t in,
                                                        std::int64_t out, LinearOptions options,
                                                        Place place);

// What every block of one forward reads.
struct InternLm2Context {
  Visible visible;
  Rotation rotation;
  Variable images = {};
};

class InternLm2Attention : public Module {
 public:
  InternLm2Attention(const InternLm2Config& config, const MakeInternLm2Linear& make, Place place);
  Variable operator()(Variable x, const InternLm2Context& context) const;

  const std::unique_ptr<InternLm2Linear> wqkv, wo;

 private:
  std::int64_t heads_, kv_heads_, head_size_;
};

class InternLm2Mlp : public Module {
 public:
  InternLm2Mlp(const InternLm2Config& config, const MakeInternLm2Linear& make, Place place);
  Variable operator()(Variable x, const InternLm2Context& context) const;

  const std::unique_ptr<InternLm2Linear> w1, w3, w2;

 private:
  Activation activation_;
};

class InternLm2Block : public Module {
 public:
  InternLm2Block(const InternLm2Config& config, const MakeInternLm2Linear& make, Place place);
  Variable operator()(Variable x, const InternLm2Context& context) const;

  InternLm2Attention attention;
  InternLm2Mlp feed_forward;
  RmsNorm attention_norm, ffn_norm;
};

class InternLm2Trunk : public Module {
 public:
  InternLm2Trunk(const InternLm2Config& config, const MakeInternLm2Linear& make, Place place);
  // x [B, T, C]: what tok_embeddings gave, with images in it where there are some.
  Variable operator()(Variable x, const InternLm2Context& context) const;

  Embedding tok_embeddings;
  ModuleList<InternLm2Block> layers;
  RmsNorm norm;
};

class InternLm2 : public LanguageModel {
 public:
  InternLm2(const InternLm2Config& config, Place place);

  Variable hidden(const Batch& batch) override;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return "internlm2"; }
  std::int64_t vocabulary() const override { return config_.vocabulary; }
  std::int64_t max_positions() const override { return config_.positions; }
  Linear* head() override { return output ? &*output : nullptr; }
  Parameter& embedding_table() override { return model.tok_embeddings.weight; }
  std::string_view trunk_prefix() const override { return "model."; }
  bool is_buffer(std::string_view key) const override;
  const InternLm2Config& config() const { return config_; }

  InternLm2Trunk model;
  std::optional<Linear> output;  // unless tied

 private:
  std::string write_config() const override;

  InternLm2Config config_;
};

}  // namespace reprise::nn

// Qwen, the first: Bai et al., "Qwen technical report", 2023. Blocks as Llama's, without grouped
// heads, with q, k and v in one projection (thirds, with bias); of the two branches of the
// feed-forward w2 is the gate. In evaluation, and there only, two measures let it read rows longer
// than those of its training: rotary frequencies that fall with the row's length (dynamic NTK), and
// queries that grow with the logarithm of their position.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/attend.h"
#include "nn/models/language_model.h"
#include "nn/models/rotation.h"
#include "nn/norm.h"

namespace reprise::nn {

struct QwenConfig {
  std::int64_t vocabulary = 151936;  // V   vocab_size
  std::int64_t width = 4096;         // C   hidden_size, in older files n_embd
  std::int64_t inner = 11008;        // F   half of intermediate_size, ffn_hidden_size
  std::int64_t layers = 32;          //     num_hidden_layers, n_layer
  std::int64_t heads = 32;           // H   num_attention_heads, n_head
  std::int64_t head_size = 128;      // D   kv_channels
  std::int64_t positions = 8192;     //     max_position_embeddings, n_positions
  double epsilon = 1e-6;             //     layer_norm_epsilon
  double theta = 10000;              //     rotary_emb_base
  std::int64_t rotated = 128;        //     rotary_pct of D: leading elements that are rotated
  std::int64_t trained_length = 0;   //     seq_length; needed by the two below
  bool dynamic_ntk = true;           //     use_dynamic_ntk
  bool log_attention = true;         //     use_logn_attn
  bool scale_attention = true;       //     scale_attn_weights: by 1 / sqrt(D)
  bool bias = false;                 //     not no_bias; c_attn has one always
  double embedding_dropout = 0;      //     emb_dropout_prob, embd_pdrop
  double attention_dropout = 0;      //     attn_dropout_prob, attn_pdrop
  double initializer_range = 0.02;
  bool tied = false;  //     tie_word_embeddings
};

// Problems are noted in `json`.
QwenConfig read_qwen_config(JsonReader& json);

// What every block of one forward reads.
struct QwenContext {
  Visible visible;
  Rotation rotation;
  Variable query_factors = {};  // f32 [B, T]; no Variable where all are 1
};

class QwenAttention : public Module {
 public:
  QwenAttention(const QwenConfig& config, Place place);
  Variable operator()(Variable x, const QwenContext& context) const;

  Linear c_attn, c_proj;

 private:
  std::int64_t heads_, head_size_;
  double scale_, dropout_;
};

class QwenMlp : public Module {
 public:
  QwenMlp(const QwenConfig& config, Place place);
  Variable operator()(Variable x) const;

  Linear w1, w2, c_proj;
};

class QwenBlock : public Module {
 public:
  QwenBlock(const QwenConfig& config, Place place);
  Variable operator()(Variable x, const QwenContext& context) const;

  RmsNorm ln_1, ln_2;
  QwenAttention attn;
  QwenMlp mlp;
};

class QwenTrunk : public Module {
 public:
  QwenTrunk(const QwenConfig& config, Place place);
  Variable operator()(const Batch& batch, const QwenContext& context) const;

  Embedding wte;
  ModuleList<QwenBlock> h;
  RmsNorm ln_f;

 private:
  double embedding_dropout_;
};

class Qwen : public LanguageModel {
 public:
  Qwen(const QwenConfig& config, Place place);

  Variable hidden(const Batch& batch) override;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return "qwen"; }
  std::int64_t vocabulary() const override { return config_.vocabulary; }
  std::int64_t max_positions() const override { return config_.positions; }
  Linear* head() override { return lm_head ? &*lm_head : nullptr; }
  Parameter& embedding_table() override { return transformer.wte.weight; }
  std::string_view trunk_prefix() const override { return "transformer."; }
  bool is_buffer(std::string_view key) const override;
  const QwenConfig& config() const { return config_; }

  QwenTrunk transformer;
  std::optional<Linear> lm_head;  // unless tied

 private:
  std::string write_config() const override;
  // Both as of the row's length T; the positions of the batch tell where a query stands.
  RopeConfig rope_for(std::int64_t T) const;
  Variable query_factors(const Batch& batch) const;

  QwenConfig config_;
};

}  // namespace reprise::nn

// GPT-2. Radford, Wu, Child, Luan, Amodei, Sutskever, "Language models are unsupervised multitask
// learners", 2019: pre-norm blocks, learned positions, gelu, a head tied to the token table.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/activation.h"
#include "nn/models/attend.h"
#include "nn/models/language_model.h"
#include "nn/norm.h"

namespace reprise::nn {

struct Gpt2Config {
  std::int64_t vocabulary = 50257;                // V   vocab_size
  std::int64_t positions = 1024;                  //     n_positions
  std::int64_t width = 768;                       // C   n_embd
  std::int64_t layers = 12;                       //     n_layer
  std::int64_t heads = 12;                        // H   n_head
  std::int64_t inner = 4 * 768;                   // F   n_inner, or 4 C
  Activation activation = Activation::gelu_tanh;  // activation_function
  double epsilon = 1e-5;                          //     layer_norm_epsilon
  double embedding_dropout = 0.1, attention_dropout = 0.1, residual_dropout = 0.1;  // *_pdrop
  double initializer_range = 0.02;
  bool scale_attention = true;  //     scale_attn_weights: by 1 / sqrt(D)
  bool scale_by_layer = false;  //     scale_attn_by_inverse_layer_idx: by 1 / (layer + 1)
  bool tied = true;             //     tie_word_embeddings
};

// Problems are noted in `json`.
Gpt2Config read_gpt2_config(JsonReader& json);

class Gpt2Attention : public Module {
 public:
  Gpt2Attention(const Gpt2Config& config, std::int64_t layer, Place place);
  Variable operator()(Variable x, const Visible& visible) const;

  Linear c_attn, c_proj;

 private:
  std::int64_t heads_;
  double scale_, attention_dropout_, residual_dropout_;
};

class Gpt2Mlp : public Module {
 public:
  Gpt2Mlp(const Gpt2Config& config, Place place);
  Variable operator()(Variable x) const;

  Linear c_fc, c_proj;

 private:
  Activation activation_;
  double residual_dropout_;
};

class Gpt2Block : public Module {
 public:
  Gpt2Block(const Gpt2Config& config, std::int64_t layer, Place place);
  Variable operator()(Variable x, const Visible& visible) const;

  LayerNorm ln_1, ln_2;
  Gpt2Attention attn;
  Gpt2Mlp mlp;
};

class Gpt2Trunk : public Module {
 public:
  Gpt2Trunk(const Gpt2Config& config, Place place);
  Variable operator()(const Batch& batch, const Tensor& positions) const;

  Embedding wte, wpe;
  ModuleList<Gpt2Block> h;
  LayerNorm ln_f;

 private:
  double embedding_dropout_;
};

class Gpt2 : public LanguageModel {
 public:
  Gpt2(const Gpt2Config& config, Place place);

  Variable hidden(const Batch& batch) override;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return "gpt2"; }
  std::int64_t vocabulary() const override { return config_.vocabulary; }
  std::int64_t max_positions() const override { return config_.positions; }
  Linear* head() override { return lm_head ? &*lm_head : nullptr; }
  Parameter& embedding_table() override { return transformer.wte.weight; }
  std::string_view trunk_prefix() const override { return "transformer."; }
  bool is_buffer(std::string_view key) const override;
  const Gpt2Config& config() const { return config_; }

  Gpt2Trunk transformer;
  std::optional<Linear> lm_head;  // unless tied

 private:
  std::string write_config() const override;

  Gpt2Config config_;
};

}  // namespace reprise::nn

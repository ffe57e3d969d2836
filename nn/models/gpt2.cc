#include "nn/models/gpt2.h"

#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "autograd/attention.h"
#include "autograd/dropout.h"
#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "nn/blocks.h"
#include "nn/initialize.h"
#include "nn/models/limits.h"

namespace reprise::nn {

Gpt2Config read_gpt2_config(JsonReader& json) {
  Gpt2Config config;
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", 50257);
  config.positions = json.integer_between(1, kMostPositions, "n_positions", 1024);
  config.width = json.integer_between(1, kMostWidth, "n_embd", 768);
  config.layers = json.integer_between(0, kMostLayers, "n_layer", 12);
  config.heads = json.integer_between(1, kMostHeads, "n_head", 12);
  config.inner =
      json.integer_between(1, 4 * kMostWidth, "n_inner", json.status().ok() ? 4 * config.width : 1);
  config.activation = read_activation(json, "activation_function", "gelu_new");
  config.epsilon = json.number("layer_norm_epsilon", 1e-5);
  config.embedding_dropout = read_dropout(json, "embd_pdrop", 0.1);
  config.attention_dropout = read_dropout(json, "attn_pdrop", 0.1);
  config.residual_dropout = read_dropout(json, "resid_pdrop", 0.1);
  config.initializer_range = json.number("initializer_range", 0.02);
  config.scale_attention = json.boolean("scale_attn_weights", true);
  config.scale_by_layer = json.boolean("scale_attn_by_inverse_layer_idx", false);
  config.tied = json.boolean("tie_word_embeddings", true);
  if (json.status().ok() && config.width % config.heads != 0) {
    json.refuse("n_head",
                fmt::format("must divide n_embd = {}, got {}", config.width, config.heads));
  }
  if (json.boolean("add_cross_attention", false)) {
    json.refuse("add_cross_attention", "must be false: there is no encoder to attend to");
  }
  return config;
}

Gpt2Attention::Gpt2Attention(const Gpt2Config& config, std::int64_t layer, Place place)
    : c_attn(config.width, 3 * config.width, {.bias = true, .in_out = true}, place),
      c_proj(config.width, config.width, {.bias = true, .in_out = true}, place),
      heads_(config.heads),
      scale_(config.scale_attention
                 ? 1 / std::sqrt(static_cast<double>(config.width / config.heads))
                 : 1.0),
      attention_dropout_(config.attention_dropout),
      residual_dropout_(config.residual_dropout) {
  add("c_attn", c_attn);
  add("c_proj", c_proj);
  if (config.scale_by_layer) {
    scale_ /= static_cast<double>(layer + 1);
  }
}

Variable Gpt2Attention::operator()(Variable x, const Visible& visible) const {
  const std::int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const Shape heads{B, T, heads_, C / heads_};
  Variable qkv = c_attn(std::move(x));                                  // [B, T, 3C]
  Variable q = reshape(slice(qkv, 2, 0, C), heads);                     // [B, T, H, D]
  Variable k = reshape(slice(qkv, 2, C, 2 * C), heads);                 // [B, T, H, D]
  Variable v = reshape(slice(std::move(qkv), 2, 2 * C, 3 * C), heads);  // [B, T, H, D]
  Variable a = attend(std::move(q), std::move(k), std::move(v), visible,
                      {.scale = scale_, .dropout = attention_dropout_, .generator = generator()});
  Variable y = c_proj(reshape(std::move(a), Shape{B, T, C}));  // [B, T, C]
  return drop(std::move(y), residual_dropout_, generator());
}

Gpt2Mlp::Gpt2Mlp(const Gpt2Config& config, Place place)
    : c_fc(config.width, config.inner, {.bias = true, .in_out = true}, place),
      c_proj(config.inner, config.width, {.bias = true, .in_out = true}, place),
      activation_(config.activation),
      residual_dropout_(config.residual_dropout) {
  add("c_fc", c_fc);
  add("c_proj", c_proj);
}

Variable Gpt2Mlp::operator()(Variable x) const {
  Variable f = activate(activation_, c_fc(std::move(x)));             // [B, T, F]
  return drop(c_proj(std::move(f)), residual_dropout_, generator());  // [B, T, C]
}

Gpt2Block::Gpt2Block(const Gpt2Config& config, std::int64_t layer, Place place)
    : ln_1(config.width, config.epsilon, place),
      ln_2(config.width, config.epsilon, place),
      attn(config, layer, place),
      mlp(config, place) {
  add("ln_1", ln_1);
  add("attn", attn);
  add("ln_2", ln_2);
  add("mlp", mlp);
}

Variable Gpt2Block::operator()(Variable x, const Visible& visible) const {
  Variable a = attn(ln_1(x), visible);                         // [B, T, C]
  Normed n = ln_2(std::move(a), std::move(x));                 // sum = a + x
  return reprise::add(mlp(std::move(n.y)), std::move(n.sum));  // [B, T, C]
}

Gpt2Trunk::Gpt2Trunk(const Gpt2Config& config, Place place)
    : wte(config.vocabulary, config.width, std::nullopt, place),
      wpe(config.positions, config.width, std::nullopt, place),
      ln_f(config.width, config.epsilon, place),
      embedding_dropout_(config.embedding_dropout) {
  add("wte", wte);
  add("wpe", wpe);
  add("h", h);
  add("ln_f", ln_f);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    h.append(config, layer, place);
  }
}

Variable Gpt2Trunk::operator()(const Batch& batch, const Tensor& positions) const {
  Variable x = reprise::add(wte(batch.ids), wpe(positions));  // [B, T, C]
  x = drop(std::move(x), embedding_dropout_, generator());
  const Visible visible = visible_of(batch);
  x = run_blocks("h", h, std::move(x), [&](const Gpt2Block& block, Variable in) {
    return block(std::move(in), visible);
  });
  return ln_f(std::move(x));  // [B, T, C]
}

Gpt2::Gpt2(const Gpt2Config& config, Place place) : transformer(config, place), config_(config) {
  add("transformer", transformer);
  if (!config.tied) {
    lm_head.emplace(config.width, config.vocabulary, LinearOptions{}, place);
    add("lm_head", *lm_head);
  }
  name_parameters();
}

Variable Gpt2::hidden(const Batch& batch) {
  check(batch);
  if (!batch.positions.defined() && batch.starts.empty() && batch.ids.numel() > 0 &&
      batch.ids.size(1) > config_.positions) {
    fail("model", "a row may have n_positions = {} tokens, got {}", config_.positions,
         batch.ids.size(1));
  }
  return transformer(batch, positions_of(batch, /*every_row=*/true));
}

void Gpt2::initialize(Generator& generator) {
  const double deviation = config_.initializer_range;
  // The paper scales the weights that feed the residual stream by its depth.
  const double residual = deviation / std::sqrt(2.0 * static_cast<double>(config_.layers));
  for (const NamedParameter& entry : named_parameters()) {
    const bool into_stream = entry.path.ends_with("c_proj.weight");
    initialize_parameter(entry, into_stream ? residual : deviation, generator);
  }
}

bool Gpt2::is_buffer(std::string_view key) const {
  return key.ends_with(".attn.bias") || key.ends_with(".attn.masked_bias");
}

std::string Gpt2::write_config() const {
  const nlohmann::json json = {{"model_type", "gpt2"},
                               {"architectures", {"GPT2LMHeadModel"}},
                               {"vocab_size", config_.vocabulary},
                               {"n_positions", config_.positions},
                               {"n_ctx", config_.positions},
                               {"n_embd", config_.width},
                               {"n_layer", config_.layers},
                               {"n_head", config_.heads},
                               {"n_inner", config_.inner},
                               {"activation_function", name(config_.activation)},
                               {"layer_norm_epsilon", config_.epsilon},
                               {"embd_pdrop", config_.embedding_dropout},
                               {"attn_pdrop", config_.attention_dropout},
                               {"resid_pdrop", config_.residual_dropout},
                               {"initializer_range", config_.initializer_range},
                               {"scale_attn_weights", config_.scale_attention},
                               {"scale_attn_by_inverse_layer_idx", config_.scale_by_layer},
                               {"tie_word_embeddings", config_.tied}};
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

#include "nn/models/llama.h"

#include <cmath>
#include <utility>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "nn/blocks.h"

namespace reprise::nn {

LlamaAttention::LlamaAttention(const LlamaConfig& config, std::int64_t layer, Place place)
    : q_proj(config.width, config.heads * config.head_size, {.bias = config.qkv_bias}, place),
      k_proj(config.width, config.kv_heads * config.head_size, {.bias = config.qkv_bias}, place),
      v_proj(config.width, config.kv_heads * config.head_size, {.bias = config.qkv_bias}, place),
      o_proj(config.heads * config.head_size, config.width, {.bias = config.output_bias}, place),
      heads_(config.heads),
      kv_heads_(config.kv_heads),
      head_size_(config.head_size),
      window_(config.windows.empty() ? 0 : config.windows[static_cast<std::size_t>(layer)]),
      dropout_(config.attention_dropout) {
  add("q_proj", q_proj);
  add("k_proj", k_proj);
  add("v_proj", v_proj);
  add("o_proj", o_proj);
  if (config.qk_norm) {
    add("q_norm", q_norm.emplace(config.head_size, config.epsilon, place));
    add("k_norm", k_norm.emplace(config.head_size, config.epsilon, place));
  }
}

Variable LlamaAttention::operator()(Variable x, const Visible& visible,
                                    const Rotation& rotation) const {
  const std::int64_t B = x.size(0), T = x.size(1);
  const Shape q_heads{B, T, heads_, head_size_}, kv_heads{B, T, kv_heads_, head_size_};
  Variable q = reshape(q_proj(x), q_heads);              // [B, T, H, D]
  Variable k = reshape(k_proj(x), kv_heads);             // [B, T, K, D]
  Variable v = reshape(v_proj(std::move(x)), kv_heads);  // [B, T, K, D]
  if (q_norm) {
    q = (*q_norm)(std::move(q));  // over each head's D
    k = (*k_norm)(std::move(k));
  }
  q = rotation(std::move(q));
  k = rotation(std::move(k));
  const double scale = 1 / std::sqrt(static_cast<double>(head_size_));
  Variable a =
      attend(std::move(q), std::move(k), std::move(v), visible,
             {.scale = scale, .dropout = dropout_, .generator = generator(), .window = window_});
  return o_proj(reshape(std::move(a), Shape{B, T, heads_ * head_size_}));  // [B, T, C]
}

LlamaMlp::LlamaMlp(const LlamaConfig& config, Place place)
    : gate_proj(config.width, config.inner, {.bias = config.mlp_bias}, place),
      up_proj(config.width, config.inner, {.bias = config.mlp_bias}, place),
      down_proj(config.inner, config.width, {.bias = config.mlp_bias}, place),
      activation_(config.activation) {
  add("gate_proj", gate_proj);
  add("up_proj", up_proj);
  add("down_proj", down_proj);
}

Variable LlamaMlp::operator()(Variable x) const {
  Variable gate = gate_proj(x);                                                   // [B, T, F]
  Variable up = up_proj(std::move(x));                                            // [B, T, F]
  return down_proj(activate_gated(activation_, std::move(gate), std::move(up)));  // [B, T, C]
}

LlamaBlock::LlamaBlock(const LlamaConfig& config, std::int64_t layer, Place place)
    : self_attn(config, layer, place),
      mlp(config, place),
      input_layernorm(config.width, config.epsilon, place),
      post_attention_layernorm(config.width, config.epsilon, place) {
  add("input_layernorm", input_layernorm);
  add("self_attn", self_attn);
  add("post_attention_layernorm", post_attention_layernorm);
  add("mlp", mlp);
}

Variable LlamaBlock::operator()(Variable x, const Visible& visible,
                                const Rotation& rotation) const {
  Variable a = self_attn(input_layernorm(x), visible, rotation);    // [B, T, C]
  Normed n = post_attention_layernorm(std::move(a), std::move(x));  // sum = a + x
  return reprise::add(mlp(std::move(n.y)), std::move(n.sum));       // [B, T, C]
}

LlamaTrunk::LlamaTrunk(const LlamaConfig& config, Place place)
    : embed_tokens(config.vocabulary, config.width, config.padding, place),
      norm(config.width, config.epsilon, place) {
  add("embed_tokens", embed_tokens);
  add("layers", layers);
  add("norm", norm);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    layers.append(config, layer, place);
  }
}

Variable LlamaTrunk::operator()(Variable x, const Visible& visible,
                                const Rotation& rotation) const {
  x = run_blocks("layers", layers, std::move(x), [&](const LlamaBlock& block, Variable in) {
    return block(std::move(in), visible, rotation);
  });
  return norm(std::move(x));  // [B, T, C]
}

Llama::Llama(const LlamaConfig& config, Place place) : model(config, place), config_(config) {
  add("model", model);
  if (!config.tied) {
    lm_head.emplace(config.width, config.vocabulary, LinearOptions{}, place);
    add("lm_head", *lm_head);
  }
  name_parameters();
}

Variable Llama::hidden(const Batch& batch) {
  check(batch);
  const Device device = embedding_table().value().device();
  const Rotation rotation = rotation_of(config_.rope, positions_of(batch), device);
  Variable x = model.embed_tokens(batch.ids);  // [B, T, C]
  return model(std::move(x), visible_of(batch), rotation);
}

void Llama::initialize(Generator& generator) {
  for (const NamedParameter& entry : named_parameters()) {
    initialize_parameter(entry, config_.initializer_range, generator);
  }
  if (config_.padding) {
    embedding_table().write().slice(0, *config_.padding, *config_.padding + 1).zero();
  }
}

bool Llama::is_buffer(std::string_view key) const {
  return key.ends_with("rotary_emb.inv_freq");
}

}  // namespace reprise::nn

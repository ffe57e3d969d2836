#include "nn/models/qwen.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "autograd/elementwise.h"
#include "autograd/scaling.h"
#include "autograd/shape.h"
#include "nn/blocks.h"
#include "nn/models/limits.h"

namespace reprise::nn {
namespace {

// The key that this file uses: older ones have another name for it.
std::string_view spelled(const JsonReader& json, std::string_view today, std::string_view before) {
  return !json.has(today) && json.has(before) ? before : today;
}

void check(JsonReader& json, const QwenConfig& config) {
  if (!json.status().ok()) {
    return;
  }
  if (config.head_size * config.heads != config.width) {
    json.refuse("kv_channels", fmt::format("times {} = {} must be {} = {}, got {}",
                                           spelled(json, "num_attention_heads", "n_head"),
                                           config.heads, spelled(json, "hidden_size", "n_embd"),
                                           config.width, config.head_size));
  } else if (config.rotated % 2 != 0 || config.rotated < 2 || config.rotated > config.head_size) {
    json.refuse("rotary_pct", fmt::format("must leave an even number of rotated elements from 2 to "
                                          "kv_channels = {}, got {}",
                                          config.head_size, config.rotated));
  } else if (config.rotated == 2 && config.dynamic_ntk) {
    json.refuse("kv_channels", "must have more than 2 rotated elements with use_dynamic_ntk");
  } else if (!(config.theta > 1 && config.theta <= 1e30)) {
    json.refuse("rotary_emb_base",
                fmt::format("must be above 1 and at most 1e30, got {}", config.theta));
  }
}

}  // namespace

QwenConfig read_qwen_config(JsonReader& json) {
  const auto size = [&](std::int64_t least, std::int64_t most, std::string_view today,
                        std::string_view before, std::int64_t usual) {
    return json.integer_between(least, most, spelled(json, today, before), usual);
  };
  QwenConfig config;
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", 151936);
  config.width = size(1, kMostWidth, "hidden_size", "n_embd", 4096);
  // Both branches together.
  config.inner = size(2, kMostWidth, "intermediate_size", "ffn_hidden_size", 22016) / 2;
  config.layers = size(0, kMostLayers, "num_hidden_layers", "n_layer", 32);
  config.heads = size(1, kMostHeads, "num_attention_heads", "n_head", 32);
  config.head_size = json.integer_between(1, kMostHeadSize, "kv_channels", 128);
  config.positions = size(1, kMostPositions, "max_position_embeddings", "n_positions", 8192);
  config.epsilon = json.number("layer_norm_epsilon", 1e-6);
  config.theta = json.number("rotary_emb_base", 10000);
  const double share = json.number("rotary_pct", 1);
  config.rotated = share >= 0 && share <= 1
                       ? static_cast<std::int64_t>(static_cast<double>(config.head_size) * share)
                       : -1;
  config.dynamic_ntk = json.boolean("use_dynamic_ntk", true);
  config.log_attention = json.boolean("use_logn_attn", true);
  if (config.dynamic_ntk || config.log_attention || json.has("seq_length")) {
    config.trained_length = json.integer_between(2, kMostPositions, "seq_length");
  }
  config.scale_attention = json.boolean("scale_attn_weights", true);
  config.bias = !json.boolean("no_bias", true);
  config.embedding_dropout = read_dropout(json, spelled(json, "emb_dropout_prob", "embd_pdrop"), 0);
  config.attention_dropout =
      read_dropout(json, spelled(json, "attn_dropout_prob", "attn_pdrop"), 0);
  config.initializer_range = json.number("initializer_range", 0.02);
  config.tied = json.boolean("tie_word_embeddings", false);
  check(json, config);
  return config;
}

QwenAttention::QwenAttention(const QwenConfig& config, Place place)
    : c_attn(config.width, 3 * config.width, {.bias = true}, place),
      c_proj(config.width, config.width, {.bias = config.bias}, place),
      heads_(config.heads),
      head_size_(config.head_size),
      scale_(config.scale_attention ? 1 / std::sqrt(static_cast<double>(config.head_size)) : 1),
      dropout_(config.attention_dropout) {
  add("c_attn", c_attn);
  add("c_proj", c_proj);
}

Variable QwenAttention::operator()(Variable x, const QwenContext& context) const {
  const std::int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const Shape heads{B, T, heads_, head_size_};
  Variable qkv = c_attn(std::move(x));                                  // [B, T, 3C]
  Variable q = reshape(slice(qkv, 2, 0, C), heads);                     // [B, T, H, D]
  Variable k = reshape(slice(qkv, 2, C, 2 * C), heads);                 // [B, T, H, D]
  Variable v = reshape(slice(std::move(qkv), 2, 2 * C, 3 * C), heads);  // [B, T, H, D]
  q = context.rotation(std::move(q));
  k = context.rotation(std::move(k));
  if (context.query_factors.defined()) {
    q = reshape(scale_rows(reshape(std::move(q), {B, T, C}), context.query_factors), heads);
  }
  Variable a = attend(std::move(q), std::move(k), std::move(v), context.visible,
                      {.scale = scale_, .dropout = dropout_, .generator = generator()});
  return c_proj(reshape(std::move(a), {B, T, C}));  // [B, T, C]
}

QwenMlp::QwenMlp(const QwenConfig& config, Place place)
    : w1(config.width, config.inner, {.bias = config.bias}, place),
      w2(config.width, config.inner, {.bias = config.bias}, place),
      c_proj(config.inner, config.width, {.bias = config.bias}, place) {
  add("w1", w1);
  add("w2", w2);
  add("c_proj", c_proj);
}

Variable QwenMlp::operator()(Variable x) const {
  Variable gate = w2(x);                                      // [B, T, F]
  Variable up = w1(std::move(x));                             // [B, T, F]
  return c_proj(gated_silu(std::move(gate), std::move(up)));  // [B, T, C]
}

QwenBlock::QwenBlock(const QwenConfig& config, Place place)
    : ln_1(config.width, config.epsilon, place),
      ln_2(config.width, config.epsilon, place),
      attn(config, place),
      mlp(config, place) {
  add("ln_1", ln_1);
  add("attn", attn);
  add("ln_2", ln_2);
  add("mlp", mlp);
}

Variable QwenBlock::operator()(Variable x, const QwenContext& context) const {
  Variable a = attn(ln_1(x), context);                         // [B, T, C]
  Normed n = ln_2(std::move(a), std::move(x));                 // sum = a + x
  return reprise::add(mlp(std::move(n.y)), std::move(n.sum));  // [B, T, C]
}

QwenTrunk::QwenTrunk(const QwenConfig& config, Place place)
    : wte(config.vocabulary, config.width, std::nullopt, place),
      ln_f(config.width, config.epsilon, place),
      embedding_dropout_(config.embedding_dropout) {
  add("wte", wte);
  add("h", h);
  add("ln_f", ln_f);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    h.append(config, place);
  }
}

Variable QwenTrunk::operator()(const Batch& batch, const QwenContext& context) const {
  Variable x = drop(wte(batch.ids), embedding_dropout_, generator());  // [B, T, C]
  x = run_blocks("h", h, std::move(x), [&](const QwenBlock& block, Variable in) {
    return block(std::move(in), context);
  });
  return ln_f(std::move(x));  // [B, T, C]
}

Qwen::Qwen(const QwenConfig& config, Place place) : transformer(config, place), config_(config) {
  add("transformer", transformer);
  if (!config.tied) {
    lm_head.emplace(config.width, config.vocabulary, LinearOptions{}, place);
    add("lm_head", *lm_head);
  }
  name_parameters();
}

Variable Qwen::hidden(const Batch& batch) {
  check(batch);
  const QwenContext context{visible_of(batch),
                            rotation_of(rope_for(batch.ids.size(1)), positions_of(batch),
                                        embedding_table().value().device(), {.f32_tables = true}),
                            query_factors(batch)};
  return transformer(batch, context);
}

RopeConfig Qwen::rope_for(std::int64_t T) const {
  RopeConfig rope{.theta = config_.theta, .dim = config_.rotated};
  if (config_.dynamic_ntk && !training() && T > config_.trained_length) {
    const double times = static_cast<double>(T) / static_cast<double>(config_.trained_length);
    const double alpha = std::exp2(std::ceil(std::log2(times) + 1)) - 1;
    const auto D = static_cast<double>(config_.rotated);
    rope.theta *= std::pow(alpha, D / (D - 2));
  }
  return rope;
}

Variable Qwen::query_factors(const Batch& batch) const {
  const std::int64_t B = batch.ids.size(0), T = batch.ids.size(1);
  if (!config_.log_attention || training() || T <= config_.trained_length) {
    return {};
  }
  const auto trained = static_cast<double>(config_.trained_length);
  std::vector<float> factors;
  for (const std::int64_t position :
       positions_of(batch, /*every_row=*/true).to_vector<std::int64_t>()) {
    const auto place = static_cast<double>(position + 1);  // counted from 1
    factors.push_back(static_cast<float>(std::max(std::log(place) / std::log(trained), 1.0)));
  }
  return Variable(Tensor::from(factors, Shape{B, T}, transformer.wte.weight.value().device()));
}

void Qwen::initialize(Generator& generator) {
  const double deviation = config_.initializer_range;
  const double residual = deviation / std::sqrt(2.0 * static_cast<double>(config_.layers));
  for (const NamedParameter& entry : named_parameters()) {
    const bool into_stream = entry.path.ends_with("c_proj.weight");
    initialize_parameter(entry, into_stream ? residual : deviation, generator);
  }
}

bool Qwen::is_buffer(std::string_view key) const {
  return key.ends_with("rotary_emb.inv_freq") || key.ends_with(".attn.masked_bias") ||
         key.ends_with(".attn.logn_tensor");
}

std::string Qwen::write_config() const {
  nlohmann::json json = {
      {"model_type", type()},
      {"architectures", {"QWenLMHeadModel"}},
      {"vocab_size", config_.vocabulary},
      {"hidden_size", config_.width},
      {"intermediate_size", 2 * config_.inner},
      {"num_hidden_layers", config_.layers},
      {"num_attention_heads", config_.heads},
      {"kv_channels", config_.head_size},
      {"max_position_embeddings", config_.positions},
      {"layer_norm_epsilon", config_.epsilon},
      {"rotary_emb_base", config_.theta},
      {"rotary_pct", static_cast<double>(config_.rotated) / static_cast<double>(config_.head_size)},
      {"use_dynamic_ntk", config_.dynamic_ntk},
      {"use_logn_attn", config_.log_attention},
      {"scale_attn_weights", config_.scale_attention},
      {"no_bias", !config_.bias},
      {"emb_dropout_prob", config_.embedding_dropout},
      {"attn_dropout_prob", config_.attention_dropout},
      {"initializer_range", config_.initializer_range},
      {"tie_word_embeddings", config_.tied}};
  if (config_.trained_length > 0) {
    json["seq_length"] = config_.trained_length;
  }
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

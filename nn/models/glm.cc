#include "nn/models/glm.h"

#include <span>
#include <utility>

#include <fmt/format.h>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "nn/blocks.h"
#include "nn/models/attend.h"
#include "nn/models/decoder_config.h"
#include "nn/models/limits.h"

namespace reprise::nn {

GlmConfig read_glm_config(JsonReader& json, std::string_view type) {
  GlmConfig config;
  config.type = type;
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", 151552);
  config.width = json.integer_between(1, kMostWidth, "hidden_size", 4096);
  config.inner = json.integer_between(1, kMostWidth, "intermediate_size", 13696);
  config.layers = json.integer_between(0, kMostLayers, "num_hidden_layers", 40);
  const Heads heads =
      read_heads(json, config.width, {.heads = 32, .kv_heads = 2, .head_size = 128});
  config.heads = heads.heads;
  config.kv_heads = heads.kv_heads;
  config.head_size = heads.head_size;
  config.positions = json.integer_between(1, kMostPositions, "max_position_embeddings", 131072);
  config.activation = read_activation(json, "hidden_act", "silu");
  config.epsilon = json.number("rms_norm_eps", 1.5625e-7);
  config.rope = read_rope(json, config.head_size, config.positions, 10000, 0.5);
  config.qkv_bias = json.boolean("attention_bias", true);
  config.attention_dropout = read_dropout(json, "attention_dropout", 0);
  config.initializer_range = json.number("initializer_range", 0.02);
  config.padding = read_padding(json, config.vocabulary, 151329);
  config.tied = json.boolean("tie_word_embeddings", false);
  return config;
}

GlmConfig read_chatglm_config(JsonReader& json) {
  GlmConfig config;
  config.type = "glm";
  config.vocabulary = json.integer_between(1, kMostTokens, "padded_vocab_size");
  config.width = json.integer_between(1, kMostWidth, "hidden_size");
  config.inner = json.integer_between(1, kMostWidth, "ffn_hidden_size");
  config.layers = json.integer_between(0, kMostLayers, "num_layers");
  config.heads = json.integer_between(1, kMostHeads, "num_attention_heads");
  config.kv_heads = json.boolean("multi_query_attention", false)
                        ? json.integer_between(1, kMostHeads, "multi_query_group_num")
                        : config.heads;
  config.head_size = json.integer_between(1, kMostHeadSize, "kv_channels");
  config.positions = json.integer_between(1, kMostPositions, "seq_length");
  config.epsilon = json.number("layernorm_epsilon");
  const double ratio = json.number("rope_ratio", 1);
  if (json.status().ok() && !(ratio > 0 && ratio < 1e20)) {
    json.refuse("rope_ratio", fmt::format("must be above 0 and below 1e20, got {}", ratio));
  }
  if (json.status().ok() && config.head_size % 4 != 0) {
    json.refuse("kv_channels", fmt::format("must be a multiple of 4: half of a head is rotated, in "
                                           "pairs; got {}",
                                           config.head_size));
  }
  if (json.status().ok() && config.heads % config.kv_heads != 0) {
    json.refuse("multi_query_group_num", fmt::format("must divide num_attention_heads = {}, got {}",
                                                     config.heads, config.kv_heads));
  }
  config.rope = {
      .theta = 10000 * ratio, .dim = config.head_size / 2, .max_positions = config.positions};
  config.qkv_bias = json.boolean("add_qkv_bias", false);
  config.attention_dropout = read_dropout(json, "attention_dropout", 0);
  config.padding = read_padding(json, config.vocabulary, std::nullopt);
  config.tied = json.boolean("tie_word_embeddings", false);
  // What no published model has.
  for (const auto& [key, expected] :
       {std::pair("add_bias_linear", false),
        std::pair("apply_residual_connection_post_layernorm", false), std::pair("rmsnorm", true),
        std::pair("post_layer_norm", true)}) {
    if (json.boolean(key, expected) != expected) {
      json.refuse(key, fmt::format("must be {}, got {}", expected, !expected));
    }
  }
  return config;
}

GlmMlp::GlmMlp(const GlmConfig& config, Place place)
    : gate_up_proj(config.width, 2 * config.inner, {}, place),
      down_proj(config.inner, config.width, {}, place),
      activation_(config.activation),
      inner_(config.inner) {
  add("gate_up_proj", gate_up_proj);
  add("down_proj", down_proj);
}

Variable GlmMlp::operator()(Variable x) const {
  Variable gate_up = gate_up_proj(std::move(x));  // [B, T, 2F]
  if (activation_ == Activation::silu) {
    return down_proj(gated_silu(std::move(gate_up)));  // [B, T, C]
  }
  Variable gate = contiguous(slice(gate_up, 2, 0, inner_));                       // [B, T, F]
  Variable up = contiguous(slice(std::move(gate_up), 2, inner_, 2 * inner_));     // [B, T, F]
  return down_proj(activate_gated(activation_, std::move(gate), std::move(up)));  // [B, T, C]
}

GlmBlock::GlmBlock(const GlmConfig& config, std::int64_t layer, Place place)
    : self_attn(config, layer, place),
      mlp(config, place),
      input_layernorm(config.width, config.epsilon, place),
      post_attention_layernorm(config.width, config.epsilon, place) {
  add("input_layernorm", input_layernorm);
  add("self_attn", self_attn);
  add("post_attention_layernorm", post_attention_layernorm);
  add("mlp", mlp);
  if (config.type == "glm4") {
    add("post_self_attn_layernorm",
        post_self_attn_layernorm.emplace(config.width, config.epsilon, place));
    add("post_mlp_layernorm", post_mlp_layernorm.emplace(config.width, config.epsilon, place));
  }
}

Variable GlmBlock::operator()(Variable x, const Visible& visible, const Rotation& rotation) const {
  Variable a = self_attn(input_layernorm(x), visible, rotation);  // [B, T, C]
  if (post_self_attn_layernorm) {
    a = (*post_self_attn_layernorm)(std::move(a));  // [B, T, C]
  }
  Normed n = post_attention_layernorm(std::move(a), std::move(x));  // sum = a + x
  Variable m = mlp(std::move(n.y));                                 // [B, T, C]
  if (post_mlp_layernorm) {
    m = (*post_mlp_layernorm)(std::move(m));  // [B, T, C]
  }
  return reprise::add(std::move(m), std::move(n.sum));  // [B, T, C]
}

GlmTrunk::GlmTrunk(const GlmConfig& config, Place place)
    : embed_tokens(config.vocabulary, config.width, config.padding, place),
      norm(config.width, config.epsilon, place) {
  add("embed_tokens", embed_tokens);
  add("layers", layers);
  add("norm", norm);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    layers.append(config, layer, place);
  }
}

Variable GlmTrunk::operator()(const Batch& batch, const Rotation& rotation) const {
  Variable x = embed_tokens(batch.ids);  // [B, T, C]
  const Visible visible = visible_of(batch);
  x = run_blocks("layers", layers, std::move(x), [&](const GlmBlock& block, Variable in) {
    return block(std::move(in), visible, rotation);
  });
  return norm(std::move(x));  // [B, T, C]
}

Glm::Glm(const GlmConfig& config, Place place) : model(config, place), config_(config) {
  add("model", model);
  if (!config.tied) {
    lm_head.emplace(config.width, config.vocabulary, LinearOptions{}, place);
    add("lm_head", *lm_head);
  }
  name_parameters();
}

Variable Glm::hidden(const Batch& batch) {
  check(batch);
  return model(batch,
               rotation_of(config_.rope, positions_of(batch), embedding_table().value().device(),
                           {.style = RopeStyle::interleaved}));
}

void Glm::initialize(Generator& generator) {
  for (const NamedParameter& entry : named_parameters()) {
    initialize_parameter(entry, config_.initializer_range, generator);
  }
  if (config_.padding) {
    embedding_table().write().slice(0, *config_.padding, *config_.padding + 1).zero();
  }
}

std::vector<FileKey> Glm::file_keys(const std::string& path) const {
  std::vector<FileKey> keys = LanguageModel::file_keys(path);
  if (config_.type != "glm") {
    return keys;
  }
  const std::int64_t q_rows = config_.heads * config_.head_size;
  const std::int64_t k_rows = config_.kv_heads * config_.head_size;
  struct Name {
    std::string_view ours, theirs;
    std::int64_t first = 0, rows = 0;
  };
  const std::int64_t rows = q_rows + 2 * k_rows;
  const Name in_layer[] = {
      {"self_attn.q_proj.", "self_attention.query_key_value.", 0, rows},
      {"self_attn.k_proj.", "self_attention.query_key_value.", q_rows, rows},
      {"self_attn.v_proj.", "self_attention.query_key_value.", q_rows + k_rows, rows},
      {"self_attn.o_proj.", "self_attention.dense."},
      {"mlp.gate_up_proj.", "mlp.dense_h_to_4h."},
      {"mlp.down_proj.", "mlp.dense_4h_to_h."},
      {"input_layernorm.", "input_layernorm."},
      {"post_attention_layernorm.", "post_attention_layernorm."},
  };
  const Name outside[] = {{"model.embed_tokens.", "transformer.embedding.word_embeddings."},
                          {"model.norm.", "transformer.encoder.final_layernorm."},
                          {"lm_head.", "transformer.output_layer."}};
  const std::string_view layers = "model.layers.";
  const std::size_t dot = path.starts_with(layers) ? path.find('.', layers.size()) : path.npos;
  const std::string before =
      dot == path.npos
          ? ""
          : "transformer.encoder.layers." + path.substr(layers.size(), dot + 1 - layers.size());
  const std::string_view rest = std::string_view(path).substr(dot == path.npos ? 0 : dot + 1);
  const std::span<const Name> names =
      dot == path.npos ? std::span<const Name>(outside) : std::span<const Name>(in_layer);
  for (const Name& name : names) {
    const std::string_view last =
        rest.starts_with(name.ours) ? rest.substr(name.ours.size()) : std::string_view();
    if (last == "weight" || last == "bias") {  // an adapter has names that they do not have
      keys.push_back({fmt::format("{}{}{}", before, name.theirs, last), name.first, name.rows});
    }
  }
  return keys;
}

bool Glm::is_buffer(std::string_view key) const {
  return key.ends_with("rotary_emb.inv_freq") || key.ends_with("rotary_pos_emb.inv_freq");
}

std::string Glm::write_config() const {
  nlohmann::json json = llama_json(config_);
  json["model_type"] = config_.type;
  json["architectures"] = {config_.type == "glm" ? "GlmForCausalLM" : "Glm4ForCausalLM"};
  json["attention_bias"] = config_.qkv_bias;
  json["partial_rotary_factor"] =
      static_cast<double>(config_.rope.dim) / static_cast<double>(config_.head_size);
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

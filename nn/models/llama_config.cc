#include <algorithm>

#include <fmt/format.h>

#include "nn/models/attend.h"
#include "nn/models/limits.h"
#include "nn/models/llama.h"

namespace reprise::nn {
namespace {

// The window of each layer; nothing when no layer has one.
std::vector<std::int64_t> read_windows(JsonReader& json, std::int64_t layers) {
  // Off, the size means nothing and may be anything; on, an absent size is the class default, and
  // null is no window at all.
  const bool on = json.boolean("use_sliding_window", false) && !json.is_null("sliding_window");
  const std::int64_t window = on ? json.integer("sliding_window", 4096) : 0;
  const std::int64_t first = json.integer_from(0, "max_window_layers", 28);
  std::vector<std::int64_t> windows(static_cast<std::size_t>(std::max<std::int64_t>(layers, 0)), 0);
  bool used = false;
  if (json.has("layer_types")) {
    const std::vector<std::string> types = json.strings("layer_types");
    if (json.status().ok() && types.size() != windows.size()) {
      json.refuse("layer_types", fmt::format("must have num_hidden_layers = {} entries, got {}",
                                             layers, types.size()));
      return {};
    }
    for (std::size_t i = 0; i < types.size() && i < windows.size(); ++i) {
      if (types[i] == "sliding_attention") {
        if (!on) {
          json.refuse("layer_types",
                      "must not have sliding_attention without use_sliding_window and a "
                      "sliding_window");
        }
        windows[i] = window;
        used = true;
      } else if (types[i] != "full_attention") {
        json.refuse("layer_types", fmt::format("must hold full_attention or sliding_attention, got "
                                               "\"{}\"",
                                               types[i]));
      }
    }
  } else if (on) {
    for (std::int64_t i = first; i < layers; ++i) {
      windows[static_cast<std::size_t>(i)] = window;
      used = true;
    }
  }
  if (json.status().ok() && used && window < 1) {
    json.refuse("sliding_window", fmt::format("must be at least 1, got {}", window));
  }
  return used ? windows : std::vector<std::int64_t>{};
}

void check_heads(JsonReader& json, const LlamaConfig& config) {
  if (!json.status().ok()) {
    return;
  }
  if (!json.has("head_dim") && config.width % config.heads != 0) {
    json.refuse("num_attention_heads",
                fmt::format("must divide hidden_size = {}, got {}", config.width, config.heads));
  } else if (config.heads % config.kv_heads != 0) {
    json.refuse("num_key_value_heads", fmt::format("must divide num_attention_heads = {}, got {}",
                                                   config.heads, config.kv_heads));
  }
}

nlohmann::json rope_json(const RopeConfig& rope) {
  switch (rope.scaling) {
    case RopeScaling::none:
      return nullptr;
    case RopeScaling::linear:
      return {{"rope_type", "linear"}, {"factor", rope.factor}};
    case RopeScaling::dynamic:
      return {{"rope_type", "dynamic"}, {"factor", rope.factor}};
    case RopeScaling::llama3:
      return {{"rope_type", "llama3"},
              {"factor", rope.factor},
              {"low_freq_factor", rope.low_frequency},
              {"high_freq_factor", rope.high_frequency},
              {"original_max_position_embeddings", rope.original_positions}};
    case RopeScaling::yarn:
      return {{"rope_type", "yarn"},
              {"factor", rope.factor},
              {"attention_factor", rope.attention_factor},
              {"beta_fast", rope.beta_fast},
              {"beta_slow", rope.beta_slow},
              {"truncate", rope.truncate},
              {"original_max_position_embeddings", rope.original_positions}};
  }
  return nullptr;
}

}  // namespace

LlamaConfig read_llama_config(JsonReader& json, std::string_view type) {
  const bool qwen = type == "qwen2";
  LlamaConfig config;
  config.type = type;
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", qwen ? 151936 : 32000);
  config.width = json.integer_between(1, kMostWidth, "hidden_size", 4096);
  config.inner = json.integer_between(1, kMostWidth, "intermediate_size", qwen ? 22016 : 11008);
  config.layers = json.integer_between(0, kMostLayers, "num_hidden_layers", 32);
  config.heads = json.integer_between(1, kMostHeads, "num_attention_heads", 32);
  // An absent key is 32 for Qwen2's class; null, and Llama's default, is the number of heads.
  const bool absent = !json.has("num_key_value_heads") && !json.is_null("num_key_value_heads");
  config.kv_heads = json.integer_between(1, kMostHeads, "num_key_value_heads",
                                         qwen && absent ? 32 : config.heads);
  config.head_size = json.integer_between(
      1, kMostHeadSize, "head_dim",
      std::max<std::int64_t>(config.width / std::max<std::int64_t>(config.heads, 1), 1));
  config.positions =
      json.integer_between(1, kMostPositions, "max_position_embeddings", qwen ? 32768 : 2048);
  config.activation = read_activation(json, "hidden_act", "silu");
  config.epsilon = json.number("rms_norm_eps", 1e-6);
  check_heads(json, config);
  config.rope = read_rope(json, config.head_size, config.positions, 10000);
  config.qkv_bias = qwen || json.boolean("attention_bias", false);
  config.output_bias = !qwen && config.qkv_bias;
  config.mlp_bias = !qwen && json.boolean("mlp_bias", false);
  config.attention_dropout = read_dropout(json, "attention_dropout", 0);
  if (qwen) {
    config.windows = read_windows(json, config.layers);
  }
  config.initializer_range = json.number("initializer_range", 0.02);
  if (json.has("pad_token_id")) {
    // A negative id counts from the end of the table, as in the reference: -1 is the last row.
    const std::int64_t id = json.integer("pad_token_id");
    if (json.status().ok() && (id >= config.vocabulary || id < -config.vocabulary)) {
      json.refuse("pad_token_id", fmt::format("must be from {} to below vocab_size = {}, got {}",
                                              -config.vocabulary, config.vocabulary, id));
    }
    config.padding = id < 0 ? config.vocabulary + id : id;
  }
  config.tied = json.boolean("tie_word_embeddings", false);
  return config;
}

std::string Llama::write_config() const {
  const bool qwen = config_.type == "qwen2";
  nlohmann::json json = {{"model_type", config_.type},
                         {"architectures", {qwen ? "Qwen2ForCausalLM" : "LlamaForCausalLM"}},
                         {"vocab_size", config_.vocabulary},
                         {"hidden_size", config_.width},
                         {"intermediate_size", config_.inner},
                         {"num_hidden_layers", config_.layers},
                         {"num_attention_heads", config_.heads},
                         {"num_key_value_heads", config_.kv_heads},
                         {"head_dim", config_.head_size},
                         {"max_position_embeddings", config_.positions},
                         {"hidden_act", name(config_.activation)},
                         {"rms_norm_eps", config_.epsilon},
                         {"rope_theta", config_.rope.theta},
                         {"rope_scaling", rope_json(config_.rope)},
                         {"attention_dropout", config_.attention_dropout},
                         {"initializer_range", config_.initializer_range},
                         {"tie_word_embeddings", config_.tied}};
  if (config_.rope.dim != config_.head_size) {
    json["partial_rotary_factor"] =
        static_cast<double>(config_.rope.dim) / static_cast<double>(config_.head_size);
  }
  if (config_.padding) {
    json["pad_token_id"] = *config_.padding;
  }
  if (!qwen) {
    json["attention_bias"] = config_.qkv_bias;
    json["mlp_bias"] = config_.mlp_bias;
  } else if (!config_.windows.empty()) {
    json["use_sliding_window"] = true;
    for (const std::int64_t window : config_.windows) {
      json["layer_types"].push_back(window > 0 ? "sliding_attention" : "full_attention");
      if (window > 0) {
        json["sliding_window"] = window;
      }
    }
  }
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

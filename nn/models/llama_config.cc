#include <algorithm>

#include <fmt/format.h>

#include "nn/models/attend.h"
#include "nn/models/llama.h"

namespace reprise::nn {
namespace {

// The window of each layer; nothing when no layer has one.
std::vector<std::int64_t> read_windows(JsonReader& json, std::int64_t layers) {
  const bool on = json.boolean("use_sliding_window", false);
  const std::int64_t window = json.integer_from(1, "sliding_window", 4096);
  const std::int64_t first = json.integer_from(0, "max_window_layers", 28);
  std::vector<std::int64_t> windows(static_cast<std::size_t>(layers), 0);
  if (json.has("layer_types")) {
    const std::vector<std::string> types = json.strings("layer_types");
    if (json.status().ok() && types.size() != windows.size()) {
      json.refuse("layer_types", fmt::format("must have num_hidden_layers = {} entries, got {}",
                                             layers, types.size()));
      return {};
    }
    for (std::size_t i = 0; i < types.size() && i < windows.size(); ++i) {
      if (types[i] == "sliding_attention") {
        windows[i] = window;
      } else if (types[i] != "full_attention") {
        json.refuse("layer_types", fmt::format("must hold full_attention or sliding_attention, got "
                                               "\"{}\"",
                                               types[i]));
      }
    }
    if (json.status().ok() && !on &&
        std::any_of(windows.begin(), windows.end(), [](auto w) { return w > 0; })) {
      json.refuse("use_sliding_window", "must be true when layer_types has sliding_attention");
    }
  } else if (on) {
    for (std::int64_t i = first; i < layers; ++i) {
      windows[static_cast<std::size_t>(i)] = window;
    }
  }
  const bool any = std::any_of(windows.begin(), windows.end(), [](auto w) { return w > 0; });
  return any ? windows : std::vector<std::int64_t>{};
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
  config.vocabulary = json.integer_from(1, "vocab_size", qwen ? 151936 : 32000);
  config.width = json.integer_from(1, "hidden_size", 4096);
  config.inner = json.integer_from(1, "intermediate_size", qwen ? 22016 : 11008);
  config.layers = json.integer_from(0, "num_hidden_layers", 32);
  config.heads = json.integer_from(1, "num_attention_heads", 32);
  // An absent key is 32 for Qwen2's class; null, and Llama's default, is the number of heads.
  const bool absent = std::ranges::count(json.keys(), "num_key_value_heads") == 0;
  config.kv_heads = json.integer_from(1, "num_key_value_heads", qwen && absent ? 32 : config.heads);
  config.head_size = json.integer_from(
      1, "head_dim",
      std::max<std::int64_t>(config.width / std::max<std::int64_t>(config.heads, 1), 1));
  config.positions = json.integer_from(1, "max_position_embeddings", qwen ? 32768 : 2048);
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
    // A negative id counts from the end of the table in the reference; -1 there means none.
    const std::int64_t id = json.integer("pad_token_id");
    if (json.status().ok() && id >= config.vocabulary) {
      json.refuse("pad_token_id",
                  fmt::format("must be below vocab_size = {}, got {}", config.vocabulary, id));
    }
    if (id >= 0) {
      config.padding = id;
    }
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

#include <algorithm>
#include <optional>

#include <fmt/format.h>

#include "core/error.h"
#include "nn/models/attend.h"
#include "nn/models/decoder_config.h"
#include "nn/models/limits.h"
#include "nn/models/llama.h"

namespace reprise::nn {
namespace {

// What the classes of the reference have for keys that a config leaves out.
struct Defaults {
  std::string_view type;
  std::int64_t vocabulary, width, inner, layers, heads;
  std::optional<std::int64_t> kv_heads;   // else the number of heads
  std::optional<std::int64_t> head_size;  // else C / H
  std::int64_t positions;
  double epsilon, theta;
  std::int64_t first_window;  // max_window_layers
};
constexpr std::nullopt_t kNone = std::nullopt;
constexpr Defaults kDefaults[] = {
    {"llama", 32000, 4096, 11008, 32, 32, kNone, kNone, 2048, 1e-6, 1e4, 0},
    {"qwen2", 151936, 4096, 22016, 32, 32, 32, kNone, 32768, 1e-6, 1e4, 28},
    {"qwen3", 151936, 4096, 22016, 32, 32, 32, 128, 32768, 1e-6, 1e4, 28},
    {"qwen2_vl", 152064, 8192, 29568, 80, 64, 8, kNone, 32768, 1e-5, 1e6, 80},
};

const Defaults& defaults_of(std::string_view type) {
  for (const Defaults& each : kDefaults) {
    if (each.type == type) {
      return each;
    }
  }
  fail("read_llama_config", "type must be llama, qwen2, qwen3 or qwen2_vl, got {}", type);
}

// The window of each layer; nothing when no layer has one. `usual`: the default of the first layer
// that has one.
std::vector<std::int64_t> read_windows(JsonReader& json, std::int64_t layers, std::int64_t usual) {
  // Off, the size means nothing and may be anything; on, an absent size is the class default, and
  // null is no window at all.
  const bool on = json.boolean("use_sliding_window", false) && !json.is_null("sliding_window");
  const std::int64_t window = on ? json.integer("sliding_window", 4096) : 0;
  const std::int64_t first = json.integer_from(0, "max_window_layers", usual);
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

}  // namespace

LlamaConfig read_llama_config(JsonReader& json, std::string_view type) {
  const Defaults& usual = defaults_of(type);
  LlamaConfig config;
  config.type = type;
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", usual.vocabulary);
  config.width = json.integer_between(1, kMostWidth, "hidden_size", usual.width);
  config.inner = json.integer_between(1, kMostWidth, "intermediate_size", usual.inner);
  config.layers = json.integer_between(0, kMostLayers, "num_hidden_layers", usual.layers);
  const Heads heads =
      read_heads(json, config.width, {usual.heads, usual.kv_heads, usual.head_size});
  config.heads = heads.heads;
  config.kv_heads = heads.kv_heads;
  config.head_size = heads.head_size;
  config.positions =
      json.integer_between(1, kMostPositions, "max_position_embeddings", usual.positions);
  config.activation = read_activation(json, "hidden_act", "silu");
  config.epsilon = json.number("rms_norm_eps", usual.epsilon);
  config.rope = read_rope(json, config.head_size, config.positions, usual.theta);
  const bool llama = type == "llama", qwen3 = type == "qwen3";
  const bool biased = (llama || qwen3) && json.boolean("attention_bias", false);
  config.qkv_bias = biased || !(llama || qwen3);
  config.output_bias = biased;
  config.mlp_bias = llama && json.boolean("mlp_bias", false);
  config.qk_norm = qwen3;
  config.attention_dropout = read_dropout(json, "attention_dropout", 0);
  if (!llama) {
    config.windows = read_windows(json, config.layers, usual.first_window);
  }
  config.initializer_range = json.number("initializer_range", 0.02);
  config.padding = read_padding(json, config.vocabulary, std::nullopt);
  config.tied = json.boolean("tie_word_embeddings", false);
  return config;
}

nlohmann::json llama_json(const LlamaConfig& config) {
  nlohmann::json json = {{"vocab_size", config.vocabulary},
                         {"hidden_size", config.width},
                         {"intermediate_size", config.inner},
                         {"num_hidden_layers", config.layers},
                         {"num_attention_heads", config.heads},
                         {"num_key_value_heads", config.kv_heads},
                         {"head_dim", config.head_size},
                         {"max_position_embeddings", config.positions},
                         {"hidden_act", name(config.activation)},
                         {"rms_norm_eps", config.epsilon},
                         {"rope_theta", config.rope.theta},
                         {"rope_scaling", rope_json(config.rope)},
                         {"attention_dropout", config.attention_dropout},
                         {"initializer_range", config.initializer_range},
                         {"tie_word_embeddings", config.tied}};
  if (config.rope.dim != config.head_size) {
    json["partial_rotary_factor"] =
        static_cast<double>(config.rope.dim) / static_cast<double>(config.head_size);
  }
  json["pad_token_id"] = config.padding ? nlohmann::json(*config.padding) : nlohmann::json();
  if (config.type == "llama" || config.type == "qwen3") {
    json["attention_bias"] = config.qkv_bias;
  }
  if (config.type == "llama") {
    json["mlp_bias"] = config.mlp_bias;
  } else if (!config.windows.empty()) {
    json["use_sliding_window"] = true;
    for (const std::int64_t window : config.windows) {
      json["layer_types"].push_back(window > 0 ? "sliding_attention" : "full_attention");
      if (window > 0) {
        json["sliding_window"] = window;
      }
    }
  }
  return json;
}

std::string Llama::write_config() const {
  nlohmann::json json = llama_json(config_);
  json["model_type"] = config_.type;
  json["architectures"] = {config_.type == "llama"   ? "LlamaForCausalLM"
                           : config_.type == "qwen2" ? "Qwen2ForCausalLM"
                                                     : "Qwen3ForCausalLM"};
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

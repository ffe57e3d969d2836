#include "nn/models/decoder_config.h"

#include <algorithm>

#include <fmt/format.h>

#include "nn/models/limits.h"

namespace reprise::nn {

Heads read_heads(JsonReader& json, std::int64_t width, const HeadDefaults& usual) {
  const auto otherwise = [&](std::string_view key, const std::optional<std::int64_t>& value,
                             std::int64_t derived) {
    return json.is_null(key) ? derived : value.value_or(derived);
  };
  Heads read{};
  read.heads = json.integer_between(1, kMostHeads, "num_attention_heads", usual.heads);
  read.kv_heads =
      json.integer_between(1, kMostHeads, "num_key_value_heads",
                           otherwise("num_key_value_heads", usual.kv_heads, read.heads));
  const std::int64_t divided =
      std::max<std::int64_t>(width / std::max<std::int64_t>(read.heads, 1), 1);
  read.head_size = json.integer_between(1, kMostHeadSize, "head_dim",
                                        otherwise("head_dim", usual.head_size, divided));
  if (!json.status().ok()) {
    return read;
  }
  const bool derived = !json.has("head_dim") && (json.is_null("head_dim") || !usual.head_size);
  if (derived && width % read.heads != 0) {
    json.refuse("num_attention_heads",
                fmt::format("must divide hidden_size = {}, got {}", width, read.heads));
  } else if (read.heads % read.kv_heads != 0) {
    json.refuse("num_key_value_heads", fmt::format("must divide num_attention_heads = {}, got {}",
                                                   read.heads, read.kv_heads));
  }
  return read;
}

std::optional<std::int64_t> read_padding(JsonReader& json, std::int64_t vocabulary,
                                         std::optional<std::int64_t> otherwise) {
  if (json.is_null("pad_token_id") || (!json.has("pad_token_id") && !otherwise)) {
    return std::nullopt;
  }
  // A negative id counts from the end of the table, as in the reference: -1 is the last row.
  const std::int64_t id = json.integer("pad_token_id", otherwise);
  if (json.status().ok() && (id >= vocabulary || id < -vocabulary)) {
    json.refuse("pad_token_id", fmt::format("must be from {} to below vocab_size = {}, got {}",
                                            -vocabulary, vocabulary, id));
  }
  return id < 0 ? vocabulary + id : id;
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

}  // namespace reprise::nn

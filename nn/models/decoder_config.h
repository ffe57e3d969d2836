// What the configs of many decoders have in common: heads, the padding row, rope as it is written.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>

#include "nn/rope_config.h"
#include "nn/weights/json.h"

namespace reprise::nn {

// Of keys that are absent.
struct HeadDefaults {
  std::int64_t heads = 32;
  std::optional<std::int64_t> kv_heads{};   // else the number of heads; null is that always
  std::optional<std::int64_t> head_size{};  // else hidden_size / heads; null is that always
};

struct Heads {
  std::int64_t heads, kv_heads, head_size;  // H, K, D
};
// num_attention_heads, num_key_value_heads and head_dim of a model of the given width.
Heads read_heads(JsonReader& json, std::int64_t width, const HeadDefaults& usual);

// pad_token_id: the row of the token table that has no gradient. Null is none.
std::optional<std::int64_t> read_padding(JsonReader& json, std::int64_t vocabulary,
                                         std::optional<std::int64_t> otherwise);

// The value of rope_scaling.
nlohmann::json rope_json(const RopeConfig& rope);

}  // namespace reprise::nn

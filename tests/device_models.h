// The small models that train in the tests of devices.
#pragma once

#include "core/device.h"

namespace reprise::testing {

inline constexpr Device kDevice{DeviceKind::cuda, 0};

inline constexpr const char* kGpt2 = R"({
  "model_type": "gpt2", "vocab_size": 67, "n_positions": 32, "n_embd": 24, "n_layer": 2,
  "n_head": 3, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})";
inline constexpr const char* kLlama = R"({
  "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
  "max_position_embeddings": 64, "tie_word_embeddings": false})";

}  // namespace reprise::testing

// Rotary position embedding as config.json describes it: which frequencies a model rotates by.
//
// Without scaling, frequency i of D/2 is theta^(-2i/D). Types of scaling:
//   linear    all frequencies / factor
//   dynamic   theta grows with the length S of the sequence once it exceeds max_positions M:
//             theta (factor S/M - factor + 1)^(D/(D-2))
//   llama3    wavelengths above original/low are divided by factor, those under original/high stay,
//             in between a blend
//   yarn      dimensions that turn more than beta_fast times over the original length stay, those
//             under beta_slow are divided by factor, a ramp in between; cos and sin are multiplied
//             by the attention factor
// Computed in f32, in the order in which the reference implementation does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "nn/weights/json.h"

namespace reprise::nn {

enum class RopeScaling : std::uint8_t { none, linear, dynamic, llama3, yarn };

struct RopeConfig {
  double theta = 10000;
  std::int64_t dim = 0;  // D: leading elements of a head that are rotated
  RopeScaling scaling = RopeScaling::none;
  double factor = 1;
  std::int64_t max_positions = 0;
  std::int64_t original_positions = 0;           // llama3, yarn
  double low_frequency = 1, high_frequency = 4;  // llama3
  double beta_fast = 32, beta_slow = 1;          // yarn
  double attention_factor = 1;                   // yarn; multiplies cos and sin
  bool truncate = true;                          // yarn: whole dimensions bound the ramp
};

// Reads rope_theta, rope_scaling and partial_rotary_factor (older files) or rope_parameters
// (newer).
RopeConfig read_rope(JsonReader& json, std::int64_t head_size, std::int64_t max_positions,
                     double default_theta, double default_share = 1);

// D/2 frequencies for sequences of `length` positions (largest position + 1).
std::vector<float> rope_frequencies(const RopeConfig& config, std::int64_t length);

}  // namespace reprise::nn

#include "nn/models/rotation.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/error.h"
#include "nn/models/limits.h"

namespace reprise::nn {

Rotation rotation_of(const RopeConfig& config, const Tensor& positions, Device device,
                     RopeOptions options) {
  const std::vector<std::int64_t> at = positions.to_vector<std::int64_t>();
  for (const std::int64_t position : at) {
    if (position < 0 || position >= kMostPositions) {
      fail("model", "positions must be from 0 to {}, got {}", kMostPositions - 1, position);
    }
  }
  const std::int64_t length = at.empty() ? 0 : *std::max_element(at.begin(), at.end()) + 1;
  const std::vector<float> frequencies = rope_frequencies(config, length);
  const Shape half{static_cast<std::int64_t>(frequencies.size())};
  options.attention_factor = config.attention_factor;
  return {positions, Tensor::from(frequencies, half, device), std::move(options)};
}

}  // namespace reprise::nn

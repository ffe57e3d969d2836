// The largest sizes that a config.json may name: beyond those of any model, and small enough that
// no product of them overflows.
#pragma once

#include <cstdint>

namespace reprise::nn {

inline constexpr std::int64_t kMostTokens = std::int64_t{1} << 26;  // in a vocabulary
inline constexpr std::int64_t kMostWidth = std::int64_t{1} << 20;   // of states and feed-forward
inline constexpr std::int64_t kMostHeads = std::int64_t{1} << 14;
inline constexpr std::int64_t kMostHeadSize = std::int64_t{1} << 14;
inline constexpr std::int64_t kMostLayers = 10000;
inline constexpr std::int64_t kMostImageSide = std::int64_t{1} << 14;  // in pixels
inline constexpr std::int64_t kMostPositions = std::int64_t{1} << 31;

}  // namespace reprise::nn

// Philox4x32-10, a counter-based random generator: the numbers at (seed, offset) are a pure
// function, so a replayed dropout draws what the forward drew.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cstdint>

namespace reprise {

using PhiloxBlock = std::array<std::uint32_t, 4>;

// The bijection of the paper: ten rounds over a counter of 128 bits under a key of 64 bits.
constexpr PhiloxBlock philox4x32_10(PhiloxBlock counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Four words: number 4*offset .. 4*offset+3 of the stream `seed`.
constexpr PhiloxBlock philox(std::uint64_t seed, std::uint64_t offset) {
  return philox4x32_10(
      {static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32), 0, 0},
      {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}

// Uniform in [0, 1): the upper 24 bits.
constexpr float uniform(std::uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

// Hands out ranges of a stream. One lives in the training state and is saved with it; an op that
// draws reserves its range when it is called, and its record holds (seed, offset).
struct Generator {
  std::uint64_t seed = 0;
  std::uint64_t next_offset = 0;  // in blocks of four words

  // Reserves enough blocks for `words` numbers; returns the offset of the first.
  std::uint64_t reserve(std::uint64_t words) {
    const std::uint64_t first = next_offset;
    next_offset += (words + 3) / 4;
    return first;
  }
};

}  // namespace reprise

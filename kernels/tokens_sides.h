// The sides of tokens.h.
#pragma once

#include <cstdint>

namespace reprise::kernels {

struct NextLabels {
  const std::int64_t* labels;
  std::int64_t rows, tokens;  // B, T
  const std::int64_t* ends;
  std::int64_t end_count;
  std::int64_t* targets;
};
inline constexpr std::int64_t kNoTarget = -100;

namespace cpu {
void next_labels(const NextLabels& call);
void count_positions(std::int64_t* positions, std::int64_t rows, std::int64_t tokens);
}  // namespace cpu

// In order of the stream. Ends that are not there are passed over.
namespace cuda {
void next_labels(const NextLabels& call, void* stream);
void count_positions(std::int64_t* positions, std::int64_t rows, std::int64_t tokens, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

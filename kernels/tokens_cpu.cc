#include "kernels/tokens_sides.h"

namespace reprise::kernels::cpu {

void next_labels(const NextLabels& call) {
  for (std::int64_t i = 0; i < call.rows * call.tokens; ++i) {
    call.targets[i] = (i + 1) % call.tokens == 0 ? kNoTarget : call.labels[i + 1];
  }
  for (std::int64_t n = 0; n < call.end_count; ++n) {
    call.targets[call.ends[n]] = kNoTarget;
  }
}

void count_positions(std::int64_t* positions, std::int64_t rows, std::int64_t tokens) {
  for (std::int64_t i = 0; i < rows * tokens; ++i) {
    positions[i] = i % tokens;
  }
}

}  // namespace reprise::kernels::cpu

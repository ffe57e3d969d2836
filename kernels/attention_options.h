// What kind of attention: see attention.h.
#pragma once

#include <cstdint>

namespace reprise::kernels {

struct AttentionOptions {
  double scale = 1;
  bool causal = false;
  std::int64_t window = 0;
  double dropout = 0;
  std::uint64_t seed = 0, offset = 0;
};

}  // namespace reprise::kernels

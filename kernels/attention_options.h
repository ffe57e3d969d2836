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
  // Promises, without which a CUDA device cannot give padding and documents to the library's
  // kernels; where they do not hold, the result there is none.
  bool padded_right = false;        // each row of the mask: one or more of not 0, then only 0
  std::int64_t most_documents = 0;  // over the whole batch there are at most so many; 0: unknown
};

}  // namespace reprise::kernels

// How sums of reduce.h are cut: a tensor's is that of its chunks, in order, a chunk's that of its
// blocks. So parts of a tensor that are cut between blocks can be added up apart, with the same
// result bit by bit.
#pragma once

#include <cstdint>

namespace reprise::kernels {

inline constexpr std::int64_t kBlockElements = 1024;   // added in f32
inline constexpr std::int64_t kChunkElements = 16384;  // blocks of one chunk are added in f64

}  // namespace reprise::kernels

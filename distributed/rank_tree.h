// How ranks share the work of a reduction, and in which order its terms are added.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "core/dtype.h"
#include "distributed/communicator.h"

namespace reprise::distributed {

// The part of `count` elements that a rank adds up: [first, second).
inline std::pair<std::int64_t, std::int64_t> slice_of(std::int64_t count, int rank, int size) {
  return {count * rank / size, count * (rank + 1) / size};
}

// out[i] = reduction of parts[0][i], parts[1][i], ... in the binary tree over the parts' numbers:
// a node of n parts is (its first 2^k parts) + (the rest), 2^k the largest power of two below n.
// `out` may be one of the parts. bf16 is added in f32 and rounded once. max and min give NaN when
// there is one.
void reduce_tree(std::span<const void* const> parts, void* out, std::int64_t count, DType dtype,
                 Reduce reduce);

}  // namespace reprise::distributed

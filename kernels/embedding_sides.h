// The sides of embedding.h.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

struct EmbeddingCall {
  const std::int64_t* ids;
  std::int64_t count;  // of ids
  Matrix table, y;
  std::int64_t rows, width;  // of the table
};

struct EmbeddingGradient {
  const std::int64_t* ids;
  std::int64_t count;  // of ids
  Matrix dy, dtable;
  std::int64_t rows, width;  // of the table
  std::int64_t padding;
  bool accumulate;
  void* workspace;  // of as many bytes as embedding_workspace_bytes says; null without ids
};

namespace cpu {
inline std::int64_t embedding_workspace_bytes(std::int64_t count) {
  return 2 * count * static_cast<std::int64_t>(sizeof(std::int64_t));
}
void embedding(const EmbeddingCall& call);
void embedding_gradient(const EmbeddingGradient& call);
}  // namespace cpu

// In order of the stream.
namespace cuda {
// Positions that have been sorted by id are added up in chunks: what of an id's run lies in a chunk
// is one sum, and the sums of a run that crosses chunks are added in order.
inline constexpr std::int64_t kSumChunk = 32;
// The sort counts digits in tiles.
inline constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
inline constexpr std::int64_t kSortTile = 2048;

// The parts of the workspace, in bytes from its beginning.
struct EmbeddingWorkspace {
  std::int64_t tiles, chunks;
  // u32 [count] each, from and to which a pass of the sort goes: ids, and their positions.
  std::int64_t keys[2], places[2];
  std::int64_t counts;    // u32 [digits, tiles]
  std::int64_t partials;  // f32 [2, chunks, width]
  std::int64_t bytes;

  EmbeddingWorkspace(std::int64_t count, std::int64_t width)
      : tiles((count + kSortTile - 1) / kSortTile), chunks((count + kSumChunk - 1) / kSumChunk) {
    constexpr std::int64_t kWord = 4, kAlign = 64;
    std::int64_t end = 0;
    const auto part = [&](std::int64_t words) {
      const std::int64_t begin = end;
      end += (words * kWord + kAlign - 1) / kAlign * kAlign;
      return begin;
    };
    keys[0] = part(count);
    keys[1] = part(count);
    places[0] = part(count);
    places[1] = part(count);
    counts = part(kDigits * tiles);
    partials = part(2 * chunks * width);
    bytes = end;
  }
};
// Passes of the sort: ids, and `rows` for those that have no gradient, have so many digits.
inline int sort_passes(std::int64_t rows) {
  return (std::bit_width(static_cast<std::uint64_t>(rows)) + kDigitBits - 1) / kDigitBits;
}

// Where the sorted ids and their positions are.
struct SortedIds {
  const std::uint32_t *keys, *places;
};
// By id, then by position; ids that have no gradient come last, as `rows`.
SortedIds sort_ids(const EmbeddingGradient& call, const EmbeddingWorkspace& workspace,
                   void* stream);

void embedding(const EmbeddingCall& call, void* stream);
void embedding_gradient(const EmbeddingGradient& call, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

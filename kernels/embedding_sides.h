// The sides of embedding.h.
#pragma once

#include <cstdint>

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

struct EmbeddingCall {
  const std::int64_t* ids;
  std::int64_t count;  // of ids
  Matrix table, y;
  std::int64_t width;
};

struct EmbeddingGradient {
  const std::int64_t* ids;
  std::int64_t count;  // of ids
  Matrix dy, dtable;
  std::int64_t rows, width;  // of the table
  std::int64_t padding;
  bool accumulate;
  std::int64_t* order;  // workspace: as many as ids
  std::int64_t* runs;   // the same
};

namespace cpu {
void embedding(const EmbeddingCall& call);
void embedding_gradient(const EmbeddingGradient& call);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void embedding(const EmbeddingCall& call, void* stream);
void embedding_gradient(const EmbeddingGradient& call, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

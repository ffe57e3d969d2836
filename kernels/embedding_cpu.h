// The CPU side of embedding.h.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/matrix.h"

namespace reprise::kernels::cpu {

void embedding(std::span<const std::int64_t> ids, const Matrix& table, const Matrix& y,
               std::int64_t width);

struct EmbeddingGradient {
  std::span<const std::int64_t> ids;
  Matrix dy, dtable;
  std::int64_t rows, width;  // of the table
  std::int64_t padding;
  bool accumulate;
  std::int64_t* order;  // workspace: as many as ids
  std::int64_t* runs;   // the same
};
void embedding_gradient(const EmbeddingGradient& call);

}  // namespace reprise::kernels::cpu

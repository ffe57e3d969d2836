// The sides of dropout.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/step_graph.h"
#include "kernels/matrix_sides.h"

namespace reprise::kernels {

struct DropoutMask {
  std::uint64_t seed, offset;
  std::uint32_t threshold;  // words whose upper 24 bits are below it drop their element
  float scale;              // of the others
  // Of a cuda device: what is added to the offset when the kernel runs (core/step_graph.h), or
  // null.
  const std::uint64_t* shift = nullptr;
};

inline DropoutMask dropout_mask(double p, std::uint64_t seed, std::uint64_t offset) {
  return {seed, offset, static_cast<std::uint32_t>(std::ceil(p * 0x1p24)),
          static_cast<float>(1 / (1 - p)), draw_shift()};
}

namespace cpu {
void dropout(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
             MatrixSize size);
}
// In order of the stream.
namespace cuda {
void dropout(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
             MatrixSize size, void* stream);
}

}  // namespace reprise::kernels

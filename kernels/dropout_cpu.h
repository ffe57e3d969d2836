// The CPU side of dropout.h.
#pragma once

#include <cstdint>

#include "kernels/matrix.h"

namespace reprise::kernels::cpu {

struct DropoutMask {
  std::uint64_t seed, offset;
  std::uint32_t threshold;  // words whose upper 24 bits are below it drop their element
  float scale;              // of the others
};

void dropout(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
             MatrixSize size);

}  // namespace reprise::kernels::cpu

// The sides of dropout.h.
#pragma once

#include <cstdint>

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

struct DropoutMask {
  std::uint64_t seed, offset;
  std::uint32_t threshold;  // words whose upper 24 bits are below it drop their element
  float scale;              // of the others
};

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

// Dropout: y = x m / (1 - p), m 0 with probability p, else 1.
//
// The mask is a pure function: element i (row-major over the shape) is kept when
// uniform(word i of philox(seed, offset + i / 4)) >= p (core/philox.h), so that nothing is saved
// for backward, which is the same function of dy. On a cuda device the offset may be shifted by a
// word of its memory: ShiftDraws (core/step_graph.h).
// x and y have one shape; each is contiguous or rows of unit stride; y may be x. Dtypes f32 or
// bf16, a gradient that is written may be the other one. 0 <= p < 1.
// Errors: p out of range; other dtypes, shapes, devices or strides.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

void dropout(const Tensor& x, double p, std::uint64_t seed, std::uint64_t offset, const Tensor& y,
             bool accumulate = false);

}  // namespace reprise::kernels

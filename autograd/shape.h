// Views of Variables, and the copies that go with them. A view shares the memory of its input: it
// is dropped and restored with it.
//
//   Variable q = reshape(slice(qkv, 2, 0, C), Shape{B, T, H, D});
#pragma once

#include <cstdint>
#include <span>

#include "autograd/variable.h"
#include "core/shape.h"

namespace reprise {

// Views. Errors as those of Tensor: a shape with another number of elements, or that the strides do
// not allow; a range or dimension out of bounds.
Variable reshape(Variable x, const Shape& shape);
Variable slice(Variable x, int dim, std::int64_t begin, std::int64_t end);
Variable transpose(Variable x, int a, int b);

// x itself when its elements lie in row-major order, else a copy for which that holds.
Variable contiguous(Variable x);

// The parts one after the other along `dim`: a copy. They agree in dtype and all other sizes; at
// most 16.
Variable concat(std::span<Variable> parts, int dim);
Variable concat(std::initializer_list<Variable> parts, int dim);

}  // namespace reprise

// Random values for new parameters. Element i depends on (seed, offset + i / 4) only: neither on
// the thread count nor on the device. On meta the range of the stream is reserved all the same.
#pragma once

#include "core/philox.h"
#include "core/tensor.h"

namespace reprise::nn {

// N(0, deviation^2), by Box and Muller, rounded to the dtype (f32 or bf16).
void fill_normal(const Tensor& x, double deviation, Generator& generator);
// U(low, high).
void fill_uniform(const Tensor& x, double low, double high, Generator& generator);

}  // namespace reprise::nn

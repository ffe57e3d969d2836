// Tensors of random numbers, the same at every run.
#pragma once

#include <random>

#include "core/tensor.h"

namespace reprise::testing {

// f32 or bf16, drawn from the normal distribution around 0.
inline Tensor normal(const Shape& shape, DType dtype, unsigned seed, double deviation = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw(0, static_cast<float>(deviation));
  const Tensor x = Tensor::empty(shape, dtype);
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    if (dtype == DType::f32) {
      x.data<float>()[i] = draw(engine);
    } else {
      x.data<bfloat16>()[i] = to_bfloat16(draw(engine));
    }
  }
  return x;
}

}  // namespace reprise::testing

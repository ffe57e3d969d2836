// The activations of activation.h, free of Tensor.
#pragma once

#include <cstdint>
#include <string_view>

namespace reprise::kernels {

enum class Activation : std::uint8_t {
  silu,        // x s(x), s(x) = 1 / (1 + e^-x)
  gelu,        // x P(x), P the integral of the normal density: x (1 + erf(x / sqrt 2)) / 2
  gelu_tanh,   // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; "gelu_new" in GPT-2
  quick_gelu,  // x s(1.702 x)
  exp,         // e^x
};
// "silu", "gelu", "gelu_tanh", "quick_gelu", "exp".
std::string_view name(Activation activation);

}  // namespace reprise::kernels

// The activation functions that config files name.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "autograd/variable.h"
#include "nn/weights/json.h"

namespace reprise::nn {

enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, quick_gelu };

// "silu" or "swish"; "gelu"; "gelu_new", "gelu_pytorch_tanh" or "gelu_fast"; "quick_gelu".
Activation read_activation(JsonReader& json, std::string_view key, std::string_view otherwise);
// The first of the names above ("gelu_new" for gelu_tanh).
std::string_view name(Activation activation);

Variable activate(Activation activation, Variable x);
// activate(gate) * up.
Variable activate_gated(Activation activation, Variable gate, Variable up);

}  // namespace reprise::nn

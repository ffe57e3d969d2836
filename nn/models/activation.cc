#include "nn/models/activation.h"

#include <utility>

#include <fmt/format.h>

#include "autograd/elementwise.h"

namespace reprise::nn {

Activation read_activation(JsonReader& json, std::string_view key, std::string_view otherwise) {
  const std::string text = json.string(key, std::string(otherwise));
  if (text == "silu" || text == "swish") {
    return Activation::silu;
  }
  if (text == "gelu") {
    return Activation::gelu;
  }
  if (text == "gelu_new" || text == "gelu_pytorch_tanh" || text == "gelu_fast") {
    return Activation::gelu_tanh;
  }
  if (text != "quick_gelu") {
    json.refuse(key, fmt::format("must be one of silu, swish, gelu, gelu_new, gelu_pytorch_tanh, "
                                 "gelu_fast, quick_gelu, got \"{}\"",
                                 text));
  }
  return Activation::quick_gelu;
}

std::string_view name(Activation activation) {
  switch (activation) {
    case Activation::silu:
      return "silu";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_tanh:
      return "gelu_new";
    case Activation::quick_gelu:
      return "quick_gelu";
  }
  return "?";
}

Variable activate(Activation activation, Variable x) {
  switch (activation) {
    case Activation::silu:
      return silu(std::move(x));
    case Activation::gelu:
      return gelu(std::move(x));
    case Activation::gelu_tanh:
      return gelu_tanh(std::move(x));
    case Activation::quick_gelu:
      return quick_gelu(std::move(x));
  }
  return x;
}

Variable activate_gated(Activation activation, Variable gate, Variable up) {
  if (activation == Activation::silu) {
    return gated_silu(std::move(gate), std::move(up));
  }
  return mul(activate(activation, std::move(gate)), std::move(up));
}

}  // namespace reprise::nn

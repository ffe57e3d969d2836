#include "nn/linear.h"

#include <utility>

#include "autograd/matmul.h"
#include "core/error.h"
#include "nn/lora.h"

namespace reprise::nn {

Linear::Linear(std::int64_t in, std::int64_t out, LinearOptions options, Place place)
    : weight("weight", parameter_tensor(options.in_out ? Shape{in, out} : Shape{out, in}, place)),
      bias("bias", options.bias ? parameter_tensor(Shape{out}, place) : Tensor()),
      in_(in),
      out_(out),
      options_(options) {
  add("weight", weight);
  add("bias", bias);
}

Linear::~Linear() = default;

Variable Linear::operator()(Variable x) const {
  if (lora_ == nullptr) {
    return linear(std::move(x), weight, bias, options_.in_out);
  }
  Variable y = linear(x, weight, bias, options_.in_out);
  return (*lora_)(std::move(y), std::move(x));
}

void Linear::set_lora(std::unique_ptr<Lora> lora) {
  if (lora_ != nullptr) {
    fail("set_lora", "the layer has an adapter already");
  }
  if (lora->a.shape()[1] != in_ || lora->b.shape()[0] != out_) {
    fail("set_lora", "the adapter must be for [in, out] = [{}, {}], got [{}, {}]", in_, out_,
         lora->a.shape()[1], lora->b.shape()[0]);
  }
  lora_ = std::move(lora);
  add("", *lora_);
}

std::unique_ptr<Lora> Linear::take_lora() {
  if (lora_ != nullptr) {
    remove(*lora_);
  }
  return std::move(lora_);
}

}  // namespace reprise::nn

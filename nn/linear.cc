#include "nn/linear.h"

#include <utility>

#include "autograd/matmul.h"
#include "core/error.h"
#include "nn/adapters/lora.h"

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

Variable Linear::operator()(Variable x) const {
  if (lora_ == nullptr) {
    return linear(std::move(x), weight, bias, options_.in_out);
  }
  if (lora_->weight_decomposed()) {
    const auto product = [&](Variable in) {
      return linear(std::move(in), weight, {}, options_.in_out);
    };
    return lora_->decomposed(std::move(x), product, product, weight, bias, options_.in_out);
  }
  Variable y = linear(x, weight, bias, options_.in_out);
  return (*lora_)(std::move(y), std::move(x));
}

void Linear::set_lora(Lora* lora) {
  if (lora != nullptr && (lora->in() != in_ || lora->out() != out_)) {
    fail("set_lora", "the adapter must be for [in, out] = [{}, {}], got [{}, {}]", in_, out_,
         lora->in(), lora->out());
  }
  if (lora_ != nullptr) {
    remove(*lora_);
  }
  lora_ = lora;
  if (lora_ != nullptr) {
    add("", *lora_);
  }
}

}  // namespace reprise::nn

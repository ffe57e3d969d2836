#include "nn/embedding.h"

#include <utility>

#include "autograd/embedding.h"
#include "core/error.h"
#include "nn/adapters/lora.h"

namespace reprise::nn {

Embedding::Embedding(std::int64_t rows, std::int64_t width, std::optional<std::int64_t> padding,
                     Place place)
    : weight("weight", parameter_tensor(Shape{rows, width}, place)), padding_(padding) {
  add("weight", weight);
}

Variable Embedding::operator()(const Tensor& ids) const {
  const std::int64_t padding = padding_.value_or(-1);
  Variable y = embedding(ids, weight, padding);
  return lora_ == nullptr ? y : (*lora_)(std::move(y), ids, padding, weight);
}

void Embedding::set_lora(LoraEmbedding* lora) {
  if (lora != nullptr && (lora->in() != weight.shape()[0] || lora->out() != weight.shape()[1])) {
    fail("set_lora", "the adapter must be for a table {}, got one for [{}, {}]",
         to_string(weight.shape()), lora->in(), lora->out());
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

#include "nn/embedding.h"

#include "autograd/embedding.h"

namespace reprise::nn {

Embedding::Embedding(std::int64_t rows, std::int64_t width, std::optional<std::int64_t> padding,
                     Place place)
    : weight("weight", parameter_tensor(Shape{rows, width}, place)), padding_(padding) {
  add("weight", weight);
}

Variable Embedding::operator()(const Tensor& ids) const {
  return embedding(ids, weight, padding_.value_or(-1));
}

}  // namespace reprise::nn

// Embedding: rows of a table [V, C] by token id.
#pragma once

#include <cstdint>
#include <optional>

#include "autograd/variable.h"
#include "nn/module.h"

namespace reprise::nn {

class Embedding : public Module {
 public:
  // Row `padding` of the table gets no gradient through the lookup.
  Embedding(std::int64_t rows, std::int64_t width, std::optional<std::int64_t> padding,
            Place place);

  // ids i64 or i32 [..] -> [.., C]. Throws Error for an id outside of the table.
  Variable operator()(const Tensor& ids) const;

  std::optional<std::int64_t> padding() const { return padding_; }

  Parameter weight;

 private:
  std::optional<std::int64_t> padding_;
};

}  // namespace reprise::nn

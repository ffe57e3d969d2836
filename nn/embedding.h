// Embedding: rows of a table [V, C] by token id. A low-rank adapter may be put around it later
// (nn/lora.h).
#pragma once

#include <cstdint>
#include <optional>

#include "autograd/variable.h"
#include "nn/module.h"

namespace reprise::nn {

class LoraEmbedding;

class Embedding : public Module {
 public:
  // Row `padding` of the table gets no gradient through the lookup.
  Embedding(std::int64_t rows, std::int64_t width, std::optional<std::int64_t> padding,
            Place place);

  // ids i64 or i32 [..] -> [.., C]. Throws Error for an id outside of the table.
  Variable operator()(const Tensor& ids) const;

  std::optional<std::int64_t> padding() const { return padding_; }
  // The active adapter, which belongs to the model; null without one.
  LoraEmbedding* lora() const { return lora_; }
  // Throws Error when its sizes are not those of the table.
  void set_lora(LoraEmbedding* lora);

  Parameter weight;

 private:
  std::optional<std::int64_t> padding_;
  LoraEmbedding* lora_ = nullptr;
};

}  // namespace reprise::nn

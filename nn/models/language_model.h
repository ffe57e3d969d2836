// What all language models have in common: tokens in, hidden states, logits or a loss out.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "nn/models/model.h"

namespace reprise::nn {

class LanguageModel : public Model {
 public:
  // [B, T] -> [B, T, C], after the last norm. Throws Error when the batch does not fit the model.
  virtual Variable hidden(const Batch& batch) = 0;
  // [B, T, V].
  Variable logits(const Batch& batch);
  // Causal language modelling: mean cross-entropy over the labels that are not -100. The logits
  // never exist as a whole, unless the head carries an adapter or a bias.
  Variable loss(const Batch& batch, const LossOptions& options = {}) override;
  bool has_loss(const Batch& batch) const override { return batch.labels.defined(); }
  // "logits".
  std::vector<NamedOutput> outputs(const Batch& batch) override;

  virtual std::int64_t vocabulary() const = 0;  // V
  virtual std::int64_t max_positions() const = 0;
  virtual Parameter& embedding_table() = 0;  // [V, C]; also the head when head() is null

 protected:
  // Whether rows of ids may have images in them.
  virtual bool takes_images() const { return false; }
  // 3 where a batch may also have positions [3, B, T].
  virtual std::int64_t numbers_a_position() const { return 1; }
  // Common checks of a batch: ids [B, T] i64, the others likewise.
  void check(const Batch& batch) const;
  // Those given [B, T], or counted from the start of each text: [T] when rows do not differ, unless
  // `every_row`.
  static Tensor positions_of(const Batch& batch, bool every_row = false);
};

// As build_model; another kind of model is an error.
absl::StatusOr<std::unique_ptr<LanguageModel>> build_language_model(JsonReader& config,
                                                                    Place place);

}  // namespace reprise::nn

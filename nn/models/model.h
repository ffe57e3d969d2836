// What all language models have in common: tokens in, hidden states, logits or a loss out.
//
//   absl::StatusOr<std::unique_ptr<Model>> model = load_model("gpt2/");   // nn/weights/folder.h
//   Tape tape;
//   Tape::Scope scope(tape, Policies::named("inputs-only"));
//   backward((*model)->loss({.ids = ids, .labels = labels}));
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "autograd/variable.h"
#include "nn/module.h"

namespace reprise::nn {

class Linear;
class JsonReader;

// B rows of T tokens. Integer tensors are i64 [B, T] and real also in a dry run.
struct Batch {
  Tensor ids;
  Tensor labels;     // unshifted: the target of position t is labels[t + 1]; -100 is ignored
  Tensor mask;       // optional: 1 token, 0 padding, which no query sees
  Tensor positions;  // optional: 0 .. T-1 otherwise
  // Optional: several texts in one row, each seeing itself only. Row b consists of texts that start
  // at starts[b], ascending from 0. Positions begin anew in each unless they are given; so does the
  // loss: nothing is predicted across a border.
  std::vector<std::vector<std::int64_t>> starts;
};

struct LossOptions {
  // The sum over predicted labels is divided by this; by their number when absent.
  std::optional<double> items;
};

class Model : public Module {
 public:
  // [B, T] -> [B, T, C], after the last norm. Throws Error when the batch does not fit the model.
  virtual Variable hidden(const Batch& batch) = 0;
  // [B, T, V].
  Variable logits(const Batch& batch);
  // Causal language modelling: mean cross-entropy over the labels that are not -100. The logits
  // never exist as a whole, unless the head carries an adapter or a bias.
  Variable loss(const Batch& batch, const LossOptions& options = {});

  // Random values for training from scratch.
  virtual void initialize(Generator& generator) = 0;

  virtual std::string_view type() const = 0;    // "llama", as config.json has it
  virtual std::int64_t vocabulary() const = 0;  // V
  virtual std::int64_t max_positions() const = 0;
  // The output head; null when it is the embedding table.
  virtual Linear* head() = 0;
  virtual Parameter& embedding_table() = 0;  // [V, C]
  // The config.json that the model was built from, or one that says the same, for a folder that
  // loads back.
  std::string config_json() const { return source_.empty() ? write_config() : source_; }
  void set_source(std::string config) { source_ = std::move(config); }
  // Before the paths of all but the head: files of the bare trunk lack it.
  virtual std::string_view trunk_prefix() const = 0;
  // Tensors of old files that are no parameters.
  virtual bool is_buffer(std::string_view key) const = 0;

 protected:
  // Common checks of a batch: ids [B, T] i64, the others likewise.
  void check(const Batch& batch) const;
  // Those given [B, T], or counted from the start of each text: [T] when rows do not differ, unless
  // `every_row`.
  static Tensor positions_of(const Batch& batch, bool every_row = false);
  virtual std::string write_config() const = 0;

 private:
  std::string source_;
};

// A model by the model_type (or architectures) of a config.json, uninitialised. Errors name the
// file, the key, what was expected and what was there.
absl::StatusOr<std::unique_ptr<Model>> build_model(JsonReader& config, Place place);
// "gpt2", "llama", "qwen2".
std::vector<std::string> supported_models();

}  // namespace reprise::nn

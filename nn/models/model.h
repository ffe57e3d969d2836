// What every model is: a module that a folder of weights and a config.json build, with a loss to
// train and outputs to look at.
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

class AdapterSet;
class Linear;
class JsonReader;

// B rows of T tokens, and images. Integer tensors are i64 and real also in a dry run.
struct Batch {
  Tensor ids;     // [B, T]
  Tensor labels;  // [B, T], unshifted: the target of position t is labels[t + 1]; -100 is ignored
  Tensor mask;    // optional, [B, T]: 1 token, 0 padding, which no query sees
  // Whether each row of the mask is one or more tokens, then only padding. Absent: the model looks,
  // for which the host waits where the mask is on a cuda device.
  std::optional<bool> padded_right;
  Tensor positions;  // optional, [B, T] or [3, B, T]: 0 .. T-1 otherwise, or as the model counts
  // Optional: several texts in one row, each seeing itself only. Row b consists of texts that start
  // at starts[b], ascending from 0. Positions begin anew in each unless they are given; so does the
  // loss: nothing is predicted across a border.
  std::vector<std::vector<std::int64_t>> starts;
  // Images, already pre-processed, as the model takes them: f32 [images, 3, S, S], or rows of
  // patches [P, 3 t p p] with `grids`. They fill the image tokens of the rows of ids in order.
  Tensor pixels;
  Tensor grids;         // i64 [images, 3]: frames / 2, height, width in patches
  Tensor image_tokens;  // i64 [B, T]: 1 at image tokens, for models whose ids do not tell
};

struct LossOptions {
  // The sum over predicted labels is divided by this; by their number when absent.
  std::optional<double> items;
};

// Where a file holds a parameter: in a tensor of its own, or in rows of a larger one.
struct FileKey {
  std::string key;
  std::int64_t first = 0;  // the row of the larger tensor at which the parameter starts
  std::int64_t rows = 0;   // of the larger tensor; 0: one of its own
};

struct NamedOutput {
  std::string name;  // "logits", "image_embeds", "hidden"
  Variable value;
};

class Model : public Module {
 public:
  Model();
  ~Model() override;
  // The loss that the model is trained with, f32 []. Throws Error when the batch does not fit.
  virtual Variable loss(const Batch& batch, const LossOptions& options = {}) = 0;
  // Whether the batch has what the loss is made of.
  virtual bool has_loss(const Batch&) const { return true; }
  // What it computes besides.
  virtual std::vector<NamedOutput> outputs(const Batch& batch) = 0;

  // Random values for training from scratch.
  virtual void initialize(Generator& generator) = 0;

  virtual std::string_view type() const = 0;  // "llama", as config.json has it
  // The output head, which no adapter for all linear layers goes on; null when there is none.
  virtual Linear* head() { return nullptr; }
  // Before the paths of all but the head: files of the bare trunk lack it.
  virtual std::string_view trunk_prefix() const { return ""; }
  // Where files may hold the parameter at `path`, of a module of this model or of an adapter on it.
  // The first is the one that is written, a tensor of its own. Unless a model has it otherwise: its
  // path, then its path without the trunk's prefix.
  virtual std::vector<FileKey> file_keys(const std::string& path) const;
  // Tensors of old files that are no parameters.
  virtual bool is_buffer(std::string_view) const { return false; }

  // The config.json that the model was built from, or one that says the same, for a folder that
  // loads back.
  std::string config_json() const { return source_.empty() ? write_config() : source_; }
  void set_source(std::string config) { source_ = std::move(config); }

  // For nn/lora.h, which is how adapters are added and switched.
  AdapterSet& adapters() const { return *adapters_; }
  // Forgets them all; parameters keep the values that they have.
  void clear_adapters();

 protected:
  virtual std::string write_config() const = 0;

 private:
  std::string source_;
  std::unique_ptr<AdapterSet> adapters_;  // outlives the layers that point into it
};

// A model by the model_type (or architectures) of a config.json, uninitialised. Errors name the
// file, the key, what was expected and what was there.
absl::StatusOr<std::unique_ptr<Model>> build_model(JsonReader& config, Place place);
// What a config.json calls a model: "llama" and "LlamaForCausalLM".
struct ModelKind {
  std::string_view type, architecture;
};
// All that are built; docs/models.md lists them.
std::vector<ModelKind> model_kinds();
// Their types: "gpt2", "llama", "qwen2".
std::vector<std::string> supported_models();

}  // namespace reprise::nn

// LoRA on the Linear layers of a finished model, in the terms and files of PEFT.
//
//   add_lora(*model, {.rank = 8, .alpha = 16, .targets = {"q_proj", "v_proj"}}, generator);
//   ... train ...
//   absl::Status saved = save_adapter(*model, config, "out");      // adapter_config.json + weights
//   absl::StatusOr<LoraConfig> config = load_adapter(*model, "out");
//
//   y = W x + b + s B(A(dropout(x))),   A [R, in], B [out, R],  s = alpha / R or alpha / sqrt(R)
//
// A starts as U(-1/sqrt(in), 1/sqrt(in)), B as zeros: at first the model is unchanged and only B
// has a gradient. Everything but the adapters (and what the config names besides) is frozen: a
// frozen weight has no gradient, and its layer keeps no input for one.
//
// A module that is saved along (modules_to_save) is trained in place; PEFT trains a copy of it.
// Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "autograd/variable.h"
#include "nn/models/model.h"
#include "nn/module.h"

namespace reprise::nn {

// Module paths by PEFT's rules: an entry of the list is the path or ends it after a dot; the regex
// matches the whole path.
struct ModulePattern {
  std::vector<std::string> names;
  std::string regex;
  bool empty() const { return names.empty() && regex.empty(); }
};

enum class LoraInit : std::uint8_t {
  usual,     // A uniform, B zeros
  gaussian,  // A N(0, 1/R^2), B zeros
  random,    // both uniform: not the unchanged model, for tests
};

struct LoraConfig {
  std::int64_t rank = 8;
  double alpha = 8;
  double dropout = 0;
  bool rank_stabilized = false;  // s = alpha / sqrt(R)
  LoraInit init = LoraInit::usual;
  // Nothing: q_proj and v_proj, or c_attn for GPT-2.
  ModulePattern targets, exclude;
  bool all_linear = false;                   // every Linear but the head
  std::vector<std::string> modules_to_save;  // trained besides; ends of paths
  std::vector<std::int64_t> layers;          // only these blocks; empty: all
  std::vector<std::string> layer_lists;      // the lists that `layers` counts in: "h"
  // Other ranks and alphas where the regex matches the end of the path after a dot; the first
  // match counts.
  std::vector<std::pair<std::string, std::int64_t>> ranks;
  std::vector<std::pair<std::string, double>> alphas;
  std::string bias = "none";  // or "all", or "lora_only": biases trained besides
  std::optional<std::string> task = "CAUSAL_LM", base_model;
};

// The adapter of one Linear. Its parameters are "lora_A.weight" and "lora_B.weight" of that layer.
class Lora : public Module {
 public:
  Lora(std::int64_t in, std::int64_t out, std::int64_t rank, double scale, double dropout,
       Place place);
  bool is_adapter() const override { return true; }
  void initialize(LoraInit init, Generator& generator);
  // y + s B(A(dropout(x))). y [.., out], x [.., in].
  Variable operator()(Variable y, Variable x) const;

  std::int64_t rank() const { return a.shape()[0]; }
  double scale() const { return scale_; }

  Parameter a, b;

 private:
  double scale_, dropout_;
};

// Puts adapters of the model's dtype on, freezes the rest, names the parameters. Throws Error when
// nothing matches, a target is not a Linear, or the model has adapters already.
void add_lora(Model& model, const LoraConfig& config, Generator& generator);

// The paths of the Linear layers that the config targets. Throws Error as add_lora.
std::vector<std::string> lora_targets(Model& model, const LoraConfig& config);

// Every adapter into its base weight (W += s B A, rounded once); the adapters are removed and all
// parameters stay as frozen or trainable as they were.
void merge_lora(Model& model);

// adapter_config.json and adapter_model.safetensors in PEFT's form. save_adapter writes what
// add_lora trains; load_adapter puts the adapters on and fills them. Missing and unexpected tensors
// are errors.
absl::Status save_adapter(Model& model, const LoraConfig& config, const std::string& folder);
absl::StatusOr<LoraConfig> load_adapter(Model& model, const std::string& folder);
absl::StatusOr<LoraConfig> read_lora_config(const std::string& folder);
std::string to_json(const LoraConfig& config, const Model& model);

// Every parameter that the adapter's file holds, under its key there:
// "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".
std::vector<NamedParameter> adapter_parameters(Model& model, const LoraConfig& config);

}  // namespace reprise::nn

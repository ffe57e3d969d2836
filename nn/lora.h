// Low-rank adapters on the Linear and Embedding layers of a finished model, in the terms and files
// of PEFT.
//
//   add_lora(*model, {.rank = 8, .alpha = 16, .targets = {{"q_proj", "v_proj"}, ""}}, generator);
//   ... train ...
//   absl::Status saved = save_adapter(*model, "out");   // adapter_config.json + weights
//   absl::StatusOr<LoraConfig> config = load_adapter(*model, "out");
//   absl::Status merged = export_merged(*model, "merged");
//
//   Linear      y = W x + b + s B(A(dropout(x))),   A [R, in], B [out, R],  s = alpha / R or
//   Embedding   y = W[id] + s B(A[:, id])           alpha / sqrt(R)
//   lora_bias   y += s b_B besides
//   DoRA        y = m / |W + s B A| (W x + s B A x) + b, lengths by row (nn/adapters/config.h)
//
// A starts as U(-1/sqrt(in), 1/sqrt(in)), B as zeros: at first the model is unchanged and only B
// has a gradient. Everything but the adapter (and what its config names besides) is frozen: a
// frozen weight has no gradient, and its layer keeps no input for one. Adapters of a bf16 model are
// f32 unless the config says otherwise.
//
// A model may have several adapters by name, of which one at most is active: only that one is
// computed, trained, and found among the model's parameters. modules_to_save and biases are trained
// as copies: without the adapter the model is what it was, bit for bit.
// Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021; Liu et al., "DoRA:
// weight-decomposed low-rank adaptation", 2024.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nn/adapters/config.h"
#include "nn/adapters/lora.h"
#include "nn/models/model.h"
#include "nn/module.h"
#include "nn/weights/folder.h"

namespace reprise::nn {

// Adds an adapter and makes it the active one; freezes the rest and names the parameters. Throws
// Error, with nothing done, when the config does not fit the model: no target, a name or pattern
// that matches nothing, a target that is no layer, a name that is taken.
void add_lora(Model& model, const LoraConfig& config, Generator& generator,
              const std::string& name = "default");

// The paths of the layers that the config targets. Throws Error as add_lora.
std::vector<std::string> lora_targets(Model& model, const LoraConfig& config);

std::vector<std::string> adapter_names(Model& model);
std::string active_adapter(Model& model);  // empty: none
// Throws Error for a name that is not there, or when one is merged.
void activate_adapter(Model& model, const std::string& name);
// The model without adapters; all of its parameters stay frozen.
void deactivate_adapters(Model& model);
void remove_adapter(Model& model, const std::string& name);

// The active adapter into its base weights: W + s B A, rounded once. Throws Error when none is
// active, it is merged already, it is on an embedding table that is the head too, whose two uses it
// would change, or it has a bias where the layer has none.
void merge_adapter(Model& model);
// Takes a merged one out again: up to rounding, the weights are what they were.
void unmerge_adapter(Model& model);
// merge_adapter, then all adapters are forgotten; parameters stay as frozen or trainable as they
// were.
void merge_lora(Model& model);

// Writes the model with its active adapter merged, under the names of the base model; the model
// stays as it is. What was written is read again and compared. FailedPrecondition when no weight
// differs from the base: nothing was learned, or all of it is lost in the rounding to bf16.
absl::Status export_merged(Model& model, const std::string& folder,
                           const SaveOptions& options = {});

// adapter_config.json and adapter_model.safetensors in PEFT's form, of the active adapter.
absl::Status save_adapter(Model& model, const std::string& folder);
// Adds the folder's adapter and makes it active. Tensors that are missing, have no place, or are
// for a base of other shapes are told at once, and the model is left as it was.
absl::StatusOr<LoraConfig> load_adapter(Model& model, const std::string& folder,
                                        const std::string& name = "default", bool widen = true);
absl::StatusOr<LoraConfig> read_lora_config(const std::string& folder);
std::string to_json(const LoraConfig& config, Model& model);

// What the active adapter trains, under its keys in PEFT's file:
// "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".
std::vector<NamedParameter> adapter_parameters(Model& model);

}  // namespace reprise::nn

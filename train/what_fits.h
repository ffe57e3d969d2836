// What a step would take under each policy, for whoever found no memory for it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "train/trainer.h"

namespace reprise::train {

// The model with its adapters on meta: built from its config, trained in the same parts.
absl::StatusOr<std::unique_ptr<nn::Model>> model_on_meta(nn::Model& model);

// What ran out of memory: forward and backward, or the whole step; `states`: the optimizer has its
// states already.
struct StepKind {
  bool updates = true, states = true;
};
struct PolicyBytes {
  std::string policy;
  std::int64_t peak_bytes = 0;  // of the device, at most
};
// Dry runs of the trainer's step for the device of the model, least bytes first. Takes a model on
// meta, that of model_on_meta; `others_bytes` were on meta before it.
std::vector<PolicyBytes> bytes_of_policies(nn::Model& on_meta, const TrainerOptions& options,
                                           std::span<const nn::Batch> micro_batches, StepKind kind,
                                           DeviceKind device, std::int64_t others_bytes);

// "; this step fits in 1.5 GiB (1610612736 bytes) under nested, 1.2 GiB (...), and ...", or that
// none does and what the least takes; empty where the model cannot be built from its config.
std::string what_fits(nn::Model& model, const TrainerOptions& options,
                      std::span<const nn::Batch> micro_batches, StepKind kind,
                      std::int64_t available_bytes);

}  // namespace reprise::train

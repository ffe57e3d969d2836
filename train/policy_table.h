// The product's point as a table: the same step under each policy, with its memory predicted by a
// dry run, measured, its time, and a digest of all gradients.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "nn/models/model.h"
#include "train/trainer.h"

namespace reprise::train {

struct PolicyRow {
  std::string policy;
  std::int64_t predicted_bytes = 0;  // activations, saved values and workspace, at most
  std::int64_t measured_bytes = 0;
  std::int64_t predicted_host_bytes = 0;  // of values that left for host memory, at most
  std::int64_t measured_host_bytes = 0;
  double step_ms = 0;  // forward and backward, median
  std::int64_t replayed_records = 0;
  std::string digest;  // of names and bytes of all gradients
};

// Names and bytes of all gradients, in order of registration. Parameters without one are skipped.
std::string gradient_digest(const std::vector<Parameter*>& parameters);

// One row a policy, on the device of the model. `meta_model` is the same model on meta. The model's
// parameters stay as they are; gradients end up zeroed. `hooks` go around the measured sweeps, not
// the dry runs.
std::vector<PolicyRow> policy_table(nn::Model& model, nn::Model& meta_model, const nn::Batch& batch,
                                    int repeats = 3, const SweepHooks& hooks = {});
std::string to_string(const std::vector<PolicyRow>& rows);
// True when every row has the same digest, and each prediction is within 1% of what was measured,
// that of host memory exact.
bool agree(const std::vector<PolicyRow>& rows);

}  // namespace reprise::train

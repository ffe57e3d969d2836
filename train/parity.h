// Parity cases: does a model behave here as it does in the reference implementation?
//
// A case is a folder with a model and what the reference computed with it:
//
//   config.json, model.safetensors (or shards)
//   adapter/             in LoRA cases: adapter_config.json, adapter_model.safetensors
//   parity.safetensors   in.input_ids, in.labels, in.attention_mask, in.position_ids: i64 [B, T];
//                        out.logits [B, T, V], out.loss, grad.NAME, steps.loss [N]: f32. NAME is
//                        the parameter's key in its file. Metadata: "optimizer" {"lr", "betas",
//                        "eps", "weight_decay"}, "steps"
//
// The model is loaded by the ordinary loader, does the same work, and each tensor is compared:
// largest absolute error and relative error |a - b| / |b| in the 2-norm (the absolute one decides
// where the reference is zero). Logits at padding are not compared, nor are keys that the case
// lacks.
//
//   tolerance   outputs and losses   gradients
//   f32         1e-5, steps.loss     1e-4
//               1e-4 each
//   bf16        3e-2                 0.15          against the same f32 reference
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/device.h"
#include "core/dtype.h"

namespace reprise::train {

struct ParityOptions {
  Device device = cpu;
  DType dtype = DType::f32;
  std::string policy = "inputs-only";
  // Runs under each policy and asks for bitwise equal losses and gradients.
  bool every_policy = false;
  // Writes what was computed under the same keys; then every output, gradient and step loss is
  // computed, also those that the case lacks.
  std::string write;
};

struct ParityRow {
  std::string key;
  double absolute = 0, relative = 0;  // infinite when it was not computed
  double tolerance = 0;
  bool zero = false;  // the reference is zero: the absolute error counts
  bool within = false;
};

struct ParityPolicy {
  std::string name;
  std::string digest;            // of loss and gradients, 32 hexadecimal digits
  bool equal = true;             // bitwise to the first one
  std::string first_difference;  // the key, when not equal
};

struct ParityReport {
  std::string folder, name, reference;
  Device device = cpu;
  DType dtype = DType::f32;
  std::vector<ParityRow> rows;  // worst first, measured in tolerances
  std::vector<ParityPolicy> policies;
  bool passed() const;
};

// Not ok when the case cannot be read (path, key, expected, actual) or the device is not there.
absl::StatusOr<ParityReport> run_parity(const std::string& folder,
                                        const ParityOptions& options = {});

// One line a tensor, worst first, and a closing line.
std::string to_text(const ParityReport& report);
// {"case", "folder", "reference", "device", "dtype", "passed", "tensors": [...], "policies": [...]}
std::string to_json(const ParityReport& report);

// What `reprise parity` exits with: 0 all within tolerance, 1 not, 2 the case cannot be read.
int exit_code(const absl::StatusOr<ParityReport>& report);

}  // namespace reprise::train

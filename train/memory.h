// `reprise memory`: what a training step of any config will take, by kind of memory and under each
// policy, from dry runs. Nothing is allocated but token ids, so that the sizes may be any.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/allocator.h"
#include "core/device.h"
#include "core/dtype.h"
#include "train/trainer.h"

namespace reprise::train {

struct DryRunOptions {
  std::int64_t batch = 1, tokens = 512;
  std::int64_t lora_rank = 0;        // 0: every parameter is trained
  std::vector<std::string> targets;  // of LoRA; none: every Linear but the head
  bool weight_decomposed = false;
  std::string policy;  // empty: each
  DType dtype = DType::bf16;
  DeviceKind device = DeviceKind::cpu;  // that the bytes are those of; it need not be here
  int ranks = 1;  // of a job; the bytes are those of its first rank, which has the most
  int stage = 0;  // of sharding over them (distributed/sharding.h); 0: none
  std::int64_t gather_again = 0;  // ShardingOptions::gather_again
};

struct MemoryRow {
  std::string policy;
  std::int64_t peak_bytes = 0;            // all together, at most
  BytesByKind at_peak{};                  // what they were then
  std::int64_t peak_transient_bytes = 0;  // activations, saved values and workspace, at most
  std::int64_t host_peak_bytes = 0;       // of values that left the device, at most
  std::int64_t forward_flops = 0, backward_flops = 0, replay_flops = 0;
  double seconds = 0;  // that the dry run took
};

struct MemoryTable {
  std::string model;  // its model_type
  std::int64_t parameters = 0, trainable = 0;
  DryRunOptions options;
  std::vector<MemoryRow> rows;
};

// The folder's config.json, or the file itself. The optimizer is AdamW with states of the
// parameters' dtype. InvalidArgument when the config, or a batch of text, does not fit the model.
absl::StatusOr<MemoryTable> predict_memory(const std::string& config, const DryRunOptions& options);
// Of a model that stands already, on meta; the options of adapters are not looked at.
MemoryTable predict_memory(std::unique_ptr<nn::Model> on_meta, const DryRunOptions& options);
// One step of the trainer under the policy, and what the device's memory was at most meanwhile.
MemoryRow measured_step(Trainer& trainer, const nn::Batch& batch, const std::string& policy,
                        Device device);
std::string to_text(const MemoryTable& table);
std::string to_json(const MemoryTable& table);

// `reprise explain`: what the tape holds after forward (autograd/tape.h) under the policy, or
// under inputs-only.
absl::StatusOr<std::string> explain_config(const std::string& config, const DryRunOptions& options);

// `reprise init`: writes a folder of random weights for the config. FailedPrecondition when weights
// are there already.
struct InitOptions {
  std::uint64_t seed = 1;
  DType dtype = DType::f32;
  std::int64_t max_shard_bytes = 5'000'000'000;
};
absl::StatusOr<std::string> init_folder(const std::string& config, const std::string& folder,
                                        const InitOptions& options);

}  // namespace reprise::train

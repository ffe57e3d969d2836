// `reprise demo`: a small Llama-style decoder learns real text, then the policy table.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "core/tensor.h"
#include "distributed/communicator.h"
#include "nn/models/language_model.h"
#include "train/memory.h"

namespace reprise::train {

struct DemoOptions {
  std::string text;                    // a file; empty: the quotations of Debian's `fortunes`
  double seconds = 170;                // of training
  std::string policy = "inputs-only";  // while training, and for gradients_out
  std::string gradients_out;           // write one step's gradients there (safetensors) and end
  double learning_rate = 1e-3;         // the highest, after the warmup
  std::uint64_t seed = 1;
  Device device = cpu;
  int shards = 0;  // of the batch, each its own sweep: every number of ranks gives the same bits
  int stage = 0;   // of sharding over the ranks (distributed/sharding.h); 0: none
  bool quiet = false;    // no progress line
  bool dry_run = false;  // only predict_demo
};

// About 10 M parameters: bytes in, 8 blocks of width 320.
std::unique_ptr<nn::LanguageModel> demo_model(Device device);

// The text to learn, after a look at all that can be wrong with the options: InvalidArgument,
// NotFound. Starts nothing, so that it can be asked before other ranks are there.
absl::StatusOr<std::string> demo_text(const DemoOptions& options, int ranks);

// What a step of the demo takes on the first of `ranks` ranks, by kind of memory and policy, from
// this process alone: nothing is trained, no other is started. InvalidArgument as demo_text, and
// for shards, whose sums it does not count.
absl::StatusOr<MemoryTable> predict_demo(const DemoOptions& options, int ranks);

// Prints to standard output. InvalidArgument and NotFound for a text that cannot be used,
// FailedPrecondition for a device; Internal when the policies' gradients differ or a prediction is
// off.
// With several ranks the batch is split, gradients are reduced, and rank 0 prints.
absl::Status run_demo(const DemoOptions& options, distributed::Communicator& communicator);

}  // namespace reprise::train

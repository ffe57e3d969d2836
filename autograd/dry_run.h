// The dry run: the same code on the meta device. No second model of memory exists: the bytes are
// those of the run's own allocations and releases, counted without memory behind them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "autograd/policy.h"
#include "autograd/tape.h"
#include "core/allocator.h"

namespace reprise {

struct StepReport {
  std::int64_t peak_bytes = 0;            // all kinds together, while the step ran
  BytesByKind at_peak{};                  // by kind, at that moment
  BytesByKind peak{};                     // the largest of each kind
  std::int64_t peak_transient_bytes = 0;  // of activations, saved values and workspace together
  std::int64_t host_peak_bytes = 0;       // of values that left for host memory meanwhile
  std::int64_t forward_flops = 0, replay_flops = 0, backward_flops = 0;
  TapeReport tape;
};

// Runs forward() under the policies on a tape of its own, then backward over what it returned, and
// reports what the allocator of `device` saw. On meta this is a dry run; on another device the
// same call measures a step. The model's tensors must be on `device`. Gradients are left as the
// sweep leaves them. `before_backward` is given the tape as forward left it, the loss still held:
// for explain().
StepReport measure_step(const std::function<Variable()>& forward, const Policies& policies,
                        Device device, const BackwardOptions& options = {},
                        const std::function<void(const Tape&)>& before_backward = {});

// measure_step on meta.
StepReport dry_run(const std::function<Variable()>& forward, const Policies& policies,
                   const std::function<void(const Tape&)>& before_backward = {});

// Where the blocks of a step lie on a device, from one on meta: the first call of `step` there
// makes what stays (gradients, states of an optimizer), the second is traced. To be used around the
// same step on the device, from its second on: Allocator::begin_plan.
MemoryPlan plan_step(const std::function<void()>& step);

}  // namespace reprise

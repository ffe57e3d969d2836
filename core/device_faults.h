// Wrong numbers that only the device has seen: ids, labels, positions, row numbers in its memory.
//
// They are checked there, by a kernel in order of compute, so that no op waits for the device and a
// step can be captured (core/step_graph.h). The first that is wrong is written into the device's
// fault word unless something is there already; ops take wrong numbers for absent, and touch
// nothing out of bounds. Where the host waits for compute anyway (an element that it reads,
// cuda_synchronize) it looks at the word, clears it, and throws the Error that a check on the host
// would have thrown. REPRISE_CUDA_CHECKED=1: right after the check.
//
// What an op has computed from wrong numbers means nothing, and a step that was not waited for may
// have been trained on it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/device.h"

namespace reprise {

// In page-locked memory, which the device writes and the host reads without a copy.
struct DeviceFault {
  std::int64_t site = 0;  // who checked, and what it says: see fault_site; 0: nothing is wrong
  std::int64_t index = 0, value = 0, limit = 0, other = 0;
};

// The text behind "[operation] ".
using FaultText = std::string (*)(const DeviceFault& fault);
// A number for an operation and its text, the same each time; kernels get it.
std::int64_t fault_site(std::string_view operation, FaultText text);
// Throws Error when there is a fault, and clears it.
void throw_fault(DeviceFault& fault);

// Whether all numbers are in [0, limit), or are `ignored` where `ignores`. Of a wrong one the word
// gets the smallest index, its value, `limit` and `ignored`.
struct IndexCheck {
  const std::int64_t* at = nullptr;
  std::int64_t count = 0, limit = 0, site = 0;
  bool ignores = false;
  std::int64_t ignored = 0;
  std::int64_t* valid = nullptr;  // gets how many are in [0, limit) and not ignored; may be null
};
// In order of the compute stream of a cuda device.
void check_indices(const IndexCheck& check, Device device);
// After a check of one's own, given to compute: in checked mode waits, and throws what was found.
void settle_faults(Device device);

// The kernel of check_indices; `stream` is a cudaStream_t.
void launch_index_check(const IndexCheck& check, DeviceFault* word, void* stream);

}  // namespace reprise

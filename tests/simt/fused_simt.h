// Stands in for cuDNN's attention where the device is the host: does by the formula what a graph
// describes, and keeps the descriptions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/attention_fused.h"

namespace reprise::testing {

struct FusedRun {
  kernels::FusedGraph graph;
  kernels::FusedPlan::Pointers pointers;
};

struct FusedRecord {
  std::vector<kernels::FusedGraph> asked;  // plans that were asked for, refused ones too
  std::vector<FusedRun> runs;
};
FusedRecord& fused_record();
// While not empty, every graph is refused for this reason.
std::string& fused_refusal_of_library();
// While not empty, the library cannot be loaded for this reason.
std::string& fused_library_missing();

}  // namespace reprise::testing

// The graphs of attention_cudnn.cu without a device, for tests: what cudnn_frontend makes of a
// FusedGraph, and what the library says of it for a card that is described to it.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/attention_fused.h"

namespace reprise::kernels::cuda {

struct CudnnVerdict {
  std::string refusal;    // empty: cudnn_frontend takes the graph
  std::string structure;  // the graph as cudnn_frontend writes it, JSON
  // Only with a card: what cuDNN itself says, empty: it has an engine. Then the same of compiling
  // it, for which there must be a driver, and what it wants.
  std::string library_refusal, compile_refusal;
  std::int64_t workspace_bytes = -1;
};
// Whether this build has cudnn_frontend.
bool has_cudnn();
// The version of the library that is loaded, 91900 for 9.19.0; 0: none can be loaded.
std::int64_t cudnn_version();
// `capability` is 90 for 9.0; `card` is cuDNN's JSON of a device's properties, or empty. Needs the
// library, but no device. Throws Error in a build without cudnn_frontend.
CudnnVerdict cudnn_verdict(const FusedGraph& graph, int capability, std::int64_t most_bytes,
                           const std::string& card);

}  // namespace reprise::kernels::cuda

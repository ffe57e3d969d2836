// The graphs of fused attention, built by cudnn_frontend itself, and what cuDNN says of them for a
// card that is described to it: no device is needed.
#include "kernels/attention_cudnn.h"

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace reprise::kernels {
namespace {

using cuda::CudnnVerdict;

// As cuDNN writes the properties of an H100.
const char* const kHopper = R"({
  "cudaDeviceId": 0, "deviceName": "NVIDIA H100 80GB HBM3", "deviceVer": 900, "driverVer": 13000,
  "isTccDriver": 0, "l2CacheSize": 52428800, "maxBlockSize": [1024, 1024, 64], "maxCtasPerSM": 32,
  "maxGridSize": [2147483647, 65535, 65535], "maxRegistersPerSM": 65536,
  "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448,
  "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "memClockRateKHz": 2619000,
  "multiProcessorCount": 132, "pciDeviceId": 0, "regsPerBlock": 65536,
  "reservedSharedMemoryPerBlock": 1024, "smClockRateKHz": 1980000, "supportCoopLaunch": 1,
  "totalGlobalMem": 85000000000, "warpSize": 32})";

struct Case {
  std::string name;
  std::int64_t B, T, H, S, K, D;
  AttentionOptions options{};
  bool mask = false, documents = false;
  bool fused_projection = false;  // q, k and v are slices of one
};

std::vector<Case> cases() {
  const AttentionOptions causal{.scale = 0.125, .causal = true};
  AttentionOptions window = causal, padded = causal, packed = causal, full{.scale = 0.125};
  window.window = 256;
  padded.padded_right = true;
  packed.most_documents = 64;
  return {
      {"gpt2", 32, 1024, 12, 1024, 12, 64, causal, false, false, true},
      {"gpt2_odd_length", 4, 1000, 12, 1000, 12, 64, causal},
      {"llama_1b", 8, 2048, 32, 2048, 8, 64, causal},
      {"llama_8b", 2, 2048, 32, 2048, 8, 128, causal},
      {"long", 1, 8192, 32, 8192, 8, 128, causal},
      {"wide_heads", 2, 512, 8, 512, 4, 256, causal},
      {"full", 8, 257, 16, 257, 16, 64, full},
      {"window", 2, 2048, 16, 2048, 4, 128, window},
      {"more_keys", 2, 512, 16, 2048, 4, 128, causal},
      {"padded", 8, 512, 14, 512, 2, 64, padded, true},
      {"packed", 4, 2048, 14, 2048, 2, 64, packed, false, true},
  };
}

FusedCall fused_of(const Case& c, bool backward) {
  static const std::int64_t some[1] = {1};
  AttentionCall call{
      c.B, c.T, c.H, c.S, c.K, c.D, DType::bf16, c.options, Visibility(c.T, c.S, c.options)};
  const auto heads = [&](std::int64_t tokens, std::int64_t count, std::int64_t stride) {
    return AttentionHeads{.at = nullptr,
                          .batch = tokens * stride * 2,
                          .token = stride * 2,
                          .head = c.D * 2,
                          .given = count > 0,
                          .aligned = true};
  };
  const std::int64_t all = c.fused_projection ? (c.H + 2 * c.K) * c.D : 0;
  call.q = heads(c.T, c.H, all > 0 ? all : c.H * c.D);
  call.k = call.v = heads(c.S, c.K, all > 0 ? all : c.K * c.D);
  call.out = call.dout = call.dq = heads(c.T, c.H, c.H * c.D);
  call.dk = call.dv = heads(c.S, c.K, c.K * c.D);
  call.mask = c.mask ? some : nullptr;
  call.documents = c.documents ? some : nullptr;
  const std::optional<FusedCall> fused = fused_call(call, backward);
  EXPECT_TRUE(fused.has_value()) << c.name << ": " << fused_refusal(call);
  return fused.value_or(FusedCall{});
}

bool library_is_there() {
  return cuda::has_cudnn() && cuda::cudnn_version() > 0;
}

TEST(Cudnn, TheFrontendBuildsWhatIsDescribed) {
  if (!library_is_there()) {
    GTEST_SKIP() << "cuDNN or cudnn_frontend is not there";
  }
  for (const Case& c : cases()) {
    for (const bool backward : {false, true}) {
      const FusedCall fused = fused_of(c, backward);
      const CudnnVerdict verdict = cuda::cudnn_verdict(fused.graph, 90, fused.library_bytes, "");
      ASSERT_EQ(verdict.refusal, "") << c.name << (backward ? " backward" : "");
      const auto json = nlohmann::json::parse(verdict.structure);
      std::size_t found = 0;
      for (const auto& [key, tensor] : json.at("tensors").items()) {
        for (const FusedTensor& t : tensors_of(fused.graph)) {
          if (tensor.at("name") == name(t.role)) {
            ++found;
            EXPECT_EQ(tensor.at("uid"), fused_id(t.role));
            EXPECT_EQ(tensor.at("dim"), t.dims) << c.name << " " << name(t.role);
            EXPECT_EQ(tensor.at("stride"), t.strides) << c.name << " " << name(t.role);
            EXPECT_EQ(tensor.at("is_virtual"), false);
          }
        }
      }
      EXPECT_EQ(found, tensors_of(fused.graph).size()) << c.name << " " << verdict.structure;
      const auto& node = json.at("nodes").at(0);
      EXPECT_EQ(node.contains("padding_mask") && node.at("padding_mask").get<bool>(),
                fused.graph.padded);
      EXPECT_EQ(node.contains("right_bound") && !node.at("right_bound").is_null(),
                fused.graph.causal);
      if (backward) {
        EXPECT_EQ(node.at("is_deterministic_algorithm"), true);
      }
    }
  }
}

// Hopper has an engine for every one, that wants no more than it may.
TEST(Cudnn, HasAnEngineForEveryGraph) {
  if (!library_is_there()) {
    GTEST_SKIP() << "cuDNN or cudnn_frontend is not there";
  }
  for (const Case& c : cases()) {
    for (const bool backward : {false, true}) {
      const FusedCall fused = fused_of(c, backward);
      const CudnnVerdict verdict =
          cuda::cudnn_verdict(fused.graph, 90, fused.library_bytes, kHopper);
      if (verdict.library_refusal.find("RUNTIME_PREREQUISITE_MISSING") != std::string::npos) {
        GTEST_SKIP() << "this cuDNN answers nothing without a driver";  // 9.26 does not, 9.19 does
      }
      EXPECT_EQ(verdict.library_refusal, "") << c.name << (backward ? " backward" : "");
      // Only with a driver, or what passes for one: REPRISE_CUDNN_DRIVER=1.
      if (std::getenv("REPRISE_CUDNN_DRIVER") != nullptr) {
        EXPECT_EQ(verdict.compile_refusal, "") << c.name << (backward ? " backward" : "");
        RecordProperty(c.name + (backward ? "_backward" : ""),
                       std::to_string(verdict.workspace_bytes));
        std::printf("%-20s %d of %2lld x %2lld parts: wants %11lld of %11lld bytes\n",
                    c.name.c_str(), backward, (long long)fused.row_parts,
                    (long long)fused.head_parts, (long long)verdict.workspace_bytes,
                    (long long)fused.library_bytes);
      }
    }
  }
}

}  // namespace
}  // namespace reprise::kernels

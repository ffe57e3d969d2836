// Attention by a library's fused kernels (cuDNN on CUDA): which calls they take, what the library
// is asked for, and the plans that it made. No library header and no memory is touched here.
//
// A call that is refused here or by the library runs on our own tiled kernels. What is taken as
// workspace follows from the sizes alone, whatever the library then wants (a plan that wants more
// is refused), so that a dry run counts the same bytes.
//
// The library sees tensors [B, H, T, D] by strides, so layouts are ours:
//   causal       T = S: aligned at the first key; T < S: at the last one
//   padding      each row of the batch has its number of keys; what lies behind gets no gradient,
//                which is written as zero beforehand
//   documents    are the batch: N sequences, N a power of two, which begin at offsets into the same
//                tensors; those that are not there have no token
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "kernels/attention_sides.h"

namespace reprise::kernels {

enum class FusedRole : std::uint8_t {
  q,
  k,
  v,
  out,
  stats,  // log_sum_exp
  dout,
  dq,
  dk,
  dv,
  query_tokens,  // i32 [N]: of each sequence
  key_tokens,
};
inline constexpr std::size_t kFusedRoles = 11;
// Those that may begin at offsets.
inline constexpr std::size_t kFusedRagged = 9;
std::string_view name(FusedRole role);

// Strides in elements.
struct FusedStrides {
  std::int64_t batch = 0, head = 0, token = 0;
  friend bool operator==(const FusedStrides&, const FusedStrides&) = default;
};

// What the library is asked for; the key of a plan.
struct FusedGraph {
  bool backward = false;
  std::int64_t batch = 0, T = 0, H = 0, S = 0, K = 0, D = 0;
  float scale = 1;
  bool causal = false, from_last_key = false;
  std::int64_t window = 0;
  bool padded = false;  // tokens of each sequence are given
  bool ragged = false;  // and where it begins
  std::array<FusedStrides, kFusedRagged> strides{};
  int device = 0;
  friend bool operator==(const FusedGraph&, const FusedGraph&) = default;
};

// A tensor of a graph. Offsets of a ragged one: i64 [batch + 1, 1, 1, 1], in elements.
struct FusedTensor {
  FusedRole role;
  DType dtype;
  bool output = false, ragged = false;
  std::array<std::int64_t, 4> dims, strides;
};
std::vector<FusedTensor> tensors_of(const FusedGraph& graph);
// One number for a tensor or, beyond kFusedRoles, for its offsets.
constexpr std::int64_t fused_id(FusedRole role, bool offsets = false) {
  return static_cast<std::int64_t>(role) + 1 +
         (offsets ? static_cast<std::int64_t>(kFusedRoles) : 0);
}

// A call as it is handed to the library: `graph` once for each part.
struct FusedCall {
  FusedGraph graph;
  std::int64_t row_parts = 1, head_parts = 1;  // of the batch, and of the heads
  std::int64_t library_bytes = 0;              // at the start of the workspace, the most it may use
  // Where in the workspace; -1: not there. tokens: i32 [2, N]; offsets: i64 [kFusedRagged, N + 1];
  // of_role: dense bf16 copies of inputs whose strides or address the library does not take, and
  // gradients that are added or not asked for.
  std::int64_t tokens_at = -1, offsets_at = -1;
  std::array<std::int64_t, kFusedRagged> of_role = {-1, -1, -1, -1, -1, -1, -1, -1, -1};
  std::int64_t at(FusedRole role) const { return of_role[static_cast<std::size_t>(role)]; }
  std::int64_t bytes = 0;  // all of the workspace
};

// Which kernels a call may run on. tiled: our own; fused: the library's, anything else is an Error
// that says why. From the environment's REPRISE_ATTENTION at first, else automatic.
enum class AttentionKernels : std::uint8_t { automatic, tiled, fused };
// Returns the one before.
AttentionKernels set_attention_kernels(AttentionKernels kernels);
AttentionKernels attention_kernels();

// Empty where the library's kernels can take the call, else why not: "f32". Strides and addresses
// do not count, so that they change no bit.
std::string fused_refusal(const AttentionCall& call);
// The call as the library sees it; nothing where it is refused, or tiled kernels are asked for.
std::optional<FusedCall> fused_call(const AttentionCall& call, bool backward);

// A graph that the library has compiled.
class FusedPlan {
 public:
  virtual ~FusedPlan() = default;
  // Pointers by fused_id(), absent ones null; in order of the stream.
  using Pointers = std::array<void*, kFusedRoles + kFusedRagged + 1>;
  virtual void run(const Pointers& pointers, void* workspace, void* stream) const = 0;
};

class FusedLibrary {
 public:
  virtual ~FusedLibrary() = default;
  // Null, with the reason in `why`, where the library has no kernel for the graph that needs no
  // more than `most_bytes` and gives the same bits every time. Throws Error where the library
  // itself is not there.
  virtual std::unique_ptr<FusedPlan> plan(const FusedGraph& graph, std::int64_t most_bytes,
                                          std::string& why) = 0;
};

// Plans by graph, refusals too; the least recently used goes when there are too many.
class FusedPlans {
 public:
  explicit FusedPlans(std::size_t most = 1024) : most_(most) {}
  struct Found {
    std::shared_ptr<const FusedPlan> plan;  // null: refused
    std::string why;
  };
  Found find(FusedLibrary& library, const FusedGraph& graph, std::int64_t most_bytes);
  std::size_t size() const;

 private:
  struct Entry {
    FusedGraph graph;
    Found found;
  };
  std::size_t most_;
  mutable std::mutex mutex_;
  std::list<Entry> entries_;  // the last one used first
  // Of captured steps: a graph launches a plan's kernels without asking here.
  std::set<std::shared_ptr<const FusedPlan>> captured_;
};

// The Error of a build that wants cuDNN on a machine without it.
[[noreturn]] void fail_without_cudnn(std::string_view reason);

}  // namespace reprise::kernels

namespace reprise::kernels::cuda {

// Null in a build without one.
FusedLibrary* fused_library();
// Tokens and offsets of the sequences, as FusedCall lays them out.
void find_sequences(const AttentionCall& call, const FusedGraph& graph, void* tokens, void* offsets,
                    void* stream);
// to [B, T, heads, D] dense = from; elements of 2 bytes.
void copy_heads(const AttentionHeads& from, void* to, std::int64_t B, std::int64_t T,
                std::int64_t heads, std::int64_t D, void* stream);
// False where the tiled kernels must do it. `workspace` has call.bytes.
bool fused_attention(const AttentionCall& call, const std::optional<FusedCall>& fused,
                     void* workspace, void* stream);

}  // namespace reprise::kernels::cuda

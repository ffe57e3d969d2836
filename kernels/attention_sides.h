// The sides of attention.h: one checked call as bare pointers, and who sees whom. Free of Tensor,
// so that a .cu sees no more than it needs. How the CPU side works is in attention_tasks.h.
#pragma once

#include <cstdint>
#include <optional>

#include "core/device_faults.h"
#include "core/dtype.h"
#include "kernels/attention_options.h"
#include "kernels/both_sides.h"

namespace reprise::kernels {

struct Range {
  std::int64_t begin = 0, end = 0;
};

// Keys that a query sees, as a range, and queries that see a key; padding is apart. Neither end
// decreases from a query to the next, nor from a key to the next, empty ranges included: what a run
// of them sees lies between the beginning of the first and the end of the last.
class Visibility {
 public:
  Visibility(std::int64_t T, std::int64_t S, const AttentionOptions& options)
      : queries_(T), keys_(S), window_(options.window), causal_(options.causal) {}
  // Bounds of the document of each place, [B, 2, T]; null without documents.
  void set_documents(const std::int64_t* bounds) { bounds_ = bounds; }
  const std::int64_t* document_bounds() const { return bounds_; }

  REPRISE_BOTH_SIDES Range keys(std::int64_t b, std::int64_t i) const {
    const std::int64_t at = i + keys_ - queries_;  // of the query among the keys
    return within(b, i, window_ > 0 ? at - window_ + 1 : 0, causal_ ? at + 1 : keys_, keys_);
  }
  REPRISE_BOTH_SIDES Range queries(std::int64_t b, std::int64_t j) const {
    const std::int64_t at = j + queries_ - keys_;  // the query at the key's position
    return within(b, j, causal_ ? at : 0, window_ > 0 ? at + window_ : queries_, queries_);
  }

 private:
  REPRISE_BOTH_SIDES Range within(std::int64_t b, std::int64_t place, std::int64_t begin,
                                  std::int64_t end, std::int64_t size) const {
    std::int64_t lowest = 0, highest = size;
    if (bounds_ != nullptr) {
      const std::int64_t* const of = bounds_ + 2 * b * queries_;
      lowest = of[place];
      highest = of[queries_ + place];
    }
    begin = begin < lowest ? lowest : begin;
    end = end < highest ? end : highest;
    return {begin, end < begin ? begin : end};
  }

  std::int64_t queries_, keys_, window_;
  const std::int64_t* bounds_ = nullptr;
  bool causal_;
};

// Where a tensor [B, T, H, D] lies.
struct AttentionHeads {
  char* at = nullptr;
  std::int64_t batch = 0, token = 0, head = 0;  // strides in bytes
  bool given = false;                           // also on meta, where there is no address
  bool aligned = false;                         // to 16 bytes, in all of its storage and strides
};

struct AttentionCall {
  std::int64_t B, T, H, S, K, D;  // at least 1 each
  DType dtype;
  AttentionOptions options;
  Visibility visibility;
  AttentionHeads q{}, k{}, v{}, out{}, dout{}, dq{}, dk{}, dv{};  // at null: absent
  bool accumulate_q = false, accumulate_k = false, accumulate_v = false;
  float* log_sum_exp = nullptr;
  const std::int64_t* mask = nullptr;       // [B, S]
  const std::int64_t* documents = nullptr;  // [B, T]
  int device = 0;
};

// What attention relies on and a cuda device checks itself: documents that do not decrease, and the
// options' promises.
struct VisibilityCheck {
  const std::int64_t* documents;  // [B, T]; may be null
  const std::int64_t* mask;       // [B, S]; null: nothing is promised of it
  std::int64_t B, T, S, most_documents;
  // What is said of documents that decrease (`other`, then `value`), of padding that is not on the
  // right, and of more than most_documents (`limit`): their number.
  std::int64_t decreases, padding, many;
};

struct FusedCall;  // attention_fused.h

// In order of the stream.
namespace cuda {
// The widest head, and the most queries or keys.
inline constexpr std::int64_t kMaxAttentionHead = 256, kMaxAttentionTokens = std::int64_t{1} << 30;

void check_visibility(const VisibilityCheck& check, DeviceFault* word, void* stream);
// From documents [B, T]: bounds [B, 2, T].
void document_bounds(const std::int64_t* documents, std::int64_t B, std::int64_t T,
                     std::int64_t* bounds, void* stream);
// `workspace` has the bytes of the fused call, where there is one.
void attention(const AttentionCall& call, const std::optional<FusedCall>& fused, void* workspace,
               void* stream);
// `deltas` is workspace [B, H, T].
void attention_backward(const AttentionCall& call, float* deltas,
                        const std::optional<FusedCall>& fused, void* workspace, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

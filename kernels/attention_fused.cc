#include "kernels/attention_fused.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <utility>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#include "core/error.h"
#include "core/step_graph.h"
#include "kernels/accumulate_sides.h"
#include "kernels/scratch.h"

namespace reprise::kernels {
namespace {

constexpr std::int64_t kElementBytes = 2;  // bf16
constexpr std::int64_t kPacket = 8;        // elements of 128 bits, in which strides are counted
// The gradients of the probabilities of one part, which the library keeps whole where it must give
// the same bits every time (Hopper, before cuDNN 9.25).
constexpr std::int64_t kMostProbabilityBytes = std::int64_t{1} << 30;
constexpr std::int64_t kSlackBytes = std::int64_t{64} << 10;

AttentionKernels from_environment() {
  const char* const text = std::getenv("REPRISE_ATTENTION");
  const std::string_view value = text == nullptr ? "" : text;
  if (value.empty() || value == "automatic") {
    return AttentionKernels::automatic;
  }
  if (value == "tiled") {
    return AttentionKernels::tiled;
  }
  if (value == "fused") {
    return AttentionKernels::fused;
  }
  fail("attention", "REPRISE_ATTENTION must be automatic, tiled or fused, got '{}'", value);
}

std::atomic<AttentionKernels>& chosen() {
  static std::atomic<AttentionKernels> kernels{from_environment()};
  return kernels;
}

std::int64_t up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

FusedStrides packed(std::int64_t T, std::int64_t H, std::int64_t D) {
  return {T * H * D, D, H * D};
}

// Of a tensor [B, T, H, D], or of its dense copy. A dimension of one element has no stride.
FusedStrides strides_of(const AttentionHeads& heads, std::int64_t B, std::int64_t T, std::int64_t H,
                        std::int64_t D) {
  const FusedStrides dense = packed(T, H, D);
  if (!heads.aligned) {
    return dense;
  }
  return {B > 1 ? heads.batch / kElementBytes : dense.batch,
          H > 1 ? heads.head / kElementBytes : dense.head,
          T > 1 ? heads.token / kElementBytes : dense.token};
}

FusedGraph graph_of(const AttentionCall& call, bool backward) {
  const AttentionOptions& o = call.options;
  FusedGraph g{.backward = backward,
               .batch = call.B,
               .T = call.T,
               .H = call.H,
               .S = call.S,
               .K = call.K,
               .D = call.D,
               .scale = static_cast<float>(o.scale),
               .causal = o.causal,
               .from_last_key = o.causal && call.T != call.S,
               .window = o.window,
               .padded = call.mask != nullptr || call.documents != nullptr,
               .ragged = call.documents != nullptr,
               .device = call.device};
  const auto set = [&g](FusedRole role, const FusedStrides& strides) {
    g.strides[static_cast<std::size_t>(role)] = strides;
  };
  set(FusedRole::q, strides_of(call.q, call.B, call.T, call.H, call.D));
  set(FusedRole::k, strides_of(call.k, call.B, call.S, call.K, call.D));
  set(FusedRole::v, strides_of(call.v, call.B, call.S, call.K, call.D));
  set(FusedRole::out, packed(call.T, call.H, call.D));
  set(FusedRole::stats, {call.H * call.T, call.T, 1});
  if (backward) {
    set(FusedRole::dout, strides_of(call.dout, call.B, call.T, call.H, call.D));
    set(FusedRole::dq, packed(call.T, call.H, call.D));
    set(FusedRole::dk, packed(call.S, call.K, call.D));
    set(FusedRole::dv, packed(call.S, call.K, call.D));
  }
  return g;
}

// The least number of equal parts of `count` of which each has at most `most`; all single where
// even that is too much.
std::int64_t parts_of(std::int64_t count, std::int64_t most) {
  for (std::int64_t parts = 1; parts < count; ++parts) {
    if (count % parts == 0 && count / parts <= most) {
      return parts;
    }
  }
  return count;
}

std::string refusal_of_visibility(const AttentionCall& call) {
  const AttentionOptions& o = call.options;
  if (o.dropout > 0) {
    return "dropout: its random words are ours";
  }
  if (o.causal && call.T > call.S) {
    return "causal with fewer keys than queries";
  }
  if (call.mask != nullptr) {
    if (!o.padded_right) {
      return "a mask that is not said to be padding on the right";
    }
    if (o.window > 0 || (o.causal && call.T != call.S) || call.documents != nullptr) {
      return "padding with a window, with documents, or causal with more keys than queries";
    }
  }
  if (call.documents != nullptr && o.most_documents <= 0) {
    return "documents whose number is not known";
  }
  return "";
}

// What the library may take for one part; the larger of its two ways to a fixed order of sums.
std::int64_t library_bytes(const FusedGraph& g) {
  if (!g.backward) {
    return kSlackBytes;
  }
  const std::int64_t heads = g.batch * g.H;
  const std::int64_t probabilities =
      std::min(kMostProbabilityBytes, heads * up(g.T, 64) * up(g.S, 128) * kElementBytes);
  const std::int64_t dq = heads * up(g.T, 64) * g.D * 4;
  const std::int64_t of_groups = g.H == g.K ? 0 : 2 * heads * g.S * g.D * 4;
  return kSlackBytes + std::max(probabilities, dq) + of_groups + heads * up(g.T, 64) * 8;
}

void cut(FusedCall& fused) {
  FusedGraph& g = fused.graph;
  const std::int64_t head_bytes = up(g.T, 64) * up(g.S, 128) * kElementBytes;
  const std::int64_t most = std::max<std::int64_t>(1, kMostProbabilityBytes / head_bytes);
  if (!g.ragged) {
    fused.row_parts = parts_of(g.batch, most / g.H);
    g.batch /= fused.row_parts;
  }
  if (g.batch * g.H > most) {
    fused.head_parts = parts_of(g.K, most / (g.batch * (g.H / g.K)));
    g.H /= fused.head_parts;
    g.K /= fused.head_parts;
  }
  if (g.batch == 1) {
    // The stride over one row has no meaning, and the library reads statistics only where it is
    // that of packed heads.
    g.strides[static_cast<std::size_t>(FusedRole::stats)].batch = g.H * g.T;
  }
}

void lay_out(const AttentionCall& call, FusedCall& fused) {
  const FusedGraph& g = fused.graph;
  fused.library_bytes = aligned_bytes(library_bytes(g));
  std::int64_t at = fused.library_bytes;
  const auto take = [&at](std::int64_t bytes) {
    return std::exchange(at, at + aligned_bytes(bytes));
  };
  if (g.padded) {
    fused.tokens_at = take(2 * g.batch * fused.row_parts * 4);
  }
  if (g.ragged) {
    fused.offsets_at = take(static_cast<std::int64_t>(kFusedRagged) * (g.batch + 1) * 8);
  }
  const std::int64_t of_q = call.B * call.T * call.H * call.D * kElementBytes;
  const std::int64_t of_k = call.B * call.S * call.K * call.D * kElementBytes;
  const auto take_if = [&](bool wanted, FusedRole role, std::int64_t bytes) {
    if (wanted) {
      fused.of_role[static_cast<std::size_t>(role)] = take(bytes);
    }
  };
  take_if(!call.q.aligned, FusedRole::q, of_q);
  take_if(!call.k.aligned, FusedRole::k, of_k);
  take_if(!call.v.aligned, FusedRole::v, of_k);
  if (g.backward) {
    take_if(!call.dout.aligned, FusedRole::dout, of_q);
    take_if(!call.dq.given || call.accumulate_q, FusedRole::dq, of_q);
    take_if(!call.dk.given || call.accumulate_k, FusedRole::dk, of_k);
    take_if(!call.dv.given || call.accumulate_v, FusedRole::dv, of_k);
  }
  fused.bytes = at;
}

}  // namespace

std::string_view name(FusedRole role) {
  constexpr std::array<std::string_view, kFusedRoles> kNames = {
      "q", "k", "v", "out", "stats", "dout", "dq", "dk", "dv", "query_tokens", "key_tokens"};
  return kNames[static_cast<std::size_t>(role)];
}

std::vector<FusedTensor> tensors_of(const FusedGraph& g) {
  std::vector<FusedTensor> all;
  const auto add = [&](FusedRole role, std::int64_t heads, std::int64_t tokens, std::int64_t width,
                       DType dtype, bool output) {
    const FusedStrides& s = g.strides[static_cast<std::size_t>(role)];
    all.push_back({role,
                   dtype,
                   output,
                   g.ragged,
                   {g.batch, heads, tokens, width},
                   {s.batch, s.head, s.token, 1}});
  };
  add(FusedRole::q, g.H, g.T, g.D, DType::bf16, false);
  add(FusedRole::k, g.K, g.S, g.D, DType::bf16, false);
  add(FusedRole::v, g.K, g.S, g.D, DType::bf16, false);
  add(FusedRole::out, g.H, g.T, g.D, DType::bf16, !g.backward);
  add(FusedRole::stats, g.H, g.T, 1, DType::f32, !g.backward);
  if (g.backward) {
    add(FusedRole::dout, g.H, g.T, g.D, DType::bf16, false);
    add(FusedRole::dq, g.H, g.T, g.D, DType::bf16, true);
    add(FusedRole::dk, g.K, g.S, g.D, DType::bf16, true);
    add(FusedRole::dv, g.K, g.S, g.D, DType::bf16, true);
  }
  if (g.padded) {
    for (const FusedRole role : {FusedRole::query_tokens, FusedRole::key_tokens}) {
      all.push_back({role, DType::i32, false, false, {g.batch, 1, 1, 1}, {1, 1, 1, 1}});
    }
  }
  return all;
}

AttentionKernels set_attention_kernels(AttentionKernels kernels) {
  return chosen().exchange(kernels);
}

AttentionKernels attention_kernels() {
  return chosen().load();
}

std::string fused_refusal(const AttentionCall& call) {
  if (call.dtype != DType::bf16) {
    return std::string(name(call.dtype));
  }
  if (call.D % kPacket != 0 || call.D > 256) {
    return fmt::format("heads of {} elements", call.D);
  }
  if (call.T < 2 || call.S < 2) {
    return "a single query or key";
  }
  if (std::string why = refusal_of_visibility(call); !why.empty()) {
    return why;
  }
  return "";
}

std::optional<FusedCall> fused_call(const AttentionCall& call, bool backward) {
  const AttentionKernels asked = attention_kernels();
  if (asked == AttentionKernels::tiled) {
    return std::nullopt;
  }
  if (const std::string why = fused_refusal(call); !why.empty()) {
    if (asked == AttentionKernels::fused) {
      fail(backward ? "attention_backward" : "attention", "no fused kernel takes {}", why);
    }
    return std::nullopt;
  }
  FusedCall fused{.graph = graph_of(call, backward)};
  if (fused.graph.ragged) {
    // Few sizes, so that few plans are made.
    fused.graph.batch = static_cast<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(call.options.most_documents)));
  }
  if (backward) {
    cut(fused);
  }
  lay_out(call, fused);
  return fused;
}

FusedPlans::Found FusedPlans::find(FusedLibrary& library, const FusedGraph& graph,
                                   std::int64_t most_bytes) {
  const std::lock_guard lock(mutex_);
  const auto at = std::find_if(entries_.begin(), entries_.end(),
                               [&](const Entry& entry) { return entry.graph == graph; });
  if (at != entries_.end()) {
    entries_.splice(entries_.begin(), entries_, at);
  } else {
    Found found;
    found.plan = library.plan(graph, most_bytes, found.why);
    if (entries_.size() >= most_) {
      entries_.pop_back();
    }
    entries_.push_front({graph, found});
  }
  const Found& found = entries_.front().found;
  if (capturing() && found.plan != nullptr) {
    captured_.insert(found.plan);
  }
  return found;
}

std::size_t FusedPlans::size() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

void fail_without_cudnn(std::string_view reason) {
  fail("attention",
       "cuDNN cannot be loaded: {}: install cuDNN 9 (Debian: cudnn9-cuda-13; PyPI: "
       "nvidia-cudnn-cu13) where the loader finds it, or run with REPRISE_ATTENTION=tiled",
       reason);
}

}  // namespace reprise::kernels

// Part of builds that have the CUDA side: here what is no kernel of it.
#if defined(REPRISE_HAS_CUDA)
namespace reprise::kernels::cuda {
namespace {

FusedPlans& plans() {
  static FusedPlans& all = *new FusedPlans;  // a library may be gone before static objects are
  return all;
}

// Memory that is not ours may begin anywhere; what is not aligned within it is copied.
bool aligned(const AttentionCall& call) {
  for (const AttentionHeads* const x : {&call.q, &call.k, &call.v, &call.dout}) {
    if (x->aligned && reinterpret_cast<std::uintptr_t>(x->at) % 16 != 0) {
      return false;
    }
  }
  return true;
}

// The tensors that the library sees: the caller's, or those in the workspace.
std::array<void*, kFusedRagged> bases_of(const AttentionCall& call, const FusedCall& fused,
                                         char* workspace) {
  std::array<void*, kFusedRagged> bases = {call.q.at,   call.k.at,        call.v.at,
                                           call.out.at, call.log_sum_exp, call.dout.at,
                                           call.dq.at,  call.dk.at,       call.dv.at};
  for (std::size_t i = 0; i < kFusedRagged; ++i) {
    if (fused.of_role[i] >= 0) {
      bases[i] = workspace + fused.of_role[i];
    }
  }
  return bases;
}

void copy_inputs(const AttentionCall& call, const FusedCall& fused, char* workspace, void* stream) {
  const auto copy = [&](FusedRole role, const AttentionHeads& from, std::int64_t tokens,
                        std::int64_t heads) {
    if (fused.at(role) >= 0) {
      copy_heads(from, workspace + fused.at(role), call.B, tokens, heads, call.D, stream);
    }
  };
  copy(FusedRole::q, call.q, call.T, call.H);
  copy(FusedRole::k, call.k, call.S, call.K);
  copy(FusedRole::v, call.v, call.S, call.K);
  copy(FusedRole::dout, call.dout, call.T, call.H);
}

std::size_t key_bytes(const AttentionCall& call) {
  return static_cast<std::size_t>(call.B * call.S * call.K * call.D) * 2;
}

void add_result(const void* from, const AttentionHeads& to, bool accumulate, std::int64_t rows,
                std::int64_t columns, void* stream) {
  if (to.given && accumulate) {
    const Matrix into{to.at, DType::bf16, columns};
    add(into, Matrix{const_cast<void*>(from), DType::bf16, columns}, into, {rows, columns}, stream);
  }
}

class Parts {
 public:
  Parts(const AttentionCall& call, const FusedCall& fused, char* workspace)
      : call_(call),
        fused_(fused),
        workspace_(workspace),
        bases_(bases_of(call, fused, workspace)) {}

  void* base(FusedRole role) const { return bases_[static_cast<std::size_t>(role)]; }

  FusedPlan::Pointers at(std::int64_t row_part, std::int64_t head_part) const {
    FusedPlan::Pointers pointers{};
    const FusedGraph& g = fused_.graph;
    const std::int64_t rows = g.ragged ? 0 : row_part * g.batch;
    for (const FusedTensor& t : tensors_of(g)) {
      void*& to = pointers.at(static_cast<std::size_t>(fused_id(t.role)));
      if (t.role == FusedRole::query_tokens || t.role == FusedRole::key_tokens) {
        const std::int64_t first = t.role == FusedRole::key_tokens ? g.batch * fused_.row_parts : 0;
        to = workspace_ + fused_.tokens_at + (first + rows) * 4;
        continue;
      }
      const FusedStrides& s = g.strides[static_cast<std::size_t>(t.role)];
      // A part that is some heads of one row has another batch stride of the statistics.
      const std::int64_t batch = t.role == FusedRole::stats ? call_.H * call_.T : s.batch;
      const std::int64_t skip = rows * batch + head_part * t.dims[1] * s.head;
      to = static_cast<char*>(base(t.role)) + skip * static_cast<std::int64_t>(size_bytes(t.dtype));
      if (t.ragged) {
        pointers.at(static_cast<std::size_t>(fused_id(t.role, true))) =
            workspace_ + fused_.offsets_at + static_cast<std::int64_t>(t.role) * (g.batch + 1) * 8;
      }
    }
    return pointers;
  }

 private:
  const AttentionCall& call_;
  const FusedCall& fused_;
  char* workspace_;
  std::array<void*, kFusedRagged> bases_;
};

}  // namespace

namespace {

std::string sizes_of(const AttentionCall& call) {
  return fmt::format("q [{}, {}, {}, {}], k and v [{}, {}, {}, {}] by a fused kernel", call.B,
                     call.T, call.H, call.D, call.B, call.S, call.K, call.D);
}

}  // namespace

bool fused_attention(const AttentionCall& call, const std::optional<FusedCall>& fused,
                     void* workspace, void* stream) {
  if (!fused.has_value()) {
    return false;
  }
  const bool backward = fused->graph.backward;
  const char* const operation = backward ? "attention_backward" : "attention";
  FusedLibrary* const library = fused_library();
  FusedPlans::Found found{nullptr, "this build has no cuDNN"};
  if (library != nullptr) {
    found = aligned(call)
                ? plans().find(*library, fused->graph, fused->library_bytes)
                : FusedPlans::Found{nullptr, "addresses that are no multiples of 16 bytes"};
  }
  if (found.plan == nullptr) {
    if (attention_kernels() == AttentionKernels::fused) {
      fail(operation, "no fused kernel takes this call: {}", found.why);
    }
    return false;
  }
  auto* const memory = static_cast<char*>(workspace);
  if (fused->tokens_at >= 0) {
    find_sequences(call, fused->graph, memory + fused->tokens_at, memory + fused->offsets_at,
                   stream);
  }
  copy_inputs(call, *fused, memory, stream);
  const Parts parts(call, *fused, memory);
  if (backward && fused->graph.padded && !fused->graph.ragged) {
    const Device device{DeviceKind::cuda, static_cast<std::int8_t>(call.device)};
    cuda_zero(parts.base(FusedRole::dk), device, key_bytes(call));
    cuda_zero(parts.base(FusedRole::dv), device, key_bytes(call));
  }
  for (std::int64_t row = 0; row < fused->row_parts; ++row) {
    for (std::int64_t head = 0; head < fused->head_parts; ++head) {
      found.plan->run(parts.at(row, head), memory, stream);
      settle_call(operation, stream, [&] { return sizes_of(call); });
    }
  }
  if (backward) {
    const std::int64_t queries = call.B * call.T, keys = call.B * call.S;
    add_result(parts.base(FusedRole::dq), call.dq, call.accumulate_q, queries, call.H * call.D,
               stream);
    add_result(parts.base(FusedRole::dk), call.dk, call.accumulate_k, keys, call.K * call.D,
               stream);
    add_result(parts.base(FusedRole::dv), call.dv, call.accumulate_v, keys, call.K * call.D,
               stream);
  }
  return true;
}

}  // namespace reprise::kernels::cuda
#endif

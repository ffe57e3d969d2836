#include "kernels/attention_tasks.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "kernels/scratch.h"

namespace reprise::kernels::cpu {
namespace {

constexpr std::int64_t kQueries = 64, kKeys = 512;
// Queries of one head that a forward task takes; it copies keys and values for itself.
constexpr std::int64_t kTaskQueries = 1024;

std::int64_t parts(std::int64_t size, std::int64_t of) {
  return (size + of - 1) / of;
}

}  // namespace

void document_bounds(const std::int64_t* documents, std::int64_t B, std::int64_t T,
                     std::int64_t* bounds) {
  for (std::int64_t b = 0; b < B; ++b) {
    const std::int64_t* const row = documents + b * T;
    std::int64_t* const begin = bounds + 2 * b * T;
    std::int64_t* const end = begin + T;
    for (std::int64_t i = 0; i < T; ++i) {
      begin[i] = i > 0 && row[i] == row[i - 1] ? begin[i - 1] : i;
    }
    for (std::int64_t i = T - 1; i >= 0; --i) {
      end[i] = i + 1 < T && row[i] == row[i + 1] ? end[i + 1] : i + 1;
    }
  }
}

// ---- plan ----

std::int64_t AttentionPlan::tasks(std::int64_t B, std::int64_t T, std::int64_t H) {
  return B * H * parts(T, kTaskQueries);
}

AttentionPlan::AttentionPlan(std::int64_t T_, std::int64_t S_, std::int64_t D_, DType dtype_,
                             const AttentionOptions& options, bool whole, bool backward)
    : queries(std::min(kQueries, T_)),
      keys(std::min(kKeys, S_)),
      grain(std::min(kQueries, S_)),
      T(T_),
      S(S_),
      D(D_),
      dtype(dtype_) {
  lay_out(options.dropout > 0, backward, make_products(whole, backward));
}

// Widths of key tiles are multiples of the grain, or such a multiple less than a tile and the rest
// at the end of the keys.
std::size_t AttentionPlan::index(Kind kind, std::int64_t m, std::int64_t w, bool first) const {
  const std::int64_t widths = keys / grain + 1;
  const std::int64_t at = w % grain == 0 ? w / grain : widths + w / grain;
  const std::int64_t row = (kind * 2 + (m == queries ? 0 : 1)) * 2 + (first ? 1 : 0);
  return static_cast<std::size_t>(row * 2 * widths + at);
}

const TileProduct& AttentionPlan::product(Kind kind, std::int64_t m, std::int64_t w,
                                          bool first) const {
  return *products_[index(kind, m, w, first)];
}

// `whole`: no causality, window or documents, so that only full tiles and the last one occur.
std::int64_t AttentionPlan::make_products(bool whole, bool backward) {
  std::vector<std::int64_t> rows{queries}, widths;
  if (T % queries != 0) {
    rows.push_back(T % queries);
  }
  for (std::int64_t w = grain; w <= keys; w += grain) {
    if (!whole || w == keys || w == S % keys) {
      widths.push_back(w);
    }
  }
  for (std::int64_t w = S % grain; S % grain != 0 && w <= keys; w += grain) {
    if (!whole || w == keys || w == S % keys) {
      widths.push_back(w);
    }
  }
  products_.resize(index(kKinds, queries, 0, false));
  std::int64_t scratch = 0;
  const auto make = [&](Kind kind, std::int64_t m, std::int64_t w, bool first, TileShape s) {
    s.inputs = dtype;
    s.accumulate = !first;
    auto& product = products_[index(kind, m, w, first)];
    product = tile_product(s);
    scratch = std::max(scratch, product->scratch_bytes());
  };
  const auto shape = [](std::int64_t m, std::int64_t n, std::int64_t k, bool ta, bool tb) {
    TileShape s;
    s.m = m;
    s.n = n;
    s.k = k;
    s.lda = ta ? m : k;
    s.ldb = tb ? k : n;
    s.ldc = n;
    s.transpose_a = ta;
    s.transpose_b = tb;
    return s;
  };
  for (const std::int64_t m : rows) {
    for (const std::int64_t w : widths) {
      if (!backward) {
        make(kScores, m, w, true, shape(m, w, D, false, true));
        make(kOutputs, m, w, true, shape(m, D, w, false, false));
        make(kOutputs, m, w, false, shape(m, D, w, false, false));
        continue;
      }
      make(kScoresT, m, w, true, shape(w, m, D, false, true));
      make(kKeySums, m, w, false, shape(w, D, m, false, false));
      make(kQuerySums, m, w, true, shape(m, D, w, true, false));
      make(kQuerySums, m, w, false, shape(m, D, w, true, false));
    }
  }
  return scratch;
}

void AttentionPlan::lay_out(bool dropout, bool backward, std::int64_t library_bytes) {
  std::int64_t bytes = 0;
  const auto take = [&bytes](std::int64_t count) {
    const std::int64_t at = bytes;
    bytes += aligned_bytes(count);
    return at;
  };
  const auto element = static_cast<std::int64_t>(size_bytes(dtype));
  const std::int64_t tile = queries * keys;
  scratch_.q = take(queries * D * element);
  scratch_.k = take(S * D * element);
  scratch_.v = take(S * D * element);
  scratch_.scores = take(4 * tile);
  const bool apart = dtype == DType::bf16;
  scratch_.probabilities = apart ? take(2 * tile) : scratch_.scores;
  scratch_.keep = dropout ? take(4 * tile) : 0;
  scratch_.bias = take(4 * S);
  scratch_.ranges = take(2 * 4 * std::max(queries, keys));
  scratch_.rows = take(2 * 4 * queries);
  scratch_.sums = take(4 * queries * D);
  if (backward) {
    scratch_.dout = take(queries * D * element);
    scratch_.products = take(4 * tile);
    scratch_.gradients = apart ? take(2 * tile) : scratch_.products;
    scratch_.dk = take(4 * S * D);
    scratch_.dv = take(4 * S * D);
  }
  scratch_.library = take(library_bytes);
  slot_bytes_ = bytes;
}

std::vector<Range> AttentionPlan::tiles(const Visibility& visibility, std::int64_t b,
                                        std::int64_t first, std::int64_t last) const {
  std::int64_t begin = S, end = 0;
  for (std::int64_t i = first; i < last; ++i) {
    const Range range = visibility.keys(b, i);
    if (range.begin < range.end) {
      begin = std::min(begin, range.begin);
      end = std::max(end, range.end);
    }
  }
  std::vector<Range> result;
  begin = begin / grain * grain;
  end = std::min(S, parts(end, grain) * grain);
  for (; begin < end; begin += keys) {
    result.push_back({begin, std::min(end, begin + keys)});
  }
  return result;
}

// ---- the loops ----

namespace {

// A task's slot of scratch, and one head of the call.
class Task {
 public:
  Task(const AttentionPlan& plan, const AttentionCall& call, char* slot, std::int64_t b,
       std::int64_t kv_head)
      : plan_(plan), call_(call), slot_(slot), b_(b), kv_head_(kv_head) {}

  void copy_keys_and_values() {
    copy_rows(call_.k, kv_head_, 0, plan_.S, at<char>(scratch().k));
    copy_rows(call_.v, kv_head_, 0, plan_.S, at<char>(scratch().v));
    has_bias_ = call_.mask != nullptr;
    for (std::int64_t j = 0; has_bias_ && j < plan_.S; ++j) {
      at<float>(scratch().bias)[j] =
          call_.mask[b_ * plan_.S + j] != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
    }
  }

  void forward(std::int64_t head, std::int64_t first, std::int64_t last);
  void backward(std::int64_t head, std::int64_t first, std::int64_t last);
  void clear_key_sums() {
    const auto bytes = static_cast<std::size_t>(4 * plan_.S * plan_.D);
    std::memset(at<char>(scratch().dk), 0, bytes);
    std::memset(at<char>(scratch().dv), 0, bytes);
  }
  void store_key_sums() {
    store(scratch().dk, plan_.S, call_.dk, kv_head_, 0, call_.accumulate_k);
    store(scratch().dv, plan_.S, call_.dv, kv_head_, 0, call_.accumulate_v);
  }

 private:
  template <class T>
  T* at(std::int64_t offset) const {
    return reinterpret_cast<T*>(slot_ + offset);
  }
  const AttentionPlan::Scratch& scratch() const { return plan_.scratch(); }
  std::int64_t row_bytes() const {
    return plan_.D * static_cast<std::int64_t>(size_bytes(call_.dtype));
  }
  char* place(const AttentionHeads& heads, std::int64_t head, std::int64_t token) const {
    return heads.at + b_ * heads.batch + head * heads.head + token * heads.token;
  }
  void copy_rows(const AttentionHeads& from, std::int64_t head, std::int64_t first,
                 std::int64_t last, char* to) const {
    for (std::int64_t i = first; i < last; ++i, to += row_bytes()) {
      std::memcpy(to, place(from, head, i), static_cast<std::size_t>(row_bytes()));
    }
  }
  void store(std::int64_t sums, std::int64_t rows, const AttentionHeads& to, std::int64_t head,
             std::int64_t first, bool accumulate) const {
    if (to.at != nullptr) {
      store_rows(at<float>(sums), rows, plan_.D, 1.0f, call_.dtype, place(to, head, first),
                 to.token, accumulate);
    }
  }
  const float* keep(std::int64_t head, std::int64_t first, std::int64_t m, Range tile,
                    bool keys_as_rows) const;
  void gradient_of_tile(std::int64_t head, std::int64_t first, std::int64_t m, Range tile);
  float* log_sum_exp(std::int64_t head, std::int64_t token) const {
    return call_.log_sum_exp + (b_ * call_.H + head) * call_.T + token;
  }

  const AttentionPlan& plan_;
  const AttentionCall& call_;
  char* const slot_;
  const std::int64_t b_, kv_head_;
  bool has_bias_ = false;
};

const float* Task::keep(std::int64_t head, std::int64_t first, std::int64_t m, Range tile,
                        bool keys_as_rows) const {
  if (call_.options.dropout == 0) {
    return nullptr;
  }
  KeepTile t{};
  t.seed = call_.options.seed;
  t.blocks_a_row = parts(plan_.S, 4);
  t.block = call_.options.offset +
            static_cast<std::uint64_t>(((b_ * call_.H + head) * call_.T + first) * t.blocks_a_row);
  t.first_key = tile.begin;
  t.queries = m;
  t.keys = tile.end - tile.begin;
  t.dropout = call_.options.dropout;
  t.keys_as_rows = keys_as_rows;
  t.keep = at<float>(scratch().keep);
  keep_tile(t);
  return t.keep;
}

void Task::forward(std::int64_t head, std::int64_t first, std::int64_t last) {
  const std::int64_t m = last - first;
  copy_rows(call_.q, head, first, last, at<char>(scratch().q));
  float* const row_max = at<float>(scratch().rows);
  float* const row_sum = row_max + plan_.queries;
  float* const sums = at<float>(scratch().sums);
  auto* const begin = at<std::int32_t>(scratch().ranges);
  auto* const end = begin + plan_.queries;
  bool is_first = true;
  for (const Range tile : plan_.tiles(call_.visibility, b_, first, last)) {
    const std::int64_t w = tile.end - tile.begin;
    plan_.product(AttentionPlan::kScores, m, w, true)
        .run(at<char>(scratch().q), at<char>(scratch().k) + tile.begin * row_bytes(),
             at<float>(scratch().scores), nullptr, at<char>(scratch().library));
    for (std::int64_t i = 0; i < m; ++i) {
      const Range seen = call_.visibility.keys(b_, first + i);
      begin[i] = static_cast<std::int32_t>(std::clamp<std::int64_t>(seen.begin - tile.begin, 0, w));
      end[i] = static_cast<std::int32_t>(std::clamp<std::int64_t>(seen.end - tile.begin, 0, w));
    }
    softmax_tile({at<float>(scratch().scores), at<char>(scratch().probabilities), call_.dtype, m, w,
                  begin, end, has_bias_ ? at<float>(scratch().bias) + tile.begin : nullptr,
                  keep(head, first, m, tile, false), static_cast<float>(call_.options.scale),
                  row_max, row_sum, sums, plan_.D, is_first});
    plan_.product(AttentionPlan::kOutputs, m, w, is_first)
        .run(at<char>(scratch().probabilities), at<char>(scratch().v) + tile.begin * row_bytes(),
             sums, nullptr, at<char>(scratch().library));
    is_first = false;
  }
  if (is_first) {  // no query of these sees anything
    std::fill_n(row_max, m, -std::numeric_limits<float>::infinity());
    std::fill_n(row_sum, m, 0.0f);
    std::fill_n(sums, m * plan_.D, 0.0f);
  }
  finish_rows({sums, row_max, row_sum, m, plan_.D, call_.dtype, place(call_.out, head, first),
               call_.out.token, log_sum_exp(head, first)});
}

// Scores become probabilities and the gradient of scores, both [w, m], and join the sums of keys.
void Task::gradient_of_tile(std::int64_t head, std::int64_t first, std::int64_t m, Range tile) {
  const std::int64_t w = tile.end - tile.begin;
  char* const library = at<char>(scratch().library);
  const auto& scores = plan_.product(AttentionPlan::kScoresT, m, w, true);
  scores.run(at<char>(scratch().k) + tile.begin * row_bytes(), at<char>(scratch().q),
             at<float>(scratch().scores), nullptr, library);
  scores.run(at<char>(scratch().v) + tile.begin * row_bytes(), at<char>(scratch().dout),
             at<float>(scratch().products), nullptr, library);
  auto* const begin = at<std::int32_t>(scratch().ranges);
  auto* const end = begin + plan_.keys;
  for (std::int64_t j = 0; j < w; ++j) {
    const Range seen = call_.visibility.queries(b_, tile.begin + j);
    const bool hidden = has_bias_ && at<float>(scratch().bias)[tile.begin + j] != 0.0f;
    begin[j] = static_cast<std::int32_t>(std::clamp<std::int64_t>(seen.begin - first, 0, m));
    end[j] =
        hidden ? 0 : static_cast<std::int32_t>(std::clamp<std::int64_t>(seen.end - first, 0, m));
  }
  gradient_tile({at<float>(scratch().scores), at<float>(scratch().products),
                 at<char>(scratch().probabilities), at<char>(scratch().gradients), call_.dtype, w,
                 m, begin, end, keep(head, first, m, tile, true), log_sum_exp(head, first),
                 at<float>(scratch().rows), static_cast<float>(call_.options.scale)});
  const auto& sums = plan_.product(AttentionPlan::kKeySums, m, w, false);
  if (call_.dv.at != nullptr) {
    sums.run(at<char>(scratch().probabilities), at<char>(scratch().dout),
             at<float>(scratch().dv) + tile.begin * plan_.D, nullptr, library);
  }
  if (call_.dk.at != nullptr) {
    sums.run(at<char>(scratch().gradients), at<char>(scratch().q),
             at<float>(scratch().dk) + tile.begin * plan_.D, nullptr, library);
  }
}

void Task::backward(std::int64_t head, std::int64_t first, std::int64_t last) {
  const std::int64_t m = last - first;
  copy_rows(call_.q, head, first, last, at<char>(scratch().q));
  copy_rows(call_.dout, head, first, last, at<char>(scratch().dout));
  row_dots(call_.dtype, at<char>(scratch().dout), row_bytes(), place(call_.out, head, first),
           call_.out.token, m, plan_.D, at<float>(scratch().rows));
  float* const sums = at<float>(scratch().sums);
  bool is_first = true;
  for (const Range tile : plan_.tiles(call_.visibility, b_, first, last)) {
    gradient_of_tile(head, first, m, tile);
    if (call_.dq.at != nullptr) {
      plan_.product(AttentionPlan::kQuerySums, m, tile.end - tile.begin, is_first)
          .run(at<char>(scratch().gradients), at<char>(scratch().k) + tile.begin * row_bytes(),
               sums, nullptr, at<char>(scratch().library));
    }
    is_first = false;
  }
  if (is_first) {
    std::fill_n(sums, m * plan_.D, 0.0f);
  }
  store(scratch().sums, m, call_.dq, head, first, call_.accumulate_q);
}

}  // namespace

void AttentionPlan::forward(const AttentionCall& call, void* workspace, std::int64_t slots) const {
  ScratchSlots scratch(workspace, slots, slot_bytes_);
  const std::int64_t spans = parts(call.T, kTaskQueries);
  parallel_for(tasks(call.B, call.T, call.H), 1, [&](std::int64_t task, std::int64_t) {
    const ScratchSlots::Use slot(scratch);
    const std::int64_t row = task / spans, span = task % spans * kTaskQueries;
    const std::int64_t b = row / call.H, head = row % call.H;
    Task work(*this, call, slot.at(), b, head / (call.H / call.K));
    work.copy_keys_and_values();
    const std::int64_t end = std::min(call.T, span + kTaskQueries);
    for (std::int64_t first = span; first < end; first += queries) {
      work.forward(head, first, std::min(end, first + queries));
    }
  });
}

void AttentionPlan::backward(const AttentionCall& call, void* workspace, std::int64_t slots) const {
  ScratchSlots scratch(workspace, slots, slot_bytes_);
  const std::int64_t group = call.H / call.K;
  parallel_for(call.B * call.K, 1, [&](std::int64_t task, std::int64_t) {
    const ScratchSlots::Use slot(scratch);
    const std::int64_t kv_head = task % call.K;
    Task work(*this, call, slot.at(), task / call.K, kv_head);
    work.copy_keys_and_values();
    work.clear_key_sums();
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (std::int64_t first = 0; first < call.T; first += queries) {
        work.backward(head, first, std::min(call.T, first + queries));
      }
    }
    work.store_key_sums();
  });
}

}  // namespace reprise::kernels::cpu

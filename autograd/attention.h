// Attention on Variables. Formulas, who sees what, strides and dtypes: kernels/attention.h.
//
//   Variable o = attention(q, k, v, {.scale = 0.125, .causal = true});   // [B, T, H, D]
//
// Held for backward: q, k, v, the output and one f32 a query and head.
#pragma once

#include <cstdint>

#include "autograd/variable.h"
#include "core/philox.h"

namespace reprise {

struct AttentionSpec {
  double scale = 1;  // of the scores: 1 / sqrt(D) as a rule
  bool causal = false;
  std::int64_t window = 0;  // with causal: this many keys at most, the query's own the last; 0: all
  Tensor mask{};            // optional [B, S] i64: 0 is padding, which no query sees
  Tensor documents{};       // optional [B, T] i64, not decreasing: a query sees its own document
  double dropout = 0;       // on the probabilities
  Generator* generator = nullptr;  // needed with dropout
  // Promises by which a CUDA device runs its fastest kernels (kernels/attention_options.h).
  bool padded_right = false;        // each row of the mask: one or more of not 0, then only 0
  std::int64_t most_documents = 0;  // at most so many of them in the whole batch; 0: unknown
};

// q [B, T, H, D], k and v [B, S, K, D], H a multiple of K -> [B, T, H, D].
Variable attention(Variable q, Variable k, Variable v, const AttentionSpec& spec);

}  // namespace reprise

// Attention over heads, in tiles: probabilities never exist as a whole.
//
//   s_ij = scale * q_i . k_j               for keys j that query i sees, else -inf
//   p_ij = exp(s_ij - L_i),  L_i = log sum_j exp(s_ij)
//   o_i  = sum_j d_ij p_ij v_j             d_ij: dropout, 0 or 1 / (1 - dropout); 1 without
//
// Gradients of a loss with do: dv_j = sum_i d_ij p_ij do_i; e_ij = p_ij (d_ij do_i . v_j - do_i .
// o_i); dq_i = scale sum_j e_ij k_j; dk_j = scale sum_i e_ij q_i; dk and dv also sum over the query
// heads that share the head.
//
// Shapes: q, out [B, T, H, D]; k, v [B, S, K, D], H a multiple of K: query heads g H/K .. (g+1) H/K
// - 1 read head g. log_sum_exp [B, H, T] (L; -inf where a query sees nothing, whose out is zero).
// Which keys query i, at position i + S - T among the keys, sees:
//   causal      j <= i + S - T
//   window > 0  i + S - T - window < j, with causal
//   mask        [B, S] i64: those with mask != 0
//   documents   [B, T] i64, T = S: those with the number of the query's own document. Numbers must
//               not decrease along a row.
// Strides: q, k, v and the upstream gradient have unit inner stride, any others (heads inside a
// fused projection); out, log_sum_exp and the gradients are contiguous. Dtypes: q, k, v, out and
// gradients all f32 or all bf16; log_sum_exp f32. Scores and sums in f32; with bf16 the
// probabilities (and e) are rounded to bf16 before they are multiplied. Exponentials below 2^-100
// of a row's largest count as 0 (no subnormal operands of products). Dropout: d_ij comes from
// word j % 4 of block offset + ((b H + h) T + i) ceil(S / 4) + j / 4 of the stream `seed`
// (core/philox.h): dropped where uniform(word) < dropout. Aliasing: outputs must not overlap inputs
// or each other. Order of sums: fixed by the sizes and by what is visible, not by threads.
// Workspace: a few tiles a thread, and dense copies of one head's k and v (backward: and f32 sums
// of dk and dv); on a CUDA device [B, 2, T] i64 with documents, and backward one f32 a query and
// head. On a CUDA device D is at most 256, and the device checks documents and promises itself, in
// the forward: the Error comes where the host waits for it (core/device_faults.h), and the result
// is none. bf16 without dropout runs there on a library's fused kernels, which round the same way,
// where they take the call (attention_fused.h says which, and what workspace that is; the options
// make two promises about padding and documents). The tiled kernels have the rest; backward they
// compute the scores twice, for dq and for dk and dv, instead of adding by atomics. Errors: shapes,
// dtypes, devices, strides; a window without causal; documents that decrease; promises that do not
// hold; dropout outside [0, 1). Source of the method: Dao, Fu, Ermon, Rudra, Re, "FlashAttention",
// arXiv:2205.14135, 2022.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "kernels/attention_options.h"

namespace reprise::kernels {

// `mask` and `documents` may be undefined.
struct AttentionInputs {
  Tensor q, k, v, mask, documents;
};

void attention(const AttentionInputs& in, const Tensor& out, const Tensor& log_sum_exp,
               const AttentionOptions& options);

// Each gradient may be undefined: then it is not computed.
struct AttentionGradients {
  Tensor dq, dk, dv;
  bool accumulate_q = false, accumulate_k = false, accumulate_v = false;
};

void attention_backward(const AttentionInputs& in, const Tensor& out, const Tensor& log_sum_exp,
                        const Tensor& dout, const AttentionGradients& gradients,
                        const AttentionOptions& options);

// Pairs (query, key) of one head that are visible, over the batch: what FLOPs are counted by.
// Checks the inputs as attention does. On a CUDA device padding and documents are not looked at.
std::int64_t visible_pairs(const AttentionInputs& in, const AttentionOptions& options);

// Blocks of four random words that dropout takes from the stream.
inline std::int64_t attention_dropout_blocks(std::int64_t B, std::int64_t H, std::int64_t T,
                                             std::int64_t S) {
  return B * H * T * ((S + 3) / 4);
}

}  // namespace reprise::kernels

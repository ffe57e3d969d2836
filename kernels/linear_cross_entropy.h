// The loss head: logits = X W^T and their softmax cross-entropy in one, in chunks of tokens, so
// that the logits never exist as a whole.
//
//   loss = 1/items * sum over the valid rows n of (lse_n - logits_n,label_n),  logits_n = W x_n
//   dX   = D W,  dW = D^T X,  D_n = 1/items * (softmax(logits_n) - onehot(label_n)), 0 where
//   ignored
//
// Both gradients are those for an upstream gradient of 1, formed while the logits of a chunk are
// there. Valid rows, items and NaN: as in cross_entropy.h. Shapes: X [N, C], W [V, C], labels [N],
// loss [], dX [N, C], dW [V, C]. dX and dW may be undefined (not wanted). Dtypes: X and W both f32
// or both bf16; labels i64; loss f32; dX as X; dW f32 or as W. Logits and D are held in the dtype
// of X; dW is added up over chunks in f32 and rounded once. Strides: X, W and dX rows of unit
// stride; labels and dW contiguous. Workspace: one chunk of logits [linear_cross_entropy_rows(N, C,
// V), V], N floats, [V, C] floats when a bf16 dW is added up over several chunks, and 8 bytes on a
// cuda device. Aliasing: none. Errors: shapes, dtypes, devices or strides other than these; labels
// and items as in cross_entropy.h.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "kernels/cross_entropy.h"

namespace reprise::kernels {

void linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& labels,
                          const Tensor& loss, const Tensor& dx, const Tensor& dw,
                          const CrossEntropyOptions& options = {});

// For an upstream gradient g [] f32: gradient = g * at_one, or gradient += g * at_one, where at_one
// is the dX or dW above. The two have one shape, contiguous; each f32 or bf16.
void linear_cross_entropy_backward(const Tensor& g, const Tensor& at_one, const Tensor& gradient,
                                   bool accumulate = false);

// Tokens of a chunk: equal chunks of a multiple of 64, whose logits take no more than about 100 MiB
// or, where that is more, a quarter of W (below, adding to dW for every chunk would cost more than
// the products) or 256 rows (below, W is read so often that the products wait for it).
std::int64_t linear_cross_entropy_rows(std::int64_t tokens, std::int64_t width,
                                       std::int64_t vocabulary, DType dtype);

}  // namespace reprise::kernels

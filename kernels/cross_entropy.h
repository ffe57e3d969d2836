// Softmax cross-entropy of rows of logits x [.., V] against labels [..].
//
//   lse_n = log sum_v exp(x_nv)
//   loss  = 1/items * sum over the valid rows n of (lse_n - x_n,label_n)
//   d x_n = g/items * (exp(x_n - lse_n) - onehot(label_n)) in a valid row, 0 in the others
//
// A row is valid unless its label is ignore_index. items == 0 stands for the number of valid rows:
// the mean; it is NaN when there are none (0/0), while with items given the loss is 0. Gradients
// are 0 in both cases. (As PyTorch; models with a given number of items: Hugging Face's
// num_items_in_batch.)
// Dtypes: x and d x f32 or bf16, computed in f32; labels i64; loss and g f32 []; lse f32 of the
// shape of the labels. Rows are added in f64 in their order: the result does not depend on threads.
// NaN or +inf in a valid row, or nothing but -inf, gives a NaN loss and a NaN gradient in that row.
// lse of an ignored row is 0: its logits are not read. Probabilities below 2^-100 count as 0, so
// that no gradient is subnormal, which matrix products would pay for dearly. Strides: x and d x
// rows of unit stride; the others contiguous. Aliasing: d x may be x, when it does not accumulate:
// the gradient is then formed in place. Errors: shapes, dtypes, devices or strides other than
// these; a label outside of [0, V), by row; items negative or not finite. A cuda device checks the
// labels itself, and counts them: the Error comes where the host waits for it
// (core/device_faults.h), and a wrong label is as one that is ignored. Workspace there: 8 bytes.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

struct CrossEntropyOptions {
  double items = 0;
  std::int64_t ignore_index = -100;
};

void cross_entropy(const Tensor& x, const Tensor& labels, const Tensor& loss, const Tensor& lse,
                   const CrossEntropyOptions& options = {});

void cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& labels,
                            const Tensor& lse, const Tensor& dx,
                            const CrossEntropyOptions& options = {}, bool accumulate = false);

}  // namespace reprise::kernels

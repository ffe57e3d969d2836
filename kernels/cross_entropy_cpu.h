// Rows of cross-entropy on the CPU, for cross_entropy.cc and linear_cross_entropy.cc.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "kernels/cross_entropy.h"

namespace reprise::kernels {

// The number by which the loss is divided. Throws Error, in the name of `operation`, for a label
// that is neither ignored nor in [0, vocabulary), and for bad items. Labels in host memory,
// contiguous.
double checked_items(const char* operation, const Tensor& labels, std::int64_t vocabulary,
                     const CrossEntropyOptions& options);

namespace cpu {

struct LogitRows {
  void* at;
  DType dtype;
  std::int64_t rows, vocabulary, row_stride;
  const std::int64_t* labels;
  std::int64_t ignore_index;
};

// lse [rows], losses [rows]: 0 where ignored. lse may be null.
void cross_entropy_rows(const LogitRows& x, float* lse, float* losses);
// dx = or += factor * (softmax - onehot).
void cross_entropy_gradient(const LogitRows& x, const float* lse, float factor, void* dx,
                            std::int64_t dx_stride, bool accumulate);
// Both while a row is in the cache; the gradient takes the place of the logits.
void cross_entropy_in_place(const LogitRows& x, float factor, float* losses);

}  // namespace cpu
}  // namespace reprise::kernels

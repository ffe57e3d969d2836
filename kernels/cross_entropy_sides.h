// Rows of cross-entropy, for cross_entropy.cc and linear_cross_entropy.cc.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "core/dtype.h"

namespace reprise {
class Tensor;
}

namespace reprise::kernels {

struct CrossEntropyOptions;

// The number by which the loss is divided: `number`, or what a cuda device has counted.
struct LossItems {
  double number = 0;
  const std::int64_t* counted = nullptr;  // null: `number`
};
// Workspace for what checked_items counts on `device`; undefined where there is nothing to count.
Tensor count_of_items(Device device, const CrossEntropyOptions& options);
// Throws Error, in the name of `operation`, for a label that is neither ignored nor in [0,
// vocabulary), and for bad items; a cuda device checks labels itself (core/device_faults.h). Labels
// contiguous.
LossItems checked_items(const char* operation, const Tensor& labels, std::int64_t vocabulary,
                        const CrossEntropyOptions& options, const Tensor& count);

struct LogitRows {
  void* at;
  DType dtype;
  std::int64_t rows, vocabulary, row_stride;
  const std::int64_t* labels;
  std::int64_t ignore_index;
};

namespace cpu {
// lse [rows], losses [rows]: 0 where ignored. lse may be null.
void cross_entropy_rows(const LogitRows& x, float* lse, float* losses);
// dx = or += factor * (softmax - onehot).
void cross_entropy_gradient(const LogitRows& x, const float* lse, float factor, void* dx,
                            std::int64_t dx_stride, bool accumulate);
// Both while a row is in the cache; the gradient takes the place of the logits.
void cross_entropy_in_place(const LogitRows& x, float factor, float* losses);
}  // namespace cpu

// In order of the stream. A label out of range is as one that is ignored.
namespace cuda {
// lse [rows], losses [rows]: 0 where ignored. lse may be null.
void cross_entropy_rows(const LogitRows& x, float* lse, float* losses, void* stream);
// loss is the sum of losses [rows] over items.
void mean_of_losses(const float* losses, std::int64_t rows, const LossItems& items, float* loss,
                    void* stream);
// factor = g / items.
void cross_entropy_gradient(const LogitRows& x, const float* lse, const float* g,
                            const LossItems& items, void* dx, std::int64_t dx_stride,
                            bool accumulate, void* stream);
// Both at once; the gradient for an upstream gradient of 1 takes the place of the logits
// (linear_cross_entropy.cu).
void cross_entropy_in_place(const LogitRows& x, const LossItems& items, float* losses,
                            void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

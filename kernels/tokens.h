// What a language model makes of the whole numbers of a batch, on the device that has them.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

// What is to be predicted at each place: targets[b T + t] = labels[b, t + 1], and -100, which the
// losses ignore, at the end of each row and at the places in `ends`, which lie in [0, B T).
//
// labels i64 [B, T], targets i64 [B T], ends i64 [N] or undefined; all contiguous, of one device,
// and real on meta. Errors: other shapes, dtypes, devices or strides.
void next_labels(const Tensor& labels, const Tensor& ends, const Tensor& targets);

// positions[.., t] = t: i64, contiguous.
void count_positions(const Tensor& positions);

}  // namespace reprise::kernels

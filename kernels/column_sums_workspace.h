// The workspace of column_sums.h: none on the CPU.
#pragma once

#include "core/tensor.h"
#include "kernels/column_sums.h"
#include "kernels/dispatch.h"

namespace reprise::kernels {

inline Tensor column_sum_workspace(const MatrixSize& size, Device device) {
  const std::int64_t elements = side_of(device) == DeviceKind::cuda ? column_sum_elements(size) : 0;
  return Tensor::empty(Shape{elements}, DType::f32, device, MemoryKind::workspace);
}

}  // namespace reprise::kernels

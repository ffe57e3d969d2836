// Tensors as matrices for the elementwise families, and the checks that they share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "core/tensor.h"
#include "kernels/dispatch.h"
#include "kernels/matrix_sides.h"

namespace reprise::kernels {

// Contiguous tensors of one shape are one long row.
inline MatrixSize merged_size(std::initializer_list<const Tensor*> tensors) {
  const Shape& shape = (*tensors.begin())->shape();
  for (const Tensor* tensor : tensors) {
    if (tensor->defined() && !tensor->is_contiguous()) {
      return {shape.rows(), shape.back()};
    }
  }
  return {1, shape.numel()};
}

inline void expect_floating(std::string_view operation, std::string_view argument,
                            const Tensor& tensor) {
  if (!is_floating(tensor.dtype())) {
    fail(operation, "{} must be f32, bf16 or f64, got {}", argument, name(tensor.dtype()));
  }
}
// For the families that train only.
inline void expect_trainable(std::string_view operation, std::string_view argument,
                             const Tensor& tensor) {
  if (tensor.dtype() != DType::f32 && tensor.dtype() != DType::bf16) {
    fail(operation, "{} must be f32 or bf16, got {}", argument, name(tensor.dtype()));
  }
}
// Shape and device as those of `model`.
inline void expect_like(std::string_view operation, std::string_view argument, const Tensor& tensor,
                        const Tensor& model, std::string_view model_argument) {
  if (tensor.shape() != model.shape()) {
    fail(operation, "{} must have the shape {} of {}, got {}", argument, to_string(model.shape()),
         model_argument, to_string(tensor.shape()));
  }
  expect_device(operation, argument, tensor, model.device());
}
// Checks that it is rows of unit stride.
inline Matrix matrix(std::string_view operation, std::string_view argument, const Tensor& tensor) {
  const std::int64_t stride = expect_rows(operation, argument, tensor);
  const bool elements = !tensor.is_meta() && tensor.numel() > 0;
  return {elements ? tensor.raw() : nullptr, tensor.dtype(), stride};
}

}  // namespace reprise::kernels

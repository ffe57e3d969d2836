// How a kernel family chooses between its sides. A family `norm` has
//   norm.h        the contract
//   norm.cc       checks of the arguments, then the side for the device
//   norm_cpu.cc   namespace reprise::kernels::cpu
//   norm.cu       namespace reprise::kernels::cuda
// Every public kernel first checks its arguments, then takes its workspace, then returns when the
// tensors are on meta, then calls the side.
#pragma once

#include <string_view>

#include "core/error.h"
#include "core/tensor.h"

// REPRISE_HAS_CUDA: the family's .cu is part of this build. Otherwise the call is not compiled.
#if defined(REPRISE_HAS_CUDA)
#define REPRISE_CUDA_SIDE(operation, ...) (__VA_ARGS__)
#else
#define REPRISE_CUDA_SIDE(operation, ...) ::reprise::kernels::no_cuda_side(operation)
#endif

namespace reprise::kernels {

// The side that runs, or on meta the one that a dry run stands for: for workspaces that differ.
inline DeviceKind side_of(Device device) {
  return device.kind == DeviceKind::meta ? dry_run_kind() : device.kind;
}

[[noreturn]] inline void no_cuda_side(std::string_view operation) {
  fail(operation, "has no CUDA kernel in this build");
}

// Checks shared by the families. Messages: "[rms_norm] weight must be f32, got i64".
inline void expect_dtype(std::string_view operation, std::string_view argument,
                         const Tensor& tensor, DType dtype) {
  if (tensor.dtype() != dtype) {
    fail(operation, "{} must be {}, got {}", argument, name(dtype), name(tensor.dtype()));
  }
}
inline void expect_shape(std::string_view operation, std::string_view argument,
                         const Tensor& tensor, const Shape& shape, std::string_view letters) {
  if (tensor.shape() != shape) {
    fail(operation, "{} must be {} = {}, got {}", argument, letters, to_string(shape),
         to_string(tensor.shape()));
  }
}
inline void expect_device(std::string_view operation, std::string_view argument,
                          const Tensor& tensor, Device device) {
  if (tensor.device() != device) {
    fail(operation, "{} must be on {}, got {}", argument, to_string(device),
         to_string(tensor.device()));
  }
}
inline void expect_contiguous(std::string_view operation, std::string_view argument,
                              const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    fail(operation, "{} must be contiguous, got shape {} with other strides: call contiguous()",
         argument, to_string(tensor.shape()));
  }
}
// The row stride of a tensor that must be a matrix of unit inner stride.
inline std::int64_t expect_rows(std::string_view operation, std::string_view argument,
                                const Tensor& tensor) {
  const auto stride = tensor.row_stride();
  if (!stride) {
    fail(operation,
         "{} must be rows of unit stride, got shape {} with other strides: call contiguous()",
         argument, to_string(tensor.shape()));
  }
  return *stride;
}

}  // namespace reprise::kernels

#include "kernels/activation.h"

#include "core/cuda_device.h"
#include "kernels/activation_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {

std::string_view name(Activation activation) {
  switch (activation) {
    case Activation::silu:
      return "silu";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_tanh:
      return "gelu_tanh";
    case Activation::quick_gelu:
      return "quick_gelu";
    case Activation::exp:
      return "exp";
  }
  return "?";
}

void activation(Activation f, const Tensor& x, const Tensor& y) {
  expect_trainable(name(f), "x", x);
  expect_dtype(name(f), "y", y, x.dtype());
  expect_like(name(f), "y", y, x, "x");
  const Matrix from = matrix(name(f), "x", x), to = matrix(name(f), "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(
        name(f), cuda::activation(f, from, to, merged_size({&x, &y}), cuda_stream(x.device())));
    return;
  }
  cpu::activation(f, from, to, merged_size({&x, &y}));
}

void activation_backward(Activation f, const Tensor& x, const Tensor& dy, const Tensor& dx,
                         bool accumulate) {
  expect_trainable(name(f), "x", x);
  expect_dtype(name(f), "dy", dy, x.dtype());
  expect_trainable(name(f), "dx", dx);
  expect_like(name(f), "dy", dy, x, "x");
  expect_like(name(f), "dx", dx, x, "x");
  const Matrix from = matrix(name(f), "x", x), gradient = matrix(name(f), "dy", dy),
               to = matrix(name(f), "dx", dx);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(
        name(f), cuda::activation_backward(f, from, gradient, to, accumulate,
                                           merged_size({&x, &dy, &dx}), cuda_stream(x.device())));
    return;
  }
  cpu::activation_backward(f, from, gradient, to, accumulate, merged_size({&x, &dy, &dx}));
}

void gated_silu(const Tensor& gate, const Tensor& up, const Tensor& y) {
  expect_trainable("gated_silu", "gate", gate);
  expect_dtype("gated_silu", "up", up, gate.dtype());
  expect_dtype("gated_silu", "y", y, gate.dtype());
  expect_like("gated_silu", "up", up, gate, "gate");
  expect_like("gated_silu", "y", y, gate, "gate");
  const Matrix a = matrix("gated_silu", "gate", gate), b = matrix("gated_silu", "up", up),
               to = matrix("gated_silu", "y", y);
  if (gate.is_meta() || gate.numel() == 0) {
    return;
  }
  if (gate.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("gated_silu", cuda::gated_silu(a, b, to, merged_size({&gate, &up, &y}),
                                                     cuda_stream(gate.device())));
    return;
  }
  cpu::gated_silu(a, b, to, merged_size({&gate, &up, &y}));
}

void gated_silu_backward(const Tensor& gate, const Tensor& up, const Tensor& dy,
                         const Tensor& dgate, bool accumulate_gate, const Tensor& dup,
                         bool accumulate_up) {
  expect_trainable("gated_silu", "gate", gate);
  expect_dtype("gated_silu", "up", up, gate.dtype());
  expect_dtype("gated_silu", "dy", dy, gate.dtype());
  expect_like("gated_silu", "up", up, gate, "gate");
  expect_like("gated_silu", "dy", dy, gate, "gate");
  const Matrix a = matrix("gated_silu", "gate", gate), b = matrix("gated_silu", "up", up),
               gradient = matrix("gated_silu", "dy", dy);
  GatedGradients gradients{{}, {}, accumulate_gate, accumulate_up};
  if (dgate.defined()) {
    expect_trainable("gated_silu", "dgate", dgate);
    expect_like("gated_silu", "dgate", dgate, gate, "gate");
    gradients.dgate = matrix("gated_silu", "dgate", dgate);
  }
  if (dup.defined()) {
    expect_trainable("gated_silu", "dup", dup);
    expect_like("gated_silu", "dup", dup, gate, "gate");
    gradients.dup = matrix("gated_silu", "dup", dup);
  }
  if (gate.is_meta() || gate.numel() == 0) {
    return;
  }
  if (gate.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("gated_silu",
                      cuda::gated_silu_backward(a, b, gradient, gradients,
                                                merged_size({&gate, &up, &dy, &dgate, &dup}),
                                                cuda_stream(gate.device())));
    return;
  }
  cpu::gated_silu_backward(a, b, gradient, gradients, merged_size({&gate, &up, &dy, &dgate, &dup}));
}

}  // namespace reprise::kernels

// The sides of activation.h.
#pragma once

#include "kernels/activation_kind.h"
#include "kernels/matrix_sides.h"

namespace reprise::kernels {

// dgate.at or dup.at may be null.
struct GatedGradients {
  Matrix dgate, dup;
  bool accumulate_gate, accumulate_up;
};

namespace cpu {
void activation(Activation f, const Matrix& x, const Matrix& y, MatrixSize size);
void activation_backward(Activation f, const Matrix& x, const Matrix& dy, const Matrix& dx,
                         bool accumulate, MatrixSize size);
void gated_silu(const Matrix& gate, const Matrix& up, const Matrix& y, MatrixSize size);
void gated_silu_backward(const Matrix& gate, const Matrix& up, const Matrix& dy,
                         const GatedGradients& gradients, MatrixSize size);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void activation(Activation f, const Matrix& x, const Matrix& y, MatrixSize size, void* stream);
void activation_backward(Activation f, const Matrix& x, const Matrix& dy, const Matrix& dx,
                         bool accumulate, MatrixSize size, void* stream);
void gated_silu(const Matrix& gate, const Matrix& up, const Matrix& y, MatrixSize size,
                void* stream);
void gated_silu_backward(const Matrix& gate, const Matrix& up, const Matrix& dy,
                         const GatedGradients& gradients, MatrixSize size, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

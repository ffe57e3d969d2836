// The CPU side of activation.h.
#pragma once

#include "kernels/activation.h"
#include "kernels/matrix.h"

namespace reprise::kernels::cpu {

void activation(Activation f, const Matrix& x, const Matrix& y, MatrixSize size);
void activation_backward(Activation f, const Matrix& x, const Matrix& dy, const Matrix& dx,
                         bool accumulate, MatrixSize size);

// dgate.at or dup.at may be null.
struct GatedGradients {
  Matrix dgate, dup;
  bool accumulate_gate, accumulate_up;
};
void gated_silu(const Matrix& gate, const Matrix& up, const Matrix& y, MatrixSize size);
void gated_silu_backward(const Matrix& gate, const Matrix& up, const Matrix& dy,
                         const GatedGradients& gradients, MatrixSize size);

}  // namespace reprise::kernels::cpu

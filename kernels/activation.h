// Activations: of one tensor, and gated.
//
// Arguments of a call have one shape; each is contiguous or rows of unit stride (a half of a wider
// matrix). Dtypes f32 or bf16, the same for all but gradients that are written, which may be
// either. Evaluated in f32 and rounded once unless stated. Outputs may be one of the inputs
// (exactly), also with `accumulate` false in backward: dx may be dy. With `accumulate` a gradient
// is added to what is there.
// Errors: other dtypes, shapes, devices or strides.
#pragma once

#include "core/tensor.h"
#include "kernels/activation_kind.h"

namespace reprise::kernels {

// y = f(x).
void activation(Activation f, const Tensor& x, const Tensor& y);
// dx = dy f'(x).
void activation_backward(Activation f, const Tensor& x, const Tensor& dy, const Tensor& dx,
                         bool accumulate);

// y = silu(gate) * up. In bf16 silu(gate) is rounded before the product, as a model made of two
// operations has it.
void gated_silu(const Tensor& gate, const Tensor& up, const Tensor& y);
// dgate = dy up silu'(gate), dup = dy silu(gate); an undefined one is left out.
void gated_silu_backward(const Tensor& gate, const Tensor& up, const Tensor& dy,
                         const Tensor& dgate, bool accumulate_gate, const Tensor& dup,
                         bool accumulate_up);

}  // namespace reprise::kernels

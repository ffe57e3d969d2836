// Elementwise operations on Variables. Formulas, dtypes and roundings: kernels/accumulate.h (add,
// cast), kernels/elementwise.h and kernels/activation.h.
//
//   Variable y = add(std::move(x), std::move(r));          // in x's buffer where nobody needs it
//   Variable h = gated_silu(std::move(gate_up));           // [.., 2F] -> [.., F]
#pragma once

#include "autograd/variable.h"

namespace reprise {

// x + r, of one shape and dtype. Saves nothing; both gradients are that of y.
Variable add(Variable x, Variable r);
// x r, of one shape and dtype. Saves each factor where the other needs a gradient.
Variable mul(Variable x, Variable r);
// factor x. Saves nothing.
Variable scale(Variable x, double factor);
// x [.., C] + bias [C]. Saves nothing. (linear() adds its bias itself.)
Variable add_bias(Variable x, Variable bias);
// x in another dtype, f32 or bf16; x itself where it has that dtype. The gradient is cast back.
// Saves nothing.
Variable cast(Variable x, DType dtype);

// Each saves its input.
Variable silu(Variable x);
Variable gelu(Variable x);
Variable gelu_tanh(Variable x);
Variable quick_gelu(Variable x);
Variable exp(Variable x);

// silu(gate) up, of one shape and dtype. Saves both.
Variable gated_silu(Variable gate, Variable up);
// The same of a fused product [.., 2F]: gate is the first half of each row.
Variable gated_silu(Variable gate_up);

}  // namespace reprise

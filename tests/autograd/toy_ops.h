// Small ops for tests of the tape: f32, a few elements, plain loops. They have the features that
// the tape must deal with: reuse, saved inputs and outputs, several outputs, gradients passed on,
// random numbers, must-keep outputs, and failing at the k-th call.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "autograd/tape.h"
#include "core/philox.h"

namespace reprise::testing {

// Called before each forward and backward of a toy op, with its name; may throw.
struct ToyHook {
  static inline std::function<void(std::string_view op, bool backward)> call;
};

Variable toy_add(Variable a, Variable b);      // a + b: passes its gradient on, saves nothing
Variable toy_mul(Variable a, Variable b);      // a * b: saves both
Variable toy_tanh(Variable x);                 // saves its output
Variable toy_square(Variable x);               // x * x: saves its input
Variable toy_scale(Variable x, float factor);  // may work in place
Variable toy_dropout(Variable x, float p, Generator& generator);
// a * b + c: three inputs, all saved but c; the same value may stand at several
Variable toy_mul_add(Variable a, Variable b, Variable c);
Variable toy_keep(Variable x);                        // 2x, declared must_keep
std::pair<Variable, Variable> toy_split(Variable x);  // x^2 and 3x; gradients may be missing
Variable toy_sum(Variable x);                         // to a scalar
Variable toy_slice(Variable x, std::int64_t begin, std::int64_t end);  // a view

}  // namespace reprise::testing

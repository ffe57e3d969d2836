// Rotary position embedding on Variables. Formulas, styles, layouts and roundings: kernels/rope.h.
//
//   q = rope(std::move(q), positions, inv_freq);   // [B, T, H, D]
//   k = rope(std::move(k), positions, inv_freq);
#pragma once

#include "autograd/variable.h"
#include "kernels/rope.h"

namespace reprise {

using kernels::RopeOptions;
using kernels::RopeStyle;

// x [B, T, H, D], positions i64 [B, T] or [T] (with options.sections [R, B, T] or [R, T]),
// inv_freq f32 [D_rot / 2]: both without a gradient.
// Saves the two, but not x.
Variable rope(Variable x, Variable positions, Variable inv_freq, RopeOptions options = {});

}  // namespace reprise

// Resizing by cubic convolution on Variables. Formula, edges, dtypes: kernels/resize.h.
#pragma once

#include <cstdint>

#include "autograd/variable.h"

namespace reprise {

// x [H, W, C] -> [height, width, C]. Saves nothing.
Variable resize_bicubic(Variable x, std::int64_t height, std::int64_t width);

}  // namespace reprise

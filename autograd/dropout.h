// Dropout on Variables. The mask by (seed, offset): kernels/dropout.h.
#pragma once

#include "autograd/variable.h"
#include "core/philox.h"

namespace reprise {

// x m / (1 - p), m 0 with probability p in [0, 1). The range of random numbers is taken from the
// generator here, once; the record holds (seed, offset), so that a replay draws the same and
// nothing is saved. At p = 0 it is x itself and nothing is drawn.
Variable dropout(Variable x, double p, Generator& generator);

}  // namespace reprise

// Table look-up on Variables. Formulas and checks: kernels/embedding.h.
#pragma once

#include <cstdint>

#include "autograd/variable.h"

namespace reprise {

// Rows of table [V, C] for ids i64 [..]: [.., C]. The table's gradient is summed in the order of
// the ids; the row `padding` gets none (-1: every row does). Saves the ids.
Variable embedding(Variable ids, Variable table, std::int64_t padding = -1);

}  // namespace reprise

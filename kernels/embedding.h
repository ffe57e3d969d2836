// Rows of a table by index, and the gradient of the table.
//
// ids i64 [..], contiguous, each in [0, V); table [V, C]; y and dy [.., C]. f32 or bf16; y of the
// table's dtype; the table's gradient may be f32 or bf16 whatever dy is.
// Errors: an id out of range, by position (row-major), value and V; other dtypes, shapes, devices
// or strides. Indices are real on meta, and checked there too. A cuda device checks them itself and
// the Error comes where the host waits for it (core/device_faults.h); a wrong id has a row of zeros
// and no gradient.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

// y[i] = table[ids[i]]: a copy.
void embedding(const Tensor& ids, const Tensor& table, const Tensor& y);

// dtable[v] = sum of dy[i] over the i with ids[i] = v, in f32, in the order of i; rows without an
// id are 0, or as before with `accumulate`. Row `padding` gets nothing (-1: there is none).
// Workspace: 16 bytes an id. A cuda device sorts the ids, adds up what of an id lies in each 32
// places of the sorted list, and then these sums, in the order of i, too; its workspace is besides
// a half byte an id for the sort, and a quarter byte an element of dy.
void embedding_gradient(const Tensor& ids, const Tensor& dy, std::int64_t padding,
                        const Tensor& dtable, bool accumulate);

}  // namespace reprise::kernels

// Rows of a table by index, and the gradient of the table.
//
// ids i64 [..], contiguous, each in [0, V); table [V, C]; y and dy [.., C]. f32 or bf16; y of the
// table's dtype; the table's gradient may be f32 or bf16 whatever dy is.
// Errors: an id out of range, by position (row-major), value and V; other dtypes, shapes, devices
// or strides. Indices are real on meta, and checked there too. On a cuda device they are not: see
// expect_ids.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

// y[i] = table[ids[i]]: a copy.
void embedding(const Tensor& ids, const Tensor& table, const Tensor& y);

// dtable[v] = sum of dy[i] over the i with ids[i] = v, in f32, in the order of i; rows without an
// id are 0, or as before with `accumulate`. Row `padding` gets nothing (-1: there is none).
// Workspace: 16 bytes an id.
void embedding_gradient(const Tensor& ids, const Tensor& dy, std::int64_t padding,
                        const Tensor& dtable, bool accumulate);

// The check of the ids for a table of `rows` rows. From a cuda device they are copied to the host.
void expect_ids(const Tensor& ids, std::int64_t rows);

}  // namespace reprise::kernels

// What matmul.cc calls after the checks.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "kernels/matmul_tile.h"

namespace reprise::kernels::cpu {

// How a product is cut, by its sizes alone: a task is `rows` rows of C and `across` of its columns,
// made of products of `columns` columns and `depth` of K.
struct MatmulCut {
  std::int64_t rows, across, columns, depth;
  bool turn_a;  // the task copies its part of a transposed A to rows first
  // bf16 with a long K: the task copies its part of A first, so that operands are dense, and adds
  // up in f32 over parts of K.
  bool deep;
};
MatmulCut matmul_cut(const TileShape& product);

// Bytes of workspace for `threads` threads.
std::int64_t matmul_workspace_bytes(const TileShape& product, int threads);

// `workspace` is aligned to 64 bytes. All sizes at least 1.
void matmul(const TileShape& product, const void* a, const void* b, void* c, const void* bias,
            void* workspace, int threads);

// to[i, j] = from[j, i] for `rows` x `columns` of `to`, whose rows lie together; elements of 2 or 4
// bytes, from_stride in elements.
void transpose(const void* from, std::int64_t from_stride, void* to, std::int64_t rows,
               std::int64_t columns, std::int64_t element_bytes);

void column_sums(DType dtype, const void* x, std::int64_t rows, std::int64_t columns,
                 std::int64_t row_stride, DType sums_dtype, void* sums, bool accumulate);

}  // namespace reprise::kernels::cpu

// In order of the stream. Inputs and output of one dtype, or bf16 inputs and an f32 output; a bias
// of the output's dtype. All sizes at least 1; rows of unit stride at any distance.
namespace reprise::kernels::cuda {

// What the library may use for itself.
std::int64_t matmul_workspace_bytes();

void matmul(const TileShape& product, const void* a, const void* b, void* c, const void* bias,
            void* workspace, void* stream);

// Why the current device's file of choices, or one of them, was ignored (matmul_choices.h); empty:
// it was not.
std::string matmul_choices_warning();

}  // namespace reprise::kernels::cuda

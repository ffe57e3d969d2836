// One product of matrices in memory on one thread: what matmul and attention are made of. The
// arithmetic is oneDNN's (matmul_cpu.cc), or Eigen's where oneDNN is absent (matmul_eigen.cc).
//
//   C [m, n] = op(A) op(B) (+ bias [n]) (+ C when accumulate)
//
// op(A) is [m, k]: A is stored so, or as [k, m] when transpose_a; B likewise [k, n] or [n, k].
// Strides between rows as stored, in elements. Inputs f32 or bf16, accumulation in f32, output f32
// or bf16, bias f32 or bf16. The result depends on the values and the TileShape only: not on the
// thread, on addresses, or on what else runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "core/dtype.h"

namespace reprise::kernels {

struct TileShape {
  std::int64_t m = 0, n = 0, k = 0;
  std::int64_t lda = 0, ldb = 0, ldc = 0;
  bool transpose_a = false, transpose_b = false, accumulate = false;
  DType inputs = DType::f32, output = DType::f32;
  std::optional<DType> bias;  // not together with accumulate
  friend bool operator==(const TileShape&, const TileShape&) = default;
};

class TileProduct {
 public:
  virtual ~TileProduct() = default;
  // Bytes that run() needs as scratch, from any address that is a multiple of 64. The same at every
  // call for one machine.
  virtual std::int64_t scratch_bytes() const = 0;
  // C must not overlap the others. Safe on many threads at once, each with its own scratch.
  virtual void run(const void* a, const void* b, void* c, const void* bias,
                   void* scratch) const = 0;
};

// From the process's cache, which makes it at its first use. m, n and k are at least 1.
std::shared_ptr<const TileProduct> tile_product(const TileShape& shape);

namespace cpu {
// The library's product; null when it has none for these dtypes on this machine.
std::unique_ptr<TileProduct> library_tile_product(const TileShape& shape);
}  // namespace cpu

namespace eigen {
// Eigen's, for f32 inputs and output.
std::unique_ptr<TileProduct> tile_product(const TileShape& shape);
}  // namespace eigen

// One product over another library's for f32 only: widens bf16 operands, rounds the result once.
std::unique_ptr<TileProduct> widened_tile_product(
    const TileShape& shape, std::unique_ptr<TileProduct> (*f32_product)(const TileShape&));

}  // namespace reprise::kernels

// The sides of reduce.h.
#pragma once

#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "kernels/reduce_blocks.h"

namespace reprise::kernels {

// `count` elements, `width` of them in a row.
struct Elements {
  const void* at;
  DType dtype;
  std::int64_t count, width, row_stride;
};

namespace cpu {
// Elements [begin, end) of x, or their squares; the same whatever the row stride.
double chunk_sum(const Elements& x, bool squares, std::int64_t begin, std::int64_t end);

// dx = value, or dx += value.
void add_constant(DType dtype, void* dx, std::int64_t count, float value, bool accumulate);
// y [count] = factor * x, or y += factor * x; x in rows of `width`.
void add_scaled(const Elements& x, float factor, DType y_dtype, void* y, bool accumulate);
// x *= factor, one run on this thread.
void scale_run(DType dtype, void* x, std::int64_t count, float factor);
}  // namespace cpu

// In order of the stream.
namespace cuda {
// out = factor * the sum of x, or of its squares; `partial` is workspace, an f64 a chunk; out f32
// or f64.
void reduce(const Elements& x, bool squares, double factor, double* partial, DType out_dtype,
            void* out, void* stream);
// dx = or += factor * g.
void add_constant(DType dtype, void* dx, std::int64_t count, const float* g, double factor,
                  bool accumulate, void* stream);
// y [count] = or += factor * g * x.
void add_scaled(const Elements& x, const float* g, double factor, DType y_dtype, void* y,
                bool accumulate, void* stream);
// out[i] = the sum of the squares of tensors[i]; `partial` as in reduce, of all tensors in order.
void squared_norms(std::span<const Elements> tensors, double* partial, DType out_dtype, void* out,
                   void* stream);
// x *= factor, for each.
void scale_all(std::span<const Elements> tensors, float factor, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

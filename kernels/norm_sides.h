// The norm family behind its contract: one checked call as bare pointers, and the sides that take
// it. Free of Tensor, so that norm.cu sees no more than it needs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"

namespace reprise::kernels {

enum class Norm : std::uint8_t { rms, layer };

// A matrix [rows, width] of the call's dtype; null when it is absent.
struct NormRows {
  void* data = nullptr;
  std::int64_t stride = 0;  // elements
};

struct NormForward {
  Norm norm = Norm::rms;
  DType dtype = DType::f32;
  std::int64_t rows = 0, width = 0;
  float epsilon = 0;
  NormRows x, residual, sum, y;
  const void* weight = nullptr;
  const void* bias = nullptr;
  float* mean = nullptr;
  float* scale = nullptr;
};

// A gradient [width] that is summed over rows: in the call's dtype, or f32.
struct NormSum {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool accumulate = false;
  // [norm_chunks(rows), width]
  float* partial = nullptr;
};

struct NormBackward {
  Norm norm = Norm::rms;
  DType dtype = DType::f32;
  std::int64_t rows = 0, width = 0;
  NormRows dy, dsum, x, dx;
  bool accumulate_x = false;
  const void* weight = nullptr;
  const float* mean = nullptr;
  const float* scale = nullptr;
  NormSum dweight, dbias;
};

// Weight gradients are summed over chunks of rows first, then over the chunks: at most 256 of
// them, which fills a device and costs a CPU little.
inline std::int64_t norm_rows_per_chunk(std::int64_t rows) {
  return std::max<std::int64_t>(16, (rows + 255) / 256);
}
inline std::int64_t norm_chunks(std::int64_t rows) {
  const std::int64_t per_chunk = norm_rows_per_chunk(rows);
  return (rows + per_chunk - 1) / per_chunk;
}

namespace cpu {
void norm_forward(const NormForward& call);
void norm_backward(const NormBackward& call);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void norm_forward(const NormForward& call, void* stream);
void norm_backward(const NormBackward& call, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

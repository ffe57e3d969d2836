// The sides of resize.h, and the weights that both use.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/both_sides.h"
#include "kernels/matrix_sides.h"

namespace reprise::kernels {

// An axis of `from` elements resized to one of `to`.
struct Axis {
  std::int64_t from, to;
};

// Element first + a, moved to the edge where it is beyond, with weight[a].
struct Taps {
  std::int64_t first;
  float weight[4];
};

REPRISE_BOTH_SIDES inline Taps taps_of(const Axis& axis, std::int64_t i) {
  constexpr double A = -0.75;
  const double at = (static_cast<double>(i) + 0.5) * static_cast<double>(axis.from) /
                        static_cast<double>(axis.to) -
                    0.5;
  const double below = floor(at), t = at - below, u = 1 - t;
  const double near_t = ((A + 2) * t - (A + 3)) * t * t + 1;
  const double near_u = ((A + 2) * u - (A + 3)) * u * u + 1;
  // f(v + 1) = A v (v - 1)^2
  const double far_t = A * t * (t - 1) * (t - 1), far_u = A * u * (u - 1) * (u - 1);
  return {static_cast<std::int64_t>(below) - 1,
          {static_cast<float>(far_t), static_cast<float>(near_t), static_cast<float>(near_u),
           static_cast<float>(far_u)}};
}

// The element that tap a reads.
REPRISE_BOTH_SIDES inline std::int64_t element_of(const Axis& axis, const Taps& taps, int a) {
  const std::int64_t at = taps.first + a;
  return at < 0 ? 0 : at >= axis.from ? axis.from - 1 : at;
}

// With what weight the taps read element p.
REPRISE_BOTH_SIDES inline float weight_of(const Axis& axis, const Taps& taps, std::int64_t p) {
  float sum = 0;
  for (int a = 0; a < 4; ++a) {
    sum += element_of(axis, taps, a) == p ? taps.weight[a] : 0.0f;
  }
  return sum;
}

// [begin, end) has all positions whose taps may read element p.
struct Readers {
  std::int64_t begin, end;
};
REPRISE_BOTH_SIDES inline Readers readers_of(const Axis& axis, std::int64_t p) {
  const double ratio = static_cast<double>(axis.to) / static_cast<double>(axis.from);
  const double at = static_cast<double>(p) + 0.5;
  const auto begin = static_cast<std::int64_t>(floor((at - 2) * ratio - 0.5));
  const auto end = static_cast<std::int64_t>(ceil((at + 2) * ratio - 0.5)) + 1;
  // An element at an edge is read for those beyond it too.
  return {p == 0 || begin < 0 ? 0 : begin, p == axis.from - 1 || end > axis.to ? axis.to : end};
}

struct ResizeCall {
  Axis height, width;
  std::int64_t channels;
};

namespace cpu {
void resize_bicubic(const Matrix& x, const Matrix& y, const ResizeCall& call);
void resize_bicubic_gradient(const Matrix& dy, const Matrix& dx, bool accumulate,
                             const ResizeCall& call);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void resize_bicubic(const Matrix& x, const Matrix& y, const ResizeCall& call, void* stream);
void resize_bicubic_gradient(const Matrix& dy, const Matrix& dx, bool accumulate,
                             const ResizeCall& call, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels

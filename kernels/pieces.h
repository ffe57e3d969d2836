// Cuts a matrix into pieces of about kPieceElements for parallel_for. The cut depends on the sizes
// only, never on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"

namespace reprise::kernels {

inline constexpr std::int64_t kPieceElements = 16384;

// Calls f(row, begin, end) for pieces [begin, end) of rows that cover [0, rows) x [0, width).
template <class F>
void for_pieces(std::int64_t rows, std::int64_t width, F&& f) {
  if (rows <= 0 || width <= 0) {
    return;
  }
  if (width > kPieceElements) {
    const std::int64_t per_row = (width + kPieceElements - 1) / kPieceElements;
    parallel_for(rows * per_row, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t piece = first; piece < last; ++piece) {
        const std::int64_t begin = piece % per_row * kPieceElements;
        f(piece / per_row, begin, std::min(width, begin + kPieceElements));
      }
    });
    return;
  }
  parallel_for(rows, std::max<std::int64_t>(1, kPieceElements / width),
               [&](std::int64_t first, std::int64_t last) {
                 for (std::int64_t row = first; row < last; ++row) {
                   f(row, std::int64_t{0}, width);
                 }
               });
}

}  // namespace reprise::kernels

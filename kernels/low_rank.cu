#include "kernels/dropout.cuh"
#include "kernels/low_rank_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

// A block makes a tile of the result, or its rows; a thread has every 16th row and column of it.
constexpr int kAcross = 16, kThreads = kAcross * kAcross;
constexpr int kDepth = 32;  // of k in shared memory at a time

// part[k - at_k][line - first] for lines [first, first + size) of a factor that has `lines` of
// them, and kDepth of its `depth` elements each: 0 beyond both.
template <int size>
__device__ __forceinline__ void load_part(const LowRankFactor& factor, std::int64_t first,
                                          std::int64_t lines, std::int64_t at_k, std::int64_t depth,
                                          float (&part)[kDepth][size + 1]) {
  const int across = (factor.rows_are_k ? size : kDepth) / kRun;  // runs in a row
  const std::int64_t width = factor.rows_are_k ? lines : depth;
  const std::int64_t rows = factor.rows_are_k ? depth : lines;
  for (int i = static_cast<int>(threadIdx.x); i < size * kDepth / kRun; i += kThreads) {
    const int down = i / across, right = i % across * kRun;
    const std::int64_t row = (factor.rows_are_k ? at_k : first) + down;
    const std::int64_t column = (factor.rows_are_k ? first : at_k) + right;
    const std::int64_t left = row < rows ? width - column : 0;
    Run run = {};
    if (left > 0) {
      run = load_run(factor.at, row, column, left < kRun ? static_cast<int>(left) : kRun);
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (factor.rows_are_k) {
        part[down][right + j] = run.at[j];
      } else {
        part[right + j][down] = run.at[j];
      }
    }
  }
}

template <int rows, int columns>
struct Sums {
  float at[rows / kAcross][columns / kAcross] = {};
};

// The sums over k of a tile, in ascending order of k. All threads take part.
template <int rows, int columns>
__device__ __forceinline__ Sums<rows, columns> tile_sums(const LowRankProduct& product,
                                                         std::int64_t row, std::int64_t column,
                                                         float (&left)[kDepth][rows + 1],
                                                         float (&right)[kDepth][columns + 1]) {
  const int down = static_cast<int>(threadIdx.x) / kAcross;
  const int across = static_cast<int>(threadIdx.x) % kAcross;
  Sums<rows, columns> sums;
  for (std::int64_t k = 0; k < product.k; k += kDepth) {
    __syncthreads();  // what the parts held has been read
    load_part<rows>(product.left, row, product.m, k, product.k, left);
    load_part<columns>(product.right, column, product.n, k, product.k, right);
    __syncthreads();
    const std::int64_t rest = product.k - k;
    const int depth = rest < kDepth ? static_cast<int>(rest) : kDepth;
#pragma unroll 8
    for (int d = 0; d < depth; ++d) {
#pragma unroll
      for (int i = 0; i < rows / kAcross; ++i) {
#pragma unroll
        for (int j = 0; j < columns / kAcross; ++j) {
          sums.at[i][j] += left[d][down + i * kAcross] * right[d][across + j * kAcross];
        }
      }
    }
  }
  return sums;
}

constexpr int kRows = 64, kColumns = 64;

__global__ void __launch_bounds__(kThreads) product_kernel(LowRankProduct product) {
  constexpr int rows = kRows, columns = kColumns;
  __shared__ float left[kDepth][rows + 1], right[kDepth][columns + 1], tile[rows][columns + 1];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * rows;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * columns;
  const Sums<rows, columns> sums = tile_sums<rows, columns>(product, row, column, left, right);
#pragma unroll
  for (int i = 0; i < rows / kAcross; ++i) {
#pragma unroll
    for (int j = 0; j < columns / kAcross; ++j) {
      tile[threadIdx.x / kAcross + i * kAcross][threadIdx.x % kAcross + j * kAcross] =
          product.scale * sums.at[i][j];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns / kRun; i += kThreads) {
    const int down = i / (columns / kRun), across = i % (columns / kRun) * kRun;
    const std::int64_t m = row + down, n = column + across;
    if (m >= product.m || n >= product.n) {
      continue;
    }
    const int count = product.n - n < kRun ? static_cast<int>(product.n - n) : kRun;
    Run run;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      run.at[j] = tile[down][across + j];
    }
    if (product.drop_result) {
      run = drop(product.mask, m * product.n + n, run);
    }
    if (product.base.at != nullptr) {
      const Run base = load_run(product.base, m, n, count);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        run.at[j] = base.at[j] + run.at[j];
      }
    }
    store_run(product.to, m, n, count, run, product.accumulate);
  }
}

constexpr int kNormRows = kAcross, kNormColumns = 64;

__global__ void __launch_bounds__(kThreads)
    norms_kernel(Matrix w, bool in_out, LowRankProduct product, float* v) {
  __shared__ float left[kDepth][kNormRows + 1], right[kDepth][kNormColumns + 1];
  __shared__ float squares[kNormRows][kAcross];
  const int down = static_cast<int>(threadIdx.x) / kAcross;
  const int across = static_cast<int>(threadIdx.x) % kAcross;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kNormRows, m = first + down;
  float total = 0.0f;
  for (std::int64_t column = 0; column < product.n; column += kNormColumns) {
    const auto sums = tile_sums<kNormRows, kNormColumns>(product, first, column, left, right);
#pragma unroll
    for (int j = 0; j < kNormColumns / kAcross; ++j) {
      const std::int64_t n = column + across + j * kAcross;
      if (m < product.m && n < product.n) {
        const float base = in_out ? load_one(w, n, m) : load_one(w, m, n);
        const float merged = base + product.scale * sums.at[0][j];
        total += merged * merged;
      }
    }
  }
  squares[down][across] = total;
  __syncthreads();
  if (across == 0 && m < product.m) {
    total = 0.0f;
    for (int i = 0; i < kAcross; ++i) {
      total += squares[down][i];
    }
    v[m] = 1.0f / sqrtf(total);
  }
}

unsigned tiles(std::int64_t size, int of) {
  return static_cast<unsigned>((size + of - 1) / of);
}

}  // namespace

void low_rank_product(const LowRankProduct& product, void* stream) {
  if (product.m > 0 && product.n > 0) {
    launch("low_rank_product", product_kernel,
           {dim3(tiles(product.m, kRows), tiles(product.n, kColumns)), dim3(kThreads)},
           static_cast<cudaStream_t>(stream), product);
  }
}

void merged_norms(const Matrix& w, bool in_out, const LowRankProduct& product, float* v,
                  void* stream) {
  if (product.m > 0) {
    launch("merged_norms", norms_kernel, {dim3(tiles(product.m, kNormRows)), dim3(kThreads)},
           static_cast<cudaStream_t>(stream), w, in_out, product, v);
  }
}

}  // namespace reprise::kernels::cuda

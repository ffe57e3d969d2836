#include "kernels/matrix.cuh"
#include "kernels/rows_sides.h"

namespace reprise::kernels::cuda {
namespace {

__device__ __forceinline__ bool is_there(std::int64_t row, std::int64_t rows) {
  return row >= 0 && row < rows;
}

struct Copy {
  RowCopy call;
  __device__ void operator()(std::int64_t m, std::int64_t column, int count) const {
    const std::int64_t from = call.from_rows == nullptr ? m : call.from_rows[m];
    const std::int64_t to = call.to_rows == nullptr ? m : call.to_rows[m];
    if (call.to_rows != nullptr && !is_there(to, call.rows)) {
      return;
    }
    const bool absent = call.from_rows != nullptr && !is_there(from, call.rows);
    store_run(call.to, to, column, count, absent ? Run{} : load_run(call.from, from, column, count),
              call.accumulate);
  }
};

struct Zero {
  Matrix to;
  const std::int64_t* at;
  std::int64_t rows;
  __device__ void operator()(std::int64_t m, std::int64_t column, int count) const {
    const std::int64_t row = at == nullptr ? m : at[m];
    if (is_there(row, rows)) {
      store_run(to, row, column, count, Run{});
    }
  }
};

struct AddOthers {
  Matrix from, to;
  const std::int32_t* chosen;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    if (chosen[row] == 0) {
      store_run(to, row, column, count, load_run(from, row, column, count), true);
    }
  }
};

constexpr int kThreads = 256;

// chosen[row] = value for all rows, or for those of a list, which are distinct.
__global__ void __launch_bounds__(kThreads)
    mark_kernel(std::int32_t* chosen, std::int64_t size, const std::int64_t* rows,
                std::int64_t count, std::int32_t value) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    const std::int64_t row = rows == nullptr ? i : rows[i];
    if (is_there(row, size)) {
      chosen[row] = value;
    }
  }
}

void mark(std::int32_t* chosen, std::int64_t size, const std::int64_t* rows, std::int64_t count,
          std::int32_t value, void* stream) {
  const std::int64_t blocks = (count + kThreads - 1) / kThreads;
  if (blocks > 0) {
    launch("mark_rows", mark_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
           static_cast<cudaStream_t>(stream), chosen, size, rows, count, value);
  }
}

constexpr std::int64_t kNone = INT64_MAX;

// The smallest of what all threads of the block have; all take part.
__device__ __forceinline__ std::int64_t block_smallest(std::int64_t value) {
  __shared__ std::int64_t of_warp[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) {
    const std::int64_t other = __shfl_xor_sync(kAllLanes, value, lane);
    value = other < value ? other : value;
  }
  __syncthreads();  // what an earlier call left has been read
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    value = of_warp[warp] < value ? of_warp[warp] : value;
  }
  return value;
}

// The smallest position from `after` on that has the number.
__device__ __forceinline__ std::int64_t position_of(const std::int64_t* numbers, std::int64_t count,
                                                    std::int64_t number, std::int64_t after) {
  std::int64_t first = kNone;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (i >= after && numbers[i] == number && i < first) {
      first = i;
    }
  }
  return block_smallest(first);
}

// The smallest number that is there twice: all pairs, which is for lists that do not ascend.
__device__ __forceinline__ std::int64_t smallest_twice(const std::int64_t* numbers,
                                                       std::int64_t count) {
  std::int64_t twice = kNone;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    const std::int64_t number = numbers[i];
    for (std::int64_t j = 0; j < i && number < twice; ++j) {
      twice = numbers[j] == number ? number : twice;
    }
  }
  return block_smallest(twice);
}

// One block, whose threads all know each verdict.
__global__ void __launch_bounds__(kThreads)
    check_rows_kernel(const std::int64_t* numbers, std::int64_t count, std::int64_t rows,
                      RowSites sites, DeviceFault* word) {
  std::int64_t first = kNone;
  bool ascending = true;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    const std::int64_t number = numbers[i];
    if (!is_there(number, rows) && i < first) {
      first = i;
    }
    ascending = ascending && (i == 0 || numbers[i - 1] < number);
  }
  first = block_smallest(first);
  std::int64_t again = kNone;
  if (first == kNone && __syncthreads_and(ascending ? 1 : 0) == 0) {  // `first` is one for all
    const std::int64_t twice = smallest_twice(numbers, count);
    if (twice != kNone) {
      first = position_of(numbers, count, twice, 0);
      again = position_of(numbers, count, twice, first + 1);
    }
  }
  if (threadIdx.x == 0 && first != kNone && word->site == 0) {
    word->site = again == kNone ? sites.range : sites.twice;
    word->index = first;
    word->value = numbers[first];
    word->limit = rows;
    word->other = again == kNone ? 0 : again;
  }
}

}  // namespace

void check_rows(const std::int64_t* numbers, std::int64_t count, std::int64_t rows, RowSites sites,
                DeviceFault* word, void* stream) {
  launch("check_rows", check_rows_kernel, {dim3(1), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), numbers, count, rows, sites, word);
}

void copy_rows(const RowCopy& call, void* stream) {
  launch_runs("copy_rows", Copy{call}, {call.count, call.width}, stream);
}

void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size, std::int64_t rows,
               void* stream) {
  launch_runs("zero_rows", Zero{to, at, rows}, size, stream);
}

void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size, void* stream) {
  mark(chosen, size.rows, nullptr, size.rows, 0, stream);
  mark(chosen, size.rows, rows, count, 1, stream);
  launch_runs("add_other_rows", AddOthers{from, to, chosen}, size, stream);
}

}  // namespace reprise::kernels::cuda

#include "kernels/matrix.cuh"
#include "kernels/rows_sides.h"

namespace reprise::kernels::cuda {
namespace {

struct Copy {
  RowCopy call;
  __device__ void operator()(std::int64_t m, std::int64_t column, int count) const {
    const std::int64_t from = call.from_rows == nullptr ? m : call.from_rows[m];
    const std::int64_t to = call.to_rows == nullptr ? m : call.to_rows[m];
    store_run(call.to, to, column, count, load_run(call.from, from, column, count),
              call.accumulate);
  }
};

struct Zero {
  Matrix to;
  const std::int64_t* at;
  __device__ void operator()(std::int64_t m, std::int64_t column, int count) const {
    store_run(to, at == nullptr ? m : at[m], column, count, Run{});
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
    mark_kernel(std::int32_t* chosen, const std::int64_t* rows, std::int64_t count,
                std::int32_t value) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    chosen[rows == nullptr ? i : rows[i]] = value;
  }
}

void mark(std::int32_t* chosen, const std::int64_t* rows, std::int64_t count, std::int32_t value,
          void* stream) {
  const std::int64_t blocks = (count + kThreads - 1) / kThreads;
  if (blocks > 0) {
    launch("mark_rows", mark_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
           static_cast<cudaStream_t>(stream), chosen, rows, count, value);
  }
}

}  // namespace

void copy_rows(const RowCopy& call, void* stream) {
  launch_runs("copy_rows", Copy{call}, {call.count, call.width}, stream);
}

void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size, void* stream) {
  launch_runs("zero_rows", Zero{to, at}, size, stream);
}

void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size, void* stream) {
  mark(chosen, nullptr, size.rows, 0, stream);
  mark(chosen, rows, count, 1, stream);
  launch_runs("add_other_rows", AddOthers{from, to, chosen}, size, stream);
}

}  // namespace reprise::kernels::cuda

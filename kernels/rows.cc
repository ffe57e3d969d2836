#include "kernels/rows.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/cuda_device.h"
#include "kernels/matrix.h"
#include "kernels/rows_sides.h"

namespace reprise::kernels {
namespace {

std::string not_there(const DeviceFault& fault) {
  return fmt::format("row number at position {} must be in [0, {}), got {}", fault.index,
                     fault.limit, fault.value);
}

std::string chosen_twice(const DeviceFault& fault) {
  return fmt::format("row {} is chosen at positions {} and {}, each row may be once", fault.value,
                     fault.index, fault.other);
}

void expect_distinct(std::string_view operation, std::span<const std::int64_t> rows,
                     std::int64_t count) {
  bool ascending = true;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || rows[i] >= count) {
      fail(operation, "{}",
           not_there({.index = static_cast<std::int64_t>(i), .value = rows[i], .limit = count}));
    }
    ascending = ascending && (i == 0 || rows[i - 1] < rows[i]);
  }
  if (ascending) {
    return;
  }
  std::vector<std::int64_t> sorted(rows.begin(), rows.end());
  std::ranges::sort(sorted);
  const auto twice = std::ranges::adjacent_find(sorted);
  if (twice != sorted.end()) {
    const auto first = std::ranges::find(rows, *twice);
    const auto second = std::find(first + 1, rows.end(), *twice);
    fail(operation, "{}",
         chosen_twice(
             {.index = first - rows.begin(), .value = *twice, .other = second - rows.begin()}));
  }
}

std::span<const std::int64_t> numbers_of(const Tensor& rows) {
  return rows.numel() == 0 ? std::span<const std::int64_t>()
                           : std::span<const std::int64_t>(rows.data<std::int64_t>(),
                                                           static_cast<std::size_t>(rows.numel()));
}

void expect_layout(std::string_view operation, const Tensor& rows, Device device) {
  expect_dtype(operation, "rows", rows, DType::i64);
  if (rows.rank() != 1) {
    fail(operation, "rows must be [M], got {}", to_string(rows.shape()));
  }
  expect_device(operation, "rows", rows, device);
  expect_contiguous(operation, "rows", rows);
}

// One call: the wide matrix [.., C] and the rows chosen of it.
struct Chosen {
  MatrixSize size;
  const std::int64_t* numbers;
  std::int64_t count;
};

Chosen check(std::string_view operation, std::string_view argument, const Tensor& x,
             const Tensor& rows) {
  expect_trainable(operation, argument, x);
  if (x.rank() == 0) {
    fail(operation, "{} must be [.., C], got a scalar", argument);
  }
  const std::int64_t count = x.shape().rows();
  expect_layout(operation, rows, x.device());
  if (rows.device().kind != DeviceKind::cuda) {
    expect_distinct(operation, numbers_of(rows), count);
  }
  return {{count, x.shape().back()}, numbers_of(rows).data(), rows.numel()};
}

// y or dy.
Matrix narrow(std::string_view operation, std::string_view argument, const Tensor& y,
              const Tensor& x, const Tensor& rows) {
  expect_shape(operation, argument, y, {rows.numel(), x.shape().back()}, "[M, C]");
  expect_device(operation, argument, y, x.device());
  return matrix(operation, argument, y);
}

Matrix like(std::string_view operation, std::string_view argument, const Tensor& out,
            const Tensor& x, std::string_view x_argument) {
  expect_trainable(operation, argument, out);
  expect_like(operation, argument, out, x, x_argument);
  return matrix(operation, argument, out);
}

void copy_rows([[maybe_unused]] std::string_view operation, const RowCopy& call, Device device) {
  if (call.count == 0 || call.width == 0) {
    return;
  }
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(operation, cuda::copy_rows(call, cuda_stream(device)));
    return;
  }
  cpu::copy_rows(call);
}

void zero_rows([[maybe_unused]] std::string_view operation, const Matrix& to,
               const std::int64_t* at, MatrixSize size, [[maybe_unused]] std::int64_t rows,
               Device device) {
  if (size.rows == 0 || size.width == 0) {
    return;
  }
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(operation, cuda::zero_rows(to, at, size, rows, cuda_stream(device)));
    return;
  }
  cpu::zero_rows(to, at, size);
}

// add_rows and put_rows.
void merge(std::string_view operation, const Tensor& x, const Tensor& rows, const Tensor& y,
           const Tensor& out, bool add) {
  const Chosen chosen = check(operation, "x", x, rows);
  const Matrix from = matrix(operation, "x", x);
  expect_dtype(operation, "y", y, x.dtype());
  const Matrix part = narrow(operation, "y", y, x, rows);
  expect_dtype(operation, "out", out, x.dtype());
  const Matrix to = like(operation, "out", out, x, "x");
  if (x.is_meta()) {
    return;
  }
  const auto& [size, numbers, count] = chosen;
  if (from.at != to.at) {
    copy_rows(operation, {.from = from, .to = to, .count = size.rows, .width = size.width},
              x.device());
  }
  copy_rows(operation,
            {.from = part,
             .to = to,
             .to_rows = numbers,
             .count = count,
             .width = size.width,
             .rows = size.rows,
             .accumulate = add},
            x.device());
}

}  // namespace

void expect_distinct_rows(std::string_view operation, const Tensor& rows, std::int64_t count,
                          Device device) {
  expect_layout(operation, rows, device);
  if (device.kind != DeviceKind::cuda) {
    expect_distinct(operation, numbers_of(rows), count);
  } else if (rows.numel() > 0) {
    REPRISE_CUDA_SIDE(operation, cuda::check_rows(rows.data<std::int64_t>(), rows.numel(), count,
                                                  {fault_site(operation, not_there),
                                                   fault_site(operation, chosen_twice)},
                                                  cuda_fault_word(device), cuda_stream(device)));
    settle_faults(device);
  }
}

void take_rows(const Tensor& x, const Tensor& rows, const Tensor& y, bool accumulate) {
  const Chosen chosen = check("take_rows", "x", x, rows);
  const Matrix from = matrix("take_rows", "x", x);
  expect_trainable("take_rows", "y", y);
  const Matrix to = narrow("take_rows", "y", y, x, rows);
  if (x.is_meta()) {
    return;
  }
  copy_rows("take_rows",
            {.from = from,
             .to = to,
             .from_rows = chosen.numbers,
             .count = chosen.count,
             .width = chosen.size.width,
             .rows = chosen.size.rows,
             .accumulate = accumulate},
            x.device());
}

void add_rows(const Tensor& x, const Tensor& rows, const Tensor& y, const Tensor& out) {
  merge("add_rows", x, rows, y, out, true);
}

void put_rows(const Tensor& x, const Tensor& rows, const Tensor& y, const Tensor& out) {
  merge("put_rows", x, rows, y, out, false);
}

void take_rows_gradient(const Tensor& rows, const Tensor& dy, const Tensor& dx, bool accumulate) {
  constexpr std::string_view kName = "take_rows_gradient";
  const Chosen chosen = check(kName, "dx", dx, rows);
  const Matrix to = matrix(kName, "dx", dx);
  expect_trainable(kName, "dy", dy);
  const Matrix from = narrow(kName, "dy", dy, dx, rows);
  if (dx.is_meta()) {
    return;
  }
  if (!accumulate) {
    zero_rows(kName, to, nullptr, chosen.size, chosen.size.rows, dx.device());
  }
  copy_rows(kName,
            {.from = from,
             .to = to,
             .to_rows = chosen.numbers,
             .count = chosen.count,
             .width = chosen.size.width,
             .rows = chosen.size.rows,
             .accumulate = accumulate},
            dx.device());
}

void put_rows_gradient(const Tensor& rows, const Tensor& dout, const Tensor& dx, bool accumulate) {
  constexpr std::string_view kName = "put_rows_gradient";
  const Chosen chosen = check(kName, "dout", dout, rows);
  const Matrix from = matrix(kName, "dout", dout);
  const Matrix to = like(kName, "dx", dx, dout, "dout");
  const auto& [size, numbers, count] = chosen;
  Tensor workspace;
  if (accumulate) {
    workspace = Tensor::empty({size.rows}, DType::i32, dx.device(), MemoryKind::workspace);
  }
  if (dx.is_meta() || dx.numel() == 0) {
    return;
  }
  const Device device = dx.device();
  if (!accumulate) {
    if (from.at != to.at) {
      copy_rows(kName, {.from = from, .to = to, .count = size.rows, .width = size.width}, device);
    }
    zero_rows(kName, to, numbers, {count, size.width}, size.rows, device);
    return;
  }
  auto* marks = workspace.data<std::int32_t>();
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(
        kName, cuda::add_other_rows(from, to, numbers, count, marks, size, cuda_stream(device)));
    return;
  }
  cpu::add_other_rows(from, to, numbers, count, marks, size);
}

}  // namespace reprise::kernels

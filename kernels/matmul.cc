#include "kernels/matmul.h"

#include <algorithm>

#include "core/cuda_device.h"
#include "core/parallel.h"
#include "kernels/accumulate.h"
#include "kernels/column_sums_workspace.h"
#include "kernels/dispatch.h"
#include "kernels/elementwise_sides.h"
#include "kernels/matmul_sides.h"

namespace reprise::kernels {
namespace {

void expect_f32_or_bf16(std::string_view operation, std::string_view argument,
                        const Tensor& tensor) {
  if (tensor.dtype() != DType::f32 && tensor.dtype() != DType::bf16) {
    fail(operation, "{} must be f32 or bf16, got {}", argument, name(tensor.dtype()));
  }
}

std::int64_t expect_matrix(std::string_view operation, std::string_view argument,
                           const Tensor& tensor, Device device) {
  expect_f32_or_bf16(operation, argument, tensor);
  expect_device(operation, argument, tensor, device);
  if (tensor.rank() == 0) {
    fail(operation, "{} must be a matrix, got a scalar", argument);
  }
  return expect_rows(operation, argument, tensor);
}

// The product but for its strides.
TileShape checked(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options,
                  const Tensor& bias) {
  constexpr std::string_view op = "matmul";
  TileShape s;
  expect_matrix(op, "a", a, c.device());
  expect_matrix(op, "b", b, c.device());
  expect_matrix(op, "c", c, c.device());
  s.transpose_a = options.transpose_a;
  s.transpose_b = options.transpose_b;
  s.accumulate = options.accumulate;
  s.inputs = a.dtype();
  s.output = c.dtype();
  expect_dtype(op, "b", b, a.dtype());
  s.m = options.transpose_a ? a.shape().back() : a.shape().rows();
  s.k = options.transpose_a ? a.shape().rows() : a.shape().back();
  s.n = options.transpose_b ? b.shape().rows() : b.shape().back();
  const std::int64_t b_k = options.transpose_b ? b.shape().back() : b.shape().rows();
  if (b_k != s.k) {
    fail(op, "b must have K = {} as a {} has, got {}", s.k, to_string(a.shape()),
         to_string(b.shape()));
  }
  if (c.shape().rows() != s.m || c.shape().back() != s.n) {
    fail(op, "c must be [M, N] = [{}, {}], got {}", s.m, s.n, to_string(c.shape()));
  }
  if (bias.defined()) {
    expect_f32_or_bf16(op, "bias", bias);
    expect_device(op, "bias", bias, c.device());
    expect_shape(op, "bias", bias, Shape{s.n}, "[N]");
    expect_contiguous(op, "bias", bias);
    if (options.accumulate) {
      fail(op, "bias must be absent when the product is added to c");
    }
    s.bias = bias.dtype();
  }
  return s;
}

// A product over nothing: c is the bias, zero, or as it was.
void fill_without_product(const Tensor& c, const MatmulOptions& options, const Tensor& bias) {
  if (options.accumulate) {
    return;
  }
  const Tensor row =
      !bias.defined() || bias.dtype() == c.dtype()
          ? bias
          : Tensor::empty(bias.shape(), c.dtype(), c.device(), MemoryKind::workspace);
  if (c.is_meta()) {
    return;
  }
  c.zero();
  if (!bias.defined()) {
    return;
  }
  const Tensor rows = c.reshape(Shape{c.shape().rows(), c.shape().back()});
  if (row.dtype() != bias.dtype()) {
    column_sums(bias.reshape(Shape{1, bias.numel()}), row);
  }
  for (std::int64_t i = 0; i < rows.size(0); ++i) {
    rows.slice(0, i, i + 1).reshape(row.shape()).copy_from(row);
  }
}

// Rows that lie together: with others the library might take another order of sums.
Tensor dense(const Tensor& matrix) {
  if (matrix.is_contiguous()) {
    return matrix;
  }
  const Tensor copy =
      Tensor::empty(matrix.shape(), matrix.dtype(), matrix.device(), MemoryKind::workspace);
  cast(matrix, copy);
  return copy;
}

// The library has no f32 product that gives bf16, nor a bias of another dtype than the output.
void matmul_on_cuda(TileShape s, const Tensor& a, const Tensor& b, const Tensor& c,
                    const Tensor& bias) {
  const Device device = c.device();
  const auto workspace = [&](const Shape& shape, DType dtype) {
    return Tensor::empty(shape, dtype, device, MemoryKind::workspace);
  };
  const Tensor dense_a = dense(a), dense_b = dense(b);
  const bool has_pair =
      s.output == DType::f32 || (s.inputs == DType::bf16 && (!s.bias || *s.bias == DType::bf16));
  const bool direct = has_pair && c.is_contiguous(), accumulates = s.accumulate;
  if (!direct) {
    s.output = DType::f32;
    s.accumulate = false;
  }
  const Tensor to = direct ? c : workspace(c.shape(), s.output);
  Tensor row = bias;
  // The library is told of no bias that begins anywhere: its kernels read it as they do C.
  const auto bias_offset =
      s.bias ? bias.offset() * static_cast<std::int64_t>(size_bytes(*s.bias)) : 0;
  if (s.bias && (*s.bias != s.output || bias_offset % 16 != 0)) {
    row = workspace(bias.shape(), s.output);
    cast(bias, row);
    s.bias = s.output;
  }
  s.lda = s.transpose_a ? s.m : s.k;
  s.ldb = s.transpose_b ? s.k : s.n;
  s.ldc = s.n;
  const Tensor own = workspace(Shape{cuda::matmul_workspace_bytes() / 4}, DType::f32);
  if (!c.is_meta()) {
    REPRISE_CUDA_SIDE("matmul", cuda::matmul(s, dense_a.raw(), dense_b.raw(), to.raw(),
                                             row.defined() ? row.raw() : nullptr, own.raw(),
                                             cuda_stream(device)));
  }
  if (!direct) {
    accumulates ? accumulate(c, to) : cast(to, c);
  }
}

}  // namespace

void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options,
            const Tensor& bias) {
  TileShape s = checked(a, b, c, options, bias);
  if (s.m == 0 || s.n == 0) {
    return;
  }
  if (s.k == 0) {
    return fill_without_product(c, options, bias);
  }
  if (side_of(c.device()) == DeviceKind::cuda) {
    return matmul_on_cuda(s, a, b, c, bias);
  }
  // The library's order of sums changes with the strides, so all are made the same.
  const Tensor dense_a = a.contiguous(MemoryKind::workspace);
  const Tensor dense_b = b.contiguous(MemoryKind::workspace);
  const Tensor dense_c =
      options.accumulate  ? c.contiguous(MemoryKind::workspace)
      : c.is_contiguous() ? c
                          : Tensor::empty(c.shape(), c.dtype(), c.device(), MemoryKind::workspace);
  s.lda = options.transpose_a ? s.m : s.k;
  s.ldb = options.transpose_b ? s.k : s.n;
  s.ldc = s.n;
  const int count = threads();
  const std::int64_t bytes = cpu::matmul_workspace_bytes(s, count);
  const Tensor workspace =
      Tensor::empty(Shape{(bytes + 3) / 4}, DType::f32, c.device(), MemoryKind::workspace);
  if (c.is_meta()) {
    return;
  }
  cpu::matmul(s, dense_a.raw(), dense_b.raw(), dense_c.raw(), bias.defined() ? bias.raw() : nullptr,
              workspace.raw(), count);
  if (!dense_c.shares_storage(c)) {
    c.copy_from(dense_c);
  }
}

void column_sums(const Tensor& x, const Tensor& sums, bool accumulate) {
  const std::int64_t stride = expect_matrix("column_sums", "x", x, x.device());
  expect_f32_or_bf16("column_sums", "sums", sums);
  expect_shape("column_sums", "sums", sums, Shape{x.shape().back()}, "[N]");
  expect_device("column_sums", "sums", sums, x.device());
  expect_contiguous("column_sums", "sums", sums);
  [[maybe_unused]] const MatrixSize size{x.shape().rows(), sums.numel()};
  const Tensor partial = column_sum_workspace(size, x.device());
  if (x.is_meta() || sums.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("column_sums",
                      cuda::bias_gradient({x.numel() == 0 ? nullptr : x.raw(), x.dtype(), stride},
                                          {sums.raw(), sums.dtype(), sums.numel()}, accumulate,
                                          size, partial.data<float>(), cuda_stream(x.device())));
    return;
  }
  cpu::column_sums(x.dtype(), x.numel() == 0 ? nullptr : x.raw(), x.shape().rows(), sums.numel(),
                   stride, sums.dtype(), sums.raw(), accumulate);
}

}  // namespace reprise::kernels

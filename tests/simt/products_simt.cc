// Stands in for the library's products (kernels/matmul.cu) where the device is the host: the same
// call, with what it promises checked.
#include <vector>

#include "core/error.h"
#include "kernels/matmul_sides.h"
#include "kernels/matmul_tile.h"
#include "tests/simt/capture_simt.h"
#include "tests/simt/simt.h"

namespace reprise::kernels::cuda {

std::int64_t matmul_workspace_bytes() {
  return 64;  // the shim keeps a record of every byte
}

namespace {

void expect_matrix(const char* name, const void* at, std::int64_t rows, std::int64_t columns,
                   std::int64_t stride, DType dtype) {
  const auto elements = static_cast<std::size_t>((rows - 1) * stride + columns);
  simt::expect_memory(at, elements * size_bytes(dtype), name);
}

}  // namespace

void matmul(const TileShape& s, const void* a, const void* b, void* c, const void* bias,
            void* workspace, void*) {
  ensure(s.m > 0 && s.n > 0 && s.k > 0, "the product has elements");
  ensure(
      s.lda >= (s.transpose_a ? s.m : s.k) && s.ldb >= (s.transpose_b ? s.k : s.n) && s.ldc >= s.n,
      "rows do not overlap");
  ensure(s.inputs == s.output || (s.inputs == DType::bf16 && s.output == DType::f32),
         "the library has this pair of dtypes");
  ensure(s.bias.has_value() == (bias != nullptr) && (!s.bias || *s.bias == s.output),
         "the bias has the dtype of the output");
  ensure(!(s.bias && s.accumulate), "no bias with a sum");
  ensure(reinterpret_cast<std::uintptr_t>(workspace) % 64 == 0, "the workspace is aligned");
  expect_matrix("A", a, s.transpose_a ? s.k : s.m, s.transpose_a ? s.m : s.k, s.lda, s.inputs);
  expect_matrix("B", b, s.transpose_b ? s.n : s.k, s.transpose_b ? s.k : s.n, s.ldb, s.inputs);
  expect_matrix("C", c, s.m, s.n, s.ldc, s.output);
  if (bias != nullptr) {
    expect_matrix("the bias", bias, 1, s.n, s.n, s.output);
  }
  if (simt::options().corners) {
    return;
  }
  testing::on_device("matmul", [=] {
    const auto product = tile_product(s);
    std::vector<char> scratch(static_cast<std::size_t>(product->scratch_bytes()) + 64);
    const auto at = reinterpret_cast<std::uintptr_t>(scratch.data());
    product->run(a, b, c, bias, scratch.data() + (64 - at % 64) % 64);
    for (std::int64_t row = 0; row < s.m; ++row) {
      const std::size_t bytes = size_bytes(s.output);
      simt::define_memory(static_cast<char*>(c) + static_cast<std::size_t>(row * s.ldc) * bytes,
                          static_cast<std::size_t>(s.n) * bytes);
    }
  });
}

}  // namespace reprise::kernels::cuda

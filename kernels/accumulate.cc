#include "kernels/accumulate.h"

#include "core/cuda_device.h"
#include "kernels/accumulate_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {
namespace {

void expect_no_double(std::string_view operation, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->dtype() == DType::f64) {
      fail(operation, "f64 has no CUDA kernel, it is for oracles");
    }
  }
}

}  // namespace

void accumulate(const Tensor& into, const Tensor& x) {
  expect_floating("accumulate", "into", into);
  expect_floating("accumulate", "x", x);
  expect_like("accumulate", "x", x, into, "into");
  const Matrix to = matrix("accumulate", "into", into), from = matrix("accumulate", "x", x);
  if (into.is_meta() || into.numel() == 0) {
    return;
  }
  if (into.device().kind == DeviceKind::cuda) {
    expect_no_double("accumulate", {&into, &x});
    REPRISE_CUDA_SIDE("accumulate", cuda::add(to, from, to, merged_size({&into, &x}),
                                              cuda_stream(into.device())));
    return;
  }
  cpu::accumulate(to, from, merged_size({&into, &x}));
}

void cast(const Tensor& x, const Tensor& y) {
  expect_floating("cast", "x", x);
  expect_floating("cast", "y", y);
  expect_like("cast", "y", y, x, "x");
  const Matrix from = matrix("cast", "x", x), to = matrix("cast", "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    expect_no_double("cast", {&x, &y});
    REPRISE_CUDA_SIDE("cast", cuda::cast(from, to, merged_size({&x, &y}), cuda_stream(x.device())));
    return;
  }
  cpu::cast(from, to, merged_size({&x, &y}));
}

void add(const Tensor& x, const Tensor& r, const Tensor& y) {
  expect_floating("add", "x", x);
  expect_dtype("add", "r", r, x.dtype());
  expect_dtype("add", "y", y, x.dtype());
  expect_like("add", "r", r, x, "x");
  expect_like("add", "y", y, x, "x");
  const Matrix from = matrix("add", "x", x), other = matrix("add", "r", r),
               to = matrix("add", "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    expect_no_double("add", {&x, &r, &y});
    REPRISE_CUDA_SIDE(
        "add", cuda::add(from, other, to, merged_size({&x, &r, &y}), cuda_stream(x.device())));
    return;
  }
  cpu::add(from, other, to, merged_size({&x, &r, &y}));
}

}  // namespace reprise::kernels

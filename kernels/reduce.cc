#include "kernels/reduce.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include "core/cuda_device.h"
#include "core/parallel.h"
#include "kernels/dispatch.h"
#include "kernels/reduce_sides.h"

namespace reprise::kernels {
namespace {

void expect_f32_or_bf16(std::string_view operation, std::string_view argument,
                        const Tensor& tensor) {
  if (tensor.dtype() != DType::f32 && tensor.dtype() != DType::bf16) {
    fail(operation, "{} must be f32 or bf16, got {}", argument, name(tensor.dtype()));
  }
}

std::int64_t chunks_of(std::int64_t count) {
  return (count + kChunkElements - 1) / kChunkElements;
}

Elements elements_of(std::string_view operation, const Tensor& x) {
  const std::int64_t stride = expect_rows(operation, "x", x);
  const std::int64_t count = x.numel();
  if (x.is_contiguous()) {
    return {nullptr, x.dtype(), count, count, count};
  }
  return {nullptr, x.dtype(), count, x.shape().back(), stride};
}

// Of a list: contiguous.
Elements whole(const Tensor& x) {
  const std::int64_t count = x.numel();
  return {count == 0 ? nullptr : x.raw(), x.dtype(), count, count, count};
}

[[maybe_unused]] std::vector<Elements> all_whole(std::span<const Tensor> tensors) {
  std::vector<Elements> all;
  for (const Tensor& x : tensors) {
    all.push_back(whole(x));
  }
  return all;
}

void expect_result(std::string_view operation, const Tensor& out, const Shape& shape,
                   std::string_view letters, Device device) {
  if (out.dtype() != DType::f32 && out.dtype() != DType::f64) {
    fail(operation, "out must be f32 or f64, got {}", name(out.dtype()));
  }
  expect_shape(operation, "out", out, shape, letters);
  expect_device(operation, "out", out, device);
  expect_contiguous(operation, "out", out);
}

void write(const Tensor& out, std::int64_t i, double value) {
  if (out.dtype() == DType::f64) {
    out.data<double>()[i] = value;
  } else {
    out.data<float>()[i] = static_cast<float>(value);
  }
}

void reduce(std::string_view operation, const Tensor& x, bool squares, double factor,
            const Tensor& out) {
  expect_f32_or_bf16(operation, "x", x);
  Elements elements = elements_of(operation, x);
  expect_result(operation, out, Shape{}, "[]", x.device());
  const std::int64_t chunks = chunks_of(elements.count);
  const Tensor partial =
      Tensor::empty(Shape{chunks}, DType::f64, x.device(), MemoryKind::workspace);
  if (x.is_meta()) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    elements.at = chunks == 0 ? nullptr : x.raw();
    REPRISE_CUDA_SIDE(operation, cuda::reduce(elements, squares, factor,
                                              chunks == 0 ? nullptr : partial.data<double>(),
                                              out.dtype(), out.raw(), cuda_stream(x.device())));
    return;
  }
  double total = 0;
  if (chunks > 0) {
    elements.at = x.raw();
    double* sums = partial.data<double>();
    parallel_for(elements.count, kChunkElements, [&](std::int64_t begin, std::int64_t end) {
      sums[begin / kChunkElements] = cpu::chunk_sum(elements, squares, begin, end);
    });
    for (std::int64_t i = 0; i < chunks; ++i) {
      total += sums[i];
    }
  }
  write(out, 0, factor * total);
}

void expect_gradients(std::string_view operation, const Tensor& g, const Tensor& dx) {
  expect_dtype(operation, "g", g, DType::f32);
  expect_shape(operation, "g", g, Shape{}, "[]");
  expect_f32_or_bf16(operation, "dx", dx);
  expect_device(operation, "dx", dx, g.device());
  expect_contiguous(operation, "dx", dx);
}

// Chunks of all tensors together: firsts[j] is the number of the first chunk of tensor j.
std::vector<std::int64_t> chunk_table(std::string_view operation, std::span<const Tensor> tensors) {
  std::vector<std::int64_t> firsts{0};
  for (const Tensor& x : tensors) {
    expect_f32_or_bf16(operation, "x", x);
    expect_device(operation, "x", x, tensors[0].device());
    expect_contiguous(operation, "x", x);
    firsts.push_back(firsts.back() + chunks_of(x.numel()));
  }
  return firsts;
}

// f(tensor, chunk of all, begin, end).
template <class F>
void for_chunks(std::span<const Tensor> tensors, const std::vector<std::int64_t>& firsts, F&& f) {
  parallel_for(firsts.back(), 1, [&](std::int64_t chunk, std::int64_t) {
    const auto next = std::upper_bound(firsts.begin(), firsts.end(), chunk);
    const std::int64_t j = next - firsts.begin() - 1;
    const Tensor& x = tensors[static_cast<std::size_t>(j)];
    const std::int64_t begin = (chunk - firsts[static_cast<std::size_t>(j)]) * kChunkElements;
    f(x, chunk, begin, std::min(x.numel(), begin + kChunkElements));
  });
}

}  // namespace

void sum(const Tensor& x, double factor, const Tensor& out) {
  reduce("sum", x, false, factor, out);
}

void sum_squares(const Tensor& x, double factor, const Tensor& out) {
  reduce("sum_squares", x, true, factor, out);
}

void sum_backward(const Tensor& g, double factor, const Tensor& dx, bool accumulate) {
  expect_gradients("sum_backward", g, dx);
  if (dx.is_meta() || dx.numel() == 0) {
    return;
  }
  if (dx.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("sum_backward",
                      cuda::add_constant(dx.dtype(), dx.raw(), dx.numel(), g.data<float>(), factor,
                                         accumulate, cuda_stream(dx.device())));
    return;
  }
  const auto value = static_cast<float>(factor * g.item<float>());
  cpu::add_constant(dx.dtype(), dx.raw(), dx.numel(), value, accumulate);
}

void sum_squares_backward(const Tensor& g, const Tensor& x, double factor, const Tensor& dx,
                          bool accumulate) {
  expect_gradients("sum_squares_backward", g, dx);
  expect_dtype("sum_squares_backward", "x", x, dx.dtype());
  expect_shape("sum_squares_backward", "x", x, dx.shape(), "the shape of dx");
  expect_device("sum_squares_backward", "x", x, g.device());
  Elements elements = elements_of("sum_squares_backward", x);
  if (dx.is_meta() || dx.numel() == 0) {
    return;
  }
  elements.at = x.raw();
  if (dx.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("sum_squares_backward",
                      cuda::add_scaled(elements, g.data<float>(), 2 * factor, dx.dtype(), dx.raw(),
                                       accumulate, cuda_stream(dx.device())));
    return;
  }
  cpu::add_scaled(elements, static_cast<float>(2 * factor * g.item<float>()), dx.dtype(), dx.raw(),
                  accumulate);
}

void squared_norms(std::span<const Tensor> tensors, const Tensor& out) {
  const auto count = static_cast<std::int64_t>(tensors.size());
  const Device device = tensors.empty() ? out.device() : tensors[0].device();
  const std::vector<std::int64_t> firsts = chunk_table("squared_norms", tensors);
  expect_result("squared_norms", out, Shape{count}, "[tensors]", device);
  const Tensor partial =
      Tensor::empty(Shape{firsts.back()}, DType::f64, device, MemoryKind::workspace);
  if (out.is_meta()) {
    return;
  }
  double* sums = firsts.back() == 0 ? nullptr : partial.data<double>();
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("squared_norms",
                      cuda::squared_norms(all_whole(tensors), sums, out.dtype(),
                                          count == 0 ? nullptr : out.raw(), cuda_stream(device)));
    return;
  }
  for_chunks(tensors, firsts,
             [&](const Tensor& x, std::int64_t chunk, std::int64_t begin, std::int64_t end) {
               sums[chunk] = cpu::chunk_sum(whole(x), true, begin, end);
             });
  for (std::int64_t j = 0; j < count; ++j) {
    double total = 0;
    for (std::int64_t i = firsts[static_cast<std::size_t>(j)];
         i < firsts[static_cast<std::size_t>(j) + 1]; ++i) {
      total += sums[i];
    }
    write(out, j, total);
  }
}

void scale_all(std::span<const Tensor> tensors, double factor) {
  const std::vector<std::int64_t> firsts = chunk_table("scale_all", tensors);
  if (tensors.empty() || tensors[0].is_meta()) {
    return;
  }
  if (tensors[0].device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("scale_all", cuda::scale_all(all_whole(tensors), static_cast<float>(factor),
                                                   cuda_stream(tensors[0].device())));
    return;
  }
  for_chunks(tensors, firsts,
             [&](const Tensor& x, std::int64_t, std::int64_t begin, std::int64_t end) {
               const auto size = static_cast<std::int64_t>(size_bytes(x.dtype()));
               cpu::scale_run(x.dtype(), static_cast<char*>(x.raw()) + begin * size, end - begin,
                              static_cast<float>(factor));
             });
}

}  // namespace reprise::kernels

#include "kernels/low_rank.h"

#include <string_view>

#include "core/cuda_device.h"
#include "kernels/low_rank_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {
namespace {

void expect_matrix(std::string_view op, std::string_view argument, const Tensor& x,
                   std::string_view form, const Shape& shape, const Tensor& model) {
  if (x.shape() != shape) {
    fail(op, "{} must be {} = {}, got {}", argument, form, to_string(shape), to_string(x.shape()));
  }
  expect_device(op, argument, x, model.device());
}

// The types of an adapter beside those of its layer.
void expect_types(std::string_view op, std::string_view of_layer, const Tensor& layer,
                  std::string_view of_adapter, const Tensor& adapter) {
  expect_trainable(op, of_layer, layer);
  expect_trainable(op, of_adapter, adapter);
  if (adapter.dtype() == DType::bf16 && layer.dtype() != DType::bf16) {
    fail(op, "{} must be f32 as {}, got bf16", of_adapter, of_layer);
  }
}

void expect_same_type(std::string_view op, std::string_view argument, const Tensor& x,
                      const Tensor& model) {
  if (x.dtype() != model.dtype()) {
    fail(op, "{} must be {}, got {}", argument, name(model.dtype()), name(x.dtype()));
  }
}

struct LowRankShapes {
  std::int64_t rows, in, rank;
};

LowRankShapes check_low_rank(const Tensor& x, const Tensor& a, const Tensor& u,
                             std::string_view u_name) {
  constexpr std::string_view op = "low_rank";
  expect_types(op, "x", x, "a", a);
  if (x.rank() == 0 || a.rank() != 2 || a.size(1) != x.shape().back()) {
    fail(op, "a must be [R, I] with the I of x {}, got {}", to_string(x.shape()),
         to_string(a.shape()));
  }
  expect_device(op, "a", a, x.device());
  expect_matrix(op, u_name, u, "[.., R]", x.shape().with(x.rank() - 1, a.size(0)), x);
  expect_same_type(op, u_name, u, a);
  return {x.shape().rows(), a.size(1), a.size(0)};
}

void check_gradient(std::string_view op, std::string_view argument, const LowRankGradient& gradient,
                    std::string_view form, const Tensor& of) {
  if (gradient.tensor.defined()) {
    expect_trainable(op, argument, gradient.tensor);
    expect_matrix(op, argument, gradient.tensor, form, of.shape(), of);
    (void)expect_rows(op, argument, gradient.tensor);
  }
}

bool on_cuda(const Tensor& x) {
  return side_of(x.device()) == DeviceKind::cuda;
}

// Takes no workspace, so that there is nothing to do on meta.
void product_on_cuda([[maybe_unused]] const LowRankProduct& product,
                     [[maybe_unused]] std::string_view op, const Tensor& model) {
  if (!model.is_meta()) {
    REPRISE_CUDA_SIDE(op, cuda::low_rank_product(product, cuda_stream(model.device())));
  }
}

}  // namespace

void low_rank(const Tensor& x, const Tensor& a, const LowRankOptions& options, const Tensor& u) {
  check_low_rank(x, a, u, "u");
  (void)matrix("low_rank", "x", x);
  (void)matrix("low_rank", "a", a);
  (void)matrix("low_rank", "u", u);
  products::low_rank(x, a, options, u);
}

void low_rank_backward(const Tensor& du, const Tensor& x, const Tensor& a,
                       const LowRankOptions& options, const LowRankGradient& dx,
                       const LowRankGradient& da) {
  constexpr std::string_view op = "low_rank";
  const LowRankShapes size = check_low_rank(x, a, du, "du");
  check_gradient(op, "dx", dx, "[.., I]", x);
  check_gradient(op, "da", da, "[R, I]", a);
  if (!on_cuda(x) || !dx.tensor.defined()) {
    return products::low_rank_backward(du, x, a, options, dx, da);
  }
  LowRankProduct p;
  p.m = size.rows;
  p.n = size.in;
  p.k = size.rank;
  p.left = {matrix(op, "du", du)};
  p.right = {matrix(op, "a", a), true};
  p.to = matrix(op, "dx", dx.tensor);
  p.scale = static_cast<float>(options.scale);
  if (options.probability > 0) {
    p.mask = dropout_mask(options.probability, options.seed, options.offset);
    p.drop_result = true;
  }
  p.accumulate = dx.accumulate;
  product_on_cuda(p, op, x);
  if (da.tensor.defined()) {
    products::low_rank_backward(du, x, a, options, {}, da);
  }
}

namespace {

std::int64_t check_add(const Tensor& y, std::string_view y_name, const Tensor& u, const Tensor& b) {
  constexpr std::string_view op = "add_low_rank";
  expect_types(op, y_name, y, "b", b);
  expect_same_type(op, "u", u, b);
  if (y.rank() == 0 || b.rank() != 2 || b.size(0) != y.shape().back()) {
    fail(op, "b must be [O, R] with the O of {} {}, got {}", y_name, to_string(y.shape()),
         to_string(b.shape()));
  }
  expect_device(op, "b", b, y.device());
  expect_matrix(op, "u", u, "[.., R]", y.shape().with(y.rank() - 1, b.size(1)), y);
  return y.shape().rows();
}

}  // namespace

void add_low_rank(const Tensor& y, const Tensor& u, const Tensor& b, const Tensor& z) {
  constexpr std::string_view op = "add_low_rank";
  [[maybe_unused]] const std::int64_t rows = check_add(y, "y", u, b);
  expect_like(op, "z", z, y, "y");
  expect_same_type(op, "z", z, y);
  LowRankProduct p;
  p.base = matrix(op, "y", y);
  p.to = matrix(op, "z", z);
  p.left = {matrix(op, "u", u)};
  p.right = {matrix(op, "b", b)};
  if (on_cuda(y)) {
    p.m = rows;
    p.n = b.size(0);
    p.k = b.size(1);
    product_on_cuda(p, op, y);
    return;
  }
  products::add_low_rank(y, u, b, z);
}

void add_low_rank_backward(const Tensor& dz, const Tensor& u, const Tensor& b,
                           const LowRankGradient& du, const LowRankGradient& db) {
  constexpr std::string_view op = "add_low_rank";
  [[maybe_unused]] const std::int64_t rows = check_add(dz, "dz", u, b);
  check_gradient(op, "du", du, "[.., R]", u);
  check_gradient(op, "db", db, "[O, R]", b);
  (void)matrix(op, "dz", dz);
  products::add_low_rank_backward(dz, u, b, du, db);
}

void merged_norms(const Tensor& w, bool in_out, const Tensor& a, const Tensor& b, double factor,
                  const Tensor& v) {
  constexpr std::string_view op = "merged_norms";
  expect_trainable(op, "w", w);
  expect_trainable(op, "a", a);
  expect_same_type(op, "b", b, a);
  if (w.rank() != 2) {
    fail(op, "w must be a matrix, got {}", to_string(w.shape()));
  }
  const std::int64_t out = w.size(in_out ? 1 : 0), in = w.size(in_out ? 0 : 1);
  if (a.rank() != 2) {
    fail(op, "a must be [R, I], got {}", to_string(a.shape()));
  }
  expect_matrix(op, "a", a, "[R, I]", Shape{a.size(0), in}, w);
  expect_matrix(op, "b", b, "[O, R]", Shape{out, a.size(0)}, w);
  expect_matrix(op, "v", v, "[O]", Shape{out}, w);
  if (v.dtype() != DType::f32) {
    fail(op, "v must be f32, got {}", name(v.dtype()));
  }
  LowRankProduct p;
  p.left = {matrix(op, "b", b)};
  p.right = {matrix(op, "a", a), true};
  [[maybe_unused]] const Matrix base = matrix(op, "w", w);
  if (on_cuda(w)) {
    p.m = out;
    p.n = in;
    p.k = a.size(0);
    p.scale = static_cast<float>(factor);
    if (!w.is_meta()) {
      REPRISE_CUDA_SIDE(
          op, cuda::merged_norms(base, in_out, p, v.data<float>(), cuda_stream(w.device())));
    }
    return;
  }
  products::merged_norms(w, in_out, a, b, factor, v);
}

}  // namespace reprise::kernels

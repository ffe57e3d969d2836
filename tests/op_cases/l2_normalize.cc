// Rows of the l2_normalize family.
#include "autograd/l2_normalize.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kernels/l2_normalize.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

OpCase row(const std::string& size, const Shape& shape) {
  OpCase op;
  op.name = "l2_normalize/" + size;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}}};
  op.run = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{l2_normalize(in[0])};
  };
  op.oracle = [](const std::vector<Array>& in) {
    Array y(in[0].shape);
    const std::int64_t width = y.shape.back();
    for (std::int64_t row = 0; width > 0 && row < y.shape.rows(); ++row) {
      double square = 0;
      for (std::int64_t c = 0; c < width; ++c) {
        square += in[0][row * width + c] * in[0][row * width + c];
      }
      for (std::int64_t c = 0; c < width; ++c) {
        y[row * width + c] = in[0][row * width + c] / std::sqrt(square);
      }
    }
    return std::vector<Array>{y};
  };
  op.cuda = true;
  return op;
}

Tensor f32(const Shape& shape) {
  return Tensor::zeros(shape, DType::f32);
}

std::vector<Mistake> mistakes() {
  const auto bf16 = [](const Shape& shape) { return Tensor::zeros(shape, DType::bf16); };
  const auto ids = [](const Shape& shape) { return Tensor::zeros(shape, DType::i64); };
  const auto turned = [] { return f32({3, 2}).transpose(0, 1); };
  using kernels::l2_normalize_backward;
  return {
      {[=] {
         l2_normalize(ids({2, 3}));
       },
       "[l2_normalize] x must be f32 or bf16, got i64"},
      {[=] { l2_normalize(f32({})); }, "[l2_normalize] x must be [.., C], got a scalar"},
      {[=] { l2_normalize(turned()); },
       "[l2_normalize] x must be rows of unit stride, got shape [2, 3] with other strides: call "
       "contiguous()"},
      {[=] {
         kernels::l2_normalize(f32({2, 3}), bf16({2, 3}), f32({2}));
       },
       "[l2_normalize] y must be f32, got bf16"},
      {[=] {
         kernels::l2_normalize(f32({2, 3}), f32({3, 2}), f32({2}));
       },
       "[l2_normalize] y must have the shape [2, 3] of x, got [3, 2]"},
      {[=] {
         kernels::l2_normalize(f32({2, 3}), f32({2, 3}), f32({3}));
       },
       "[l2_normalize] scale must be [..] = [2], got [3]"},
      {[=] {
         kernels::l2_normalize(f32({2, 3}), f32({2, 3}), bf16({2}));
       },
       "[l2_normalize] scale must be f32, got bf16"},
      {[=] {
         kernels::l2_normalize(f32({2, 3}), f32({2, 3}), Tensor::zeros({2}, DType::f32, meta));
       },
       "[l2_normalize] scale must be on cpu, got meta"},
      {[=] {
         kernels::l2_normalize(f32({2, 3}), f32({2, 3}), f32({4}).as_view({2}, {2}, 0));
       },
       "[l2_normalize] scale must be contiguous, got shape [2] with other strides: call "
       "contiguous()"},
      {[=] {
         l2_normalize_backward(f32({2, 3}), bf16({2, 3}), f32({2}), f32({2, 3}));
       },
       "[l2_normalize_backward] y must be f32, got bf16"},
      {[=] {
         l2_normalize_backward(f32({2, 3}), f32({3, 2}), f32({2}), f32({2, 3}));
       },
       "[l2_normalize_backward] y must have the shape [2, 3] of dy, got [3, 2]"},
      {[=] {
         l2_normalize_backward(f32({2, 3}), f32({2, 3}), f32({2}), ids({2, 3}));
       },
       "[l2_normalize_backward] dx must be f32 or bf16, got i64"},
      {[=] {
         l2_normalize_backward(f32({2, 3}), f32({2, 3}), f32({2}), f32({3, 2}));
       },
       "[l2_normalize_backward] dx must have the shape [2, 3] of dy, got [3, 2]"},
  };
}

}  // namespace

std::vector<OpCase> l2_normalize_cases() {
  std::vector<OpCase> cases = {
      row("odd", {2, 3, 17}),     row("even", {5, 64}), row("wide", {3, 1100}),
      row("many_rows", {300, 8}), row("vector", {9}),   row("no_rows", {0, 8}),
      row("no_columns", {3, 0}),  row("two", {40, 2}),
  };
  cases[0].mistakes = mistakes();
  OpCase large = row("benchmark", {4096, 768});
  large.benchmark = true;
  large.test = false;
  cases.push_back(std::move(large));
  return cases;
}

}  // namespace reprise::testing

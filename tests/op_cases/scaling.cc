// Rows of the scaling family.
#include "kernels/scaling.h"

#include <string>
#include <utility>
#include <vector>

#include "autograd/scaling.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

using kernels::Factors;

OpCase row(Factors factors, const std::string& size, const Shape& shape, const Shape& v,
           bool f32_factors = false) {
  OpCase op;
  op.name = std::string(factors == Factors::columns ? "scale_columns/"
                        : factors == Factors::rows  ? "scale_rows/"
                                                    : "scale_by/") +
            size;
  op.inputs = {
      {.name = "x", .shape = shape, .strided = shape.rank() > 0, .values = {}},
      {.name = "v", .shape = v, .always_f32 = f32_factors, .parameter = true, .values = {}}};
  op.run = [factors](const std::vector<Variable>& in) {
    return std::vector<Variable>{factors == Factors::columns ? scale_columns(in[0], in[1])
                                 : factors == Factors::rows  ? scale_rows(in[0], in[1])
                                                             : scale(in[0], in[1])};
  };
  op.oracle = [factors](const std::vector<Array>& in) {
    Array y(in[0].shape);
    const std::int64_t width = y.shape.rank() == 0 ? 1 : y.shape.back();
    for (std::int64_t i = 0; i < y.shape.numel(); ++i) {
      y[i] = in[0][i] * in[1][factors == Factors::columns ? i % width
                              : factors == Factors::rows  ? i / width
                                                          : 0];
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
  const auto ids = [] { return Tensor::zeros({2, 3}, DType::i64); };
  const auto turned = [] { return f32({3, 2}).transpose(0, 1); };
  return {
      {[=] { scale_columns(ids(), f32({3})); }, "[scale_columns] x must be f32 or bf16, got i64"},
      {[=] {
         scale_columns(f32({2, 3}), ids());
       },
       "[scale_columns] v must be f32 or bf16, got i64"},
      {[=] {
         scale_columns(f32({2, 3}), f32({2}));
       },
       "[scale_columns] v must be [C] = [3], got [2]"},
      {[=] { scale_columns(f32({}), f32({1})); },
       "[scale_columns] x must be [.., C], got a scalar"},
      {[=] { scale_rows(f32({}), f32({})); }, "[scale_rows] x must be [.., C], got a scalar"},
      {[=] {
         scale_rows(f32({2, 3, 4}), f32({3, 2}));
       },
       "[scale_rows] v must be [rows] = [6], got [3, 2]"},
      {[=] {
         scale(f32({2, 3}), f32({1}));
       },
       "[scale] v must be [] = [], got [1]"},
      {[=] {
         scale_rows(f32({2, 3}), Tensor::zeros({2}, DType::f32, meta));
       },
       "[scale_rows] v must be on cpu, got meta"},
      {[=] {
         scale_rows(f32({2, 3}), f32({4}).as_view({2}, {2}, 0));
       },
       "[scale_rows] v must be contiguous, got shape [2] with other strides: call contiguous()"},
      {[=] { scale_rows(turned(), f32({2})); },
       "[scale_rows] x must be rows of unit stride, got shape [2, 3] with other strides: call "
       "contiguous()"},
      {[=] {
         kernels::scale_by(Factors::columns, f32({2, 3}), f32({3}), ids());
       },
       "[scale_columns] y must be f32 or bf16, got i64"},
      {[=] {
         kernels::scale_by(Factors::columns, f32({2, 3}), f32({3}), f32({3, 2}));
       },
       "[scale_columns] y must have the shape [2, 3] of x, got [3, 2]"},
      {[=] {
         kernels::scale_by(Factors::columns, f32({2, 3}), f32({3}), turned());
       },
       "[scale_columns] y must be rows of unit stride, got shape [2, 3] with other strides: call "
       "contiguous()"},
  };
}

std::vector<Mistake> gradient_mistakes() {
  const auto call = [](const Tensor& x, const Tensor& dy, const Tensor& dv) {
    kernels::scale_by_gradient(Factors::columns, x, dy, dv);
  };
  return {
      {[=] {
         call(Tensor::zeros({2, 3}, DType::i64), f32({2, 3}), f32({3}));
       },
       "[scale_columns] x must be f32 or bf16, got i64"},
      {[=] {
         call(f32({2, 3}), Tensor::zeros({2, 3}, DType::bf16), f32({3}));
       },
       "[scale_columns] dy must be f32, got bf16"},
      {[=] {
         call(f32({2, 3}), f32({2, 4}), f32({3}));
       },
       "[scale_columns] dy must have the shape [2, 3] of x, got [2, 4]"},
      {[=] {
         call(f32({2, 3}), f32({2, 3}), f32({2}));
       },
       "[scale_columns] dv must be [C] = [3], got [2]"},
      {[=] {
         call(f32({2, 3}), f32({2, 3}), Tensor::zeros({3}, DType::i64));
       },
       "[scale_columns] dv must be f32 or bf16, got i64"},
      {[=] {
         call(f32({2, 3}), f32({3, 2}).transpose(0, 1), f32({3}));
       },
       "[scale_columns] dy must be rows of unit stride, got shape [2, 3] with other strides: call "
       "contiguous()"},
  };
}

}  // namespace

std::vector<OpCase> scaling_cases() {
  std::vector<OpCase> cases;
  for (const auto factors : {Factors::columns, Factors::rows, Factors::all}) {
    const auto add = [&](const std::string& size, const Shape& shape, bool f32_factors = false) {
      const Shape v = factors == Factors::columns ? Shape{shape.back()}
                      : factors == Factors::rows  ? Shape{shape.rows()}
                                                  : Shape{};
      cases.push_back(row(factors, size, shape, v, f32_factors));
    };
    add("odd", {2, 3, 17});
    add("even", {5, 64});
    add("many_rows", {150, 24});
    add("several_pieces", {3, 2100});
    add("one_long_row", {20011});
    add("narrow", {70, 1});
    add("f32_factors", {4, 33}, true);
    add("no_rows", {0, 8});
    add("no_columns", {3, 0});
  }
  cases.push_back(row(Factors::rows, "leading_dimensions", {2, 3, 8}, {2, 3}));
  cases.push_back(row(Factors::all, "scalar", {}, {}));
  cases[0].mistakes = mistakes();
  cases[1].mistakes = gradient_mistakes();
  for (const auto factors : {Factors::columns, Factors::rows, Factors::all}) {
    const Shape v = factors == Factors::columns ? Shape{3072}
                    : factors == Factors::rows  ? Shape{2048}
                                                : Shape{};
    OpCase large = row(factors, "benchmark", {2048, 3072}, v);
    large.benchmark = true;
    large.test = false;
    cases.push_back(std::move(large));
  }
  return cases;
}

}  // namespace reprise::testing

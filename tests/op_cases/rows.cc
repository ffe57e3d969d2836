// Rows of the rows family.
#include "autograd/rows.h"

#include <string>
#include <utility>
#include <vector>

#include "core/cuda_device.h"
#include "kernels/rows.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

enum class Kind : std::uint8_t { take, add, put };

using Numbers = std::vector<std::int64_t>;

Array oracle(Kind kind, const std::vector<Array>& in) {
  const std::int64_t width = in[0].shape.back(), count = in[1].shape[0];
  if (kind == Kind::take) {
    Array y(Shape{count, width});
    for (std::int64_t i = 0; i < count * width; ++i) {
      y[i] = in[0][static_cast<std::int64_t>(in[1][i / width]) * width + i % width];
    }
    return y;
  }
  Array out = in[0];
  for (std::int64_t i = 0; i < count * width; ++i) {
    const std::int64_t at = static_cast<std::int64_t>(in[1][i / width]) * width + i % width;
    out[at] = in[2][i] + (kind == Kind::add ? in[0][at] : 0);
  }
  return out;
}

OpCase row(Kind kind, const std::string& size, const Shape& shape, const Numbers& rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  OpCase op;
  op.name = std::string(kind == Kind::take  ? "take_rows/"
                        : kind == Kind::add ? "add_rows/"
                                            : "put_rows/") +
            size;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .parameter = true, .values = {}},
               {.name = "rows",
                .shape = {count},
                .fill = Fill::indices,
                .limit = 1,
                .gradient = false,
                .values = rows}};
  if (kind != Kind::take) {
    op.inputs.push_back({.name = "y",
                         .shape = {count, shape.back()},
                         .strided = true,
                         .parameter = true,
                         .values = {}});
  }
  op.run = [kind](const std::vector<Variable>& in) {
    return std::vector<Variable>{kind == Kind::take  ? take_rows(in[0], in[1])
                                 : kind == Kind::add ? add_rows(in[0], in[1], in[2])
                                                     : put_rows(in[0], in[1], in[2])};
  };
  op.oracle = [kind](const std::vector<Array>& in) { return std::vector<Array>{oracle(kind, in)}; };
  op.cuda = true;
  return op;
}

Numbers every(std::int64_t step, std::int64_t end) {
  Numbers rows;
  for (std::int64_t row = 0; row < end; row += step) {
    rows.push_back(row);
  }
  return rows;
}

Tensor f32(const Shape& shape) {
  return Tensor::zeros(shape, DType::f32);
}
Tensor bf16(const Shape& shape) {
  return Tensor::zeros(shape, DType::bf16);
}
Tensor of(const Numbers& rows, Device device = cpu) {
  return Tensor::from(rows, {static_cast<std::int64_t>(rows.size())}, device);
}

std::vector<Mistake> number_mistakes() {
  std::vector<Mistake> all = {
      {[] {
         take_rows(f32({2, 3, 4}), of({0, 5, 6}));
       },
       "[take_rows] row number at position 2 must be in [0, 6), got 6"},
      {[] {
         put_rows(f32({6, 4}), of({-1}), f32({1, 4}));
       },
       "[put_rows] row number at position 0 must be in [0, 6), got -1"},
      {[] {
         add_rows(f32({6, 4}), of({5, 3, 0, 4, 3}), f32({5, 4}));
       },
       "[add_rows] row 3 is chosen at positions 1 and 4, each row may be once"},
      {[] {
         take_rows(f32({6, 4}), of({2, 2}));
       },
       "[take_rows] row 2 is chosen at positions 0 and 1, each row may be once"},
      {[] {
         take_rows(Tensor::zeros({6, 4}, DType::f32, meta), of({1, 0, 1}, meta));
       },
       "[take_rows] row 1 is chosen at positions 0 and 2, each row may be once"},
      {[] { kernels::expect_distinct_rows("take_rows", of({9}), 9, cpu); },
       "[take_rows] row number at position 0 must be in [0, 9), got 9"},
      {[] {
         take_rows(f32({6, 4}), f32({2}));
       },
       "[take_rows] rows must be i64, got f32"},
      {[] {
         take_rows(f32({6, 4}), of({0, 1}).reshape({1, 2}));
       },
       "[take_rows] rows must be [M], got [1, 2]"},
      {[] {
         take_rows(f32({6, 4}), of({0}, meta));
       },
       "[take_rows] rows must be on cpu, got meta"},
      {[] {
         take_rows(f32({6, 4}), of({0, 1, 2, 3}).as_view({2}, {2}, 0));
       },
       "[take_rows] rows must be contiguous, got shape [2] with other strides: call contiguous()"},
  };
  if (cuda_device_count() > 0) {
    const Device device{DeviceKind::cuda, 0};
    all.push_back({[=] {
                     take_rows(f32({6, 4}).to(device), of({3, 1, 3}, device));
                   },
                   "[take_rows] row 3 is chosen at positions 0 and 2, each row may be once"});
  }
  return all;
}

std::vector<Mistake> mistakes() {
  const auto ids = [] { return Tensor::zeros({6, 4}, DType::i64); };
  const auto turned = [] { return f32({4, 6}).transpose(0, 1); };
  const std::string strides =
      " must be rows of unit stride, got shape [6, 4] with other strides: call contiguous()";
  return {
      {[=] { take_rows(ids(), of({0})); }, "[take_rows] x must be f32 or bf16, got i64"},
      {[=] { take_rows(f32({}), of({0})); }, "[take_rows] x must be [.., C], got a scalar"},
      {[=] { take_rows(turned(), of({0})); }, "[take_rows] x" + strides},
      {[=] {
         kernels::take_rows(f32({6, 4}), of({0}), f32({2, 4}));
       },
       "[take_rows] y must be [M, C] = [1, 4], got [2, 4]"},
      {[=] {
         kernels::take_rows(f32({6, 4}), of({0}), Tensor::zeros({1, 4}, DType::i64));
       },
       "[take_rows] y must be f32 or bf16, got i64"},
      {[=] {
         add_rows(f32({6, 4}), of({0}), bf16({1, 4}));
       },
       "[add_rows] y must be f32, got bf16"},
      {[=] {
         put_rows(f32({6, 4}), of({0}), f32({1, 3}));
       },
       "[put_rows] y must be [M, C] = [1, 4], got [1, 3]"},
      {[=] {
         put_rows(f32({6, 4}), of({0}), Tensor::zeros({1, 4}, DType::f32, meta));
       },
       "[put_rows] y must be on cpu, got meta"},
      {[=] {
         kernels::put_rows(f32({6, 4}), of({0}), f32({1, 4}), bf16({6, 4}));
       },
       "[put_rows] out must be f32, got bf16"},
      {[=] {
         kernels::put_rows(f32({6, 4}), of({0}), f32({1, 4}), f32({5, 4}));
       },
       "[put_rows] out must have the shape [6, 4] of x, got [5, 4]"},
      {[=] {
         kernels::put_rows(f32({6, 4}), of({0}), f32({1, 4}), turned());
       },
       "[put_rows] out" + strides},
  };
}

std::vector<Mistake> gradient_mistakes() {
  const auto ids = [] { return Tensor::zeros({6, 4}, DType::i64); };
  return {
      {[=] {
         kernels::take_rows_gradient(of({0}), f32({1, 4}), ids());
       },
       "[take_rows_gradient] dx must be f32 or bf16, got i64"},
      {[=] {
         kernels::take_rows_gradient(of({0}), Tensor::zeros({1, 4}, DType::i64), f32({6, 4}));
       },
       "[take_rows_gradient] dy must be f32 or bf16, got i64"},
      {[=] {
         kernels::take_rows_gradient(of({0}), f32({4}), f32({6, 4}));
       },
       "[take_rows_gradient] dy must be [M, C] = [1, 4], got [4]"},
      {[=] {
         kernels::put_rows_gradient(of({0}), ids(), f32({6, 4}));
       },
       "[put_rows_gradient] dout must be f32 or bf16, got i64"},
      {[=] {
         kernels::put_rows_gradient(of({0}), f32({6, 4}), ids());
       },
       "[put_rows_gradient] dx must be f32 or bf16, got i64"},
      {[=] {
         kernels::put_rows_gradient(of({0}), f32({6, 4}), f32({4, 6}));
       },
       "[put_rows_gradient] dx must have the shape [6, 4] of dout, got [4, 6]"},
      {[=] {
         kernels::put_rows_gradient(of({6}), f32({6, 4}), f32({6, 4}), true);
       },
       "[put_rows_gradient] row number at position 0 must be in [0, 6), got 6"},
  };
}

}  // namespace

std::vector<OpCase> rows_cases() {
  std::vector<OpCase> cases;
  for (const Kind kind : {Kind::take, Kind::add, Kind::put}) {
    cases.push_back(row(kind, "odd", {2, 3, 17}, {1, 2, 5}));
    cases.push_back(row(kind, "any_order", {7, 64}, {6, 0, 3, 2}));
    cases.push_back(row(kind, "all", {5, 9}, {4, 3, 2, 1, 0}));
    cases.push_back(row(kind, "none", {3, 24}, {}));
    cases.push_back(row(kind, "many", {300, 40}, every(3, 300)));
    cases.push_back(row(kind, "wide", {3, 17000}, {2, 0}));
    cases.push_back(row(kind, "vector", {9}, {0}));
    cases.push_back(row(kind, "no_rows", {0, 8}, {}));
    cases.push_back(row(kind, "no_columns", {3, 0}, {1}));
    OpCase large = row(kind, "benchmark", {2048, 4096}, every(2, 2048));
    large.benchmark = true;
    large.test = false;
    cases.push_back(std::move(large));
  }
  cases[0].mistakes = number_mistakes();
  cases[1].mistakes = mistakes();
  cases[2].mistakes = gradient_mistakes();
  return cases;
}

}  // namespace reprise::testing

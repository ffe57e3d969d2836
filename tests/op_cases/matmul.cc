// Rows of the matrix products.
#include "autograd/matmul.h"

#include <utility>

#include "tests/op_case.h"

namespace reprise::testing {
namespace {

// C [m, n] = op(A) op(B) + bias.
Array product(const Array& a, const Array& b, bool transpose_a, bool transpose_b, const Array* bias,
              const Shape& shape) {
  Array c(shape);
  const std::int64_t m = shape.rows(), n = shape.back();
  const std::int64_t k = transpose_a ? a.shape.rows() : a.shape.back();
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = bias == nullptr ? 0 : (*bias)[j];
      for (std::int64_t l = 0; l < k; ++l) {
        sum += a[transpose_a ? l * m + i : i * k + l] * b[transpose_b ? j * k + l : l * n + j];
      }
      c[i * n + j] = sum;
    }
  }
  return c;
}

OpCase linear_row(const std::string& size, const Shape& x, std::int64_t out, bool in_out,
                  bool bias) {
  const std::int64_t in = x.back();
  OpCase op;
  op.name = std::string("linear") + (in_out ? "_in_out" : "") + (bias ? "_bias/" : "/") + size;
  op.inputs = {{.name = "x", .shape = x, .strided = true, .values = {}},
               {.name = "weight",
                .shape = in_out ? Shape{in, out} : Shape{out, in},
                .strided = true,
                .parameter = true,
                .values = {}}};
  if (bias) {
    op.inputs.push_back({.name = "bias", .shape = {out}, .parameter = true, .values = {}});
  }
  op.run = [=](const std::vector<Variable>& v) {
    return std::vector<Variable>{linear(v[0], v[1], bias ? v[2] : Variable(), in_out)};
  };
  op.oracle = [=](const std::vector<Array>& v) {
    return std::vector<Array>{
        product(v[0], v[1], false, !in_out, bias ? &v[2] : nullptr, x.with(x.rank() - 1, out))};
  };
  op.cuda = true;
  op.forward_flops = 2 * x.numel() * out;
  op.backward_flops = 2 * op.forward_flops;
  return op;
}

OpCase matmul_row(const std::string& size, const Shape& a, const Shape& b, ProductOptions o) {
  OpCase op;
  op.name =
      std::string("matmul") + (o.transpose_a ? "_ta" : "") + (o.transpose_b ? "_tb/" : "/") + size;
  op.inputs = {{.name = "a", .shape = a, .strided = true, .values = {}},
               {.name = "b", .shape = b, .strided = true, .values = {}}};
  op.run = [=](const std::vector<Variable>& v) {
    return std::vector<Variable>{matmul(v[0], v[1], o)};
  };
  op.oracle = [=](const std::vector<Array>& v) {
    const std::int64_t n = b[o.transpose_b ? 0 : 1];
    return std::vector<Array>{product(v[0], v[1], o.transpose_a, o.transpose_b, nullptr,
                                      o.transpose_a ? Shape{a[1], n} : a.with(a.rank() - 1, n))};
  };
  op.cuda = true;
  op.forward_flops = 2 * a.numel() * b[o.transpose_b ? 0 : 1];
  op.backward_flops = 2 * op.forward_flops;
  return op;
}

std::vector<Mistake> linear_mistakes() {
  const auto f32 = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32); };
  return {
      {[=] {
         linear(f32({}), f32({4, 3}));
       },
       "[linear] x must be [.., I], got a scalar"},
      {[=] {
         linear(f32({2, 3}), f32({3, 4}));
       },
       "[linear] weight must be [O, I] with I = 3, got [3, 4]"},
      {[=] {
         linear(f32({2, 3}), f32({4, 3}), {}, true);
       },
       "[linear] weight must be [I, O] with I = 3, got [4, 3]"},
      {[=] {
         linear(f32({2, 3}), f32({3}));
       },
       "[linear] weight must be [O, I] with I = 3, got [3]"},
      {[=] {
         linear(f32({2, 3}), Tensor::zeros({4, 3}, DType::bf16));
       },
       "[linear] weight must be f32, got bf16"},
      {[=] {
         linear(f32({2, 3}), f32({4, 3}), f32({3}));
       },
       "[linear] bias must be [O] = [4], got [3]"},
  };
}

std::vector<Mistake> matmul_mistakes() {
  const auto f32 = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32); };
  return {
      {[=] {
         matmul(f32({2, 3}), f32({4, 3}));
       },
       "[matmul] b must have K = 3 as a [2, 3] has, got [4, 3]"},
      {[=] {
         matmul(f32({2, 3}), f32({1, 4, 3}));
       },
       "[matmul] a must be [.., K] and b a matrix, got [2, 3] and [1, 4, 3]"},
      {[=] {
         matmul(f32({1, 2, 3}), f32({2, 3}), {.transpose_a = true});
       },
       "[matmul] a must be a matrix and b a matrix, got [1, 2, 3] and [2, 3]"},
      {[=] {
         matmul(f32({2, 3}), Tensor::zeros({3, 3}, DType::i64));
       },
       "[matmul] b must be f32 or bf16, got i64"},
  };
}

// The products of GPT-2 124M at 2048 tokens.
std::vector<OpCase> benchmarks() {
  std::vector<OpCase> rows;
  for (const auto& [name, in, out] : {std::tuple{"c_attn", 768, 2304},
                                      {"c_proj", 768, 768},
                                      {"fc", 768, 3072},
                                      {"proj", 3072, 768}}) {
    rows.push_back(linear_row(name, {4, 512, in}, out, true, true));
  }
  rows.push_back(linear_row("head", {512, 768}, 50257, false, false));
  for (OpCase& op : rows) {
    op.name += "_gpt2";
    op.benchmark = true;
    op.test = false;
  }
  return rows;
}

}  // namespace

std::vector<OpCase> matmul_cases() {
  std::vector<OpCase> rows;
  for (const bool in_out : {false, true}) {
    for (const bool bias : {false, true}) {
      rows.push_back(linear_row("2x3x5to7", {2, 3, 5}, 7, in_out, bias));
      rows.push_back(linear_row("one", {1}, 1, in_out, bias));
    }
    rows.push_back(linear_row("rows70x33to130", {70, 33}, 130, in_out, true));
    rows.push_back(linear_row("empty_rows", {2, 0, 5}, 7, in_out, true));
    rows.push_back(linear_row("empty_in", {2, 0}, 7, in_out, true));
    rows.push_back(linear_row("empty_out", {2, 5}, 0, in_out, true));
  }
  rows.front().mistakes = linear_mistakes();
  const std::size_t first = rows.size();
  for (const bool tb : {false, true}) {
    rows.push_back(matmul_row("4x5x6", {4, 5}, tb ? Shape{6, 5} : Shape{5, 6}, {false, tb}));
    rows.push_back(matmul_row("5x4x6", {5, 4}, tb ? Shape{6, 5} : Shape{5, 6}, {true, tb}));
    rows.push_back(matmul_row("2x3x5x6", {2, 3, 5}, tb ? Shape{6, 5} : Shape{5, 6}, {false, tb}));
  }
  rows[first].mistakes = matmul_mistakes();
  for (OpCase& op : benchmarks()) {
    rows.push_back(std::move(op));
  }
  return rows;
}

}  // namespace reprise::testing

// Rows of the elementwise and activation families.
#include "autograd/elementwise.h"

#include <cmath>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "kernels/accumulate.h"
#include "kernels/activation.h"
#include "kernels/elementwise.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

using Scalar = std::function<double(double)>;

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double exact_silu(double x) {
  return x * sigmoid(x);
}
double exact_gelu(double x) {
  return x * std::erfc(-x / std::numbers::sqrt2) / 2;
}
double exact_gelu_tanh(double x) {
  return x / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
}
double exact_quick_gelu(double x) {
  return x * sigmoid(1.702 * x);
}

using Unary = std::function<Variable(Variable)>;
using Binary = std::function<Variable(Variable, Variable)>;

OpCase unary(const std::string& name, const Shape& shape, Unary op_of, Scalar exact) {
  OpCase op;
  op.cuda = true;
  op.name = name;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}}};
  op.run = [op_of = std::move(op_of)](const std::vector<Variable>& in) {
    return std::vector<Variable>{op_of(in[0])};
  };
  op.oracle = [exact = std::move(exact)](const std::vector<Array>& in) {
    Array y(in[0].shape);
    for (std::size_t i = 0; i < y.at.size(); ++i) {
      y.at[i] = exact(in[0].at[i]);
    }
    return std::vector<Array>{y};
  };
  return op;
}

OpCase binary(const std::string& name, const Shape& shape, Binary op_of,
              std::function<double(double, double)> exact) {
  OpCase op;
  op.cuda = true;
  op.name = name;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}},
               {.name = "r", .shape = shape, .strided = true, .values = {}}};
  op.run = [op_of = std::move(op_of)](const std::vector<Variable>& in) {
    return std::vector<Variable>{op_of(in[0], in[1])};
  };
  op.oracle = [exact = std::move(exact)](const std::vector<Array>& in) {
    Array y(in[0].shape);
    for (std::size_t i = 0; i < y.at.size(); ++i) {
      y.at[i] = exact(in[0].at[i], in[1].at[i]);
    }
    return std::vector<Array>{y};
  };
  return op;
}

OpCase bias(const std::string& size, const Shape& shape) {
  OpCase op;
  op.cuda = true;
  op.name = "add_bias/" + size;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}},
               {.name = "bias", .shape = {shape.back()}, .parameter = true, .values = {}}};
  op.run = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{add_bias(in[0], in[1])};
  };
  op.oracle = [](const std::vector<Array>& in) {
    Array y = in[0];
    for (std::size_t i = 0; i < y.at.size(); ++i) {
      y.at[i] += in[1].at[i % in[1].at.size()];
    }
    return std::vector<Array>{y};
  };
  return op;
}

// Weights of the loss are rounded as the output is, those of the differences as the input: hence
// the tolerance of a cast to bf16.
OpCase cast_row(const std::string& size, const Shape& shape, DType from, DType to) {
  OpCase op = unary(
      "cast_to_" + std::string(name(to)) + "/" + size, shape,
      [to](Variable x) { return cast(std::move(x), to); }, [](double x) { return x; });
  op.dtypes = {from};
  op.tolerance = to == DType::bf16 ? 500 : 1;
  return op;
}

OpCase fused_gate(const std::string& size, const Shape& shape) {
  OpCase op;
  op.cuda = true;
  op.name = "gated_silu_fused/" + size;
  op.inputs = {{.name = "gate_up", .shape = shape, .strided = true, .values = {}}};
  op.run = [](const std::vector<Variable>& in) { return std::vector<Variable>{gated_silu(in[0])}; };
  op.oracle = [](const std::vector<Array>& in) {
    const std::int64_t width = in[0].shape.back() / 2;
    Array y(in[0].shape.with(in[0].shape.rank() - 1, width));
    for (std::int64_t i = 0; i < y.shape.numel(); ++i) {
      const std::int64_t gate = i / width * 2 * width + i % width;
      y[i] = exact_silu(in[0][gate]) * in[0][gate + width];
    }
    return std::vector<Array>{y};
  };
  return op;
}

Tensor f32(const Shape& shape) {
  return Tensor::zeros(shape, DType::f32);
}
Tensor bf16(const Shape& shape) {
  return Tensor::zeros(shape, DType::bf16);
}
Tensor ids() {
  return Tensor::zeros({2, 3}, DType::i64);
}
Tensor turned() {
  return f32({3, 2}).transpose(0, 1);
}
constexpr const char* kTurned =
    " must be rows of unit stride, got shape [2, 3] with other strides: call contiguous()";

std::vector<Mistake> add_mistakes() {
  return {
      {[] { add(ids(), ids()); }, "[add] x must be f32, bf16 or f64, got i64"},
      {[] {
         add(f32({2, 3}), bf16({2, 3}));
       },
       "[add] r must be f32, got bf16"},
      {[] { kernels::add(f32({2}), f32({2}), bf16({2})); }, "[add] y must be f32, got bf16"},
      {[] {
         add(f32({2, 3}), f32({3, 2}));
       },
       "[add] r must have the shape [2, 3] of x, got [3, 2]"},
      {[] { kernels::add(f32({2}), f32({2}), f32({3})); },
       "[add] y must have the shape [2] of x, got [3]"},
      {[] {
         add(f32({2, 3}), turned());
       },
       std::string("[add] r") + kTurned},
      {[] { add(f32({2}), Tensor::zeros({2}, DType::f32, meta)); },
       "[add] r must be on cpu, got meta"},
  };
}

std::vector<Mistake> product_mistakes() {
  return {
      {[] { mul(ids(), ids()); }, "[mul] x must be f32 or bf16, got i64"},
      {[] {
         mul(f32({2, 3}), bf16({2, 3}));
       },
       "[mul] r must be f32, got bf16"},
      {[] {
         mul(f32({2, 3}), f32({2, 4}));
       },
       "[mul] r must have the shape [2, 3] of x, got [2, 4]"},
      {[] {
         kernels::mul(f32({2, 3}), f32({2, 3}), ids());
       },
       "[mul] y must be f32 or bf16, got i64"},
      {[] {
         kernels::mul(f32({2, 3}), f32({2, 3}), f32({6}));
       },
       "[mul] y must have the shape [2, 3] of x, got [6]"},
      {[] {
         mul(turned(), f32({2, 3}));
       },
       std::string("[mul] x") + kTurned},
      {[] { scale(ids(), 2.0); }, "[scale] x must be f32 or bf16, got i64"},
      {[] {
         kernels::scale(f32({2, 3}), 2.0, ids());
       },
       "[scale] y must be f32 or bf16, got i64"},
      {[] {
         kernels::scale(f32({2, 3}), 2.0, f32({3}));
       },
       "[scale] y must have the shape [2, 3] of x, got [3]"},
      {[] { scale(turned(), 2.0); }, std::string("[scale] x") + kTurned},
  };
}

std::vector<Mistake> cast_mistakes() {
  return {
      {[] { cast(ids(), DType::f32); }, "[cast] goes from and to f32 and bf16, got i64 to f32"},
      {[] { cast(f32({2}), DType::i64); }, "[cast] goes from and to f32 and bf16, got f32 to i64"},
      {[] { cast(turned(), DType::bf16); }, std::string("[cast] x") + kTurned},
      {[] {
         kernels::cast(ids(), f32({2, 3}));
       },
       "[cast] x must be f32, bf16 or f64, got i64"},
      {[] {
         kernels::cast(f32({2, 3}), ids());
       },
       "[cast] y must be f32, bf16 or f64, got i64"},
      {[] { kernels::cast(f32({2}), bf16({3})); },
       "[cast] y must have the shape [2] of x, got [3]"},
  };
}

std::vector<Mistake> bias_mistakes() {
  return {
      {[] {
         add_bias(Tensor::zeros({2, 3}, DType::i64), f32({3}));
       },
       "[add_bias] x must be f32 or bf16, got i64"},
      {[] { add_bias(f32({}), f32({1})); }, "[add_bias] x must be [.., C], got a scalar"},
      {[] {
         add_bias(f32({2, 3}), bf16({3}));
       },
       "[add_bias] bias must be f32, got bf16"},
      {[] {
         add_bias(f32({2, 3}), f32({2}));
       },
       "[add_bias] bias must be [C] = [3], got [2]"},
      {[] {
         add_bias(f32({2, 3}), Tensor::zeros({3}, DType::f32, meta));
       },
       "[add_bias] bias must be on cpu, got meta"},
      {[] {
         add_bias(f32({2, 3}), f32({6}).as_view({3}, {2}, 0));
       },
       "[add_bias] bias must be contiguous, got shape [3] with other strides: call contiguous()"},
      {[] { add_bias(turned(), f32({3})); }, std::string("[add_bias] x") + kTurned},
      {[] {
         kernels::add_bias(f32({2, 3}), f32({3}), f32({3}));
       },
       "[add_bias] y must have the shape [2, 3] of x, got [3]"},
      {[] { kernels::bias_gradient(f32({}), f32({1}), false); },
       "[add_bias] dy must be [.., C], got a scalar"},
      {[] {
         kernels::bias_gradient(f32({2, 3}), f32({2}), false);
       },
       "[add_bias] dbias must be [C] = [3], got [2]"},
      {[] {
         kernels::bias_gradient(f32({2, 3}), Tensor::zeros({3}, DType::i64), false);
       },
       "[add_bias] dbias must be f32 or bf16, got i64"},
      {[] {
         kernels::bias_gradient(Tensor::zeros({2, 3}, DType::i64), f32({3}), false);
       },
       "[add_bias] dy must be f32 or bf16, got i64"},
  };
}

std::vector<Mistake> activation_mistakes() {
  using kernels::Activation;
  return {
      {[] { silu(Tensor::zeros({2}, DType::i64)); }, "[silu] x must be f32 or bf16, got i64"},
      {[] { gelu(turned()); }, std::string("[gelu] x") + kTurned},
      {[] { kernels::activation(Activation::gelu_tanh, f32({2}), bf16({2})); },
       "[gelu_tanh] y must be f32, got bf16"},
      {[] { kernels::activation(Activation::quick_gelu, f32({2}), f32({3})); },
       "[quick_gelu] y must have the shape [2] of x, got [3]"},
      {[] { kernels::activation_backward(Activation::gelu, f32({2}), bf16({2}), f32({2}), false); },
       "[gelu] dy must be f32, got bf16"},
      {[] { kernels::activation_backward(Activation::gelu, f32({2}), f32({3}), f32({2}), false); },
       "[gelu] dy must have the shape [2] of x, got [3]"},
      {[] { kernels::activation_backward(Activation::gelu, f32({2}), f32({2}), f32({3}), false); },
       "[gelu] dx must have the shape [2] of x, got [3]"},
  };
}

std::vector<Mistake> gated_mistakes() {
  return {
      {[] {
         gated_silu(f32({2, 3}), bf16({2, 3}));
       },
       "[gated_silu] up must be f32, got bf16"},
      {[] {
         gated_silu(f32({2, 3}), f32({2, 4}));
       },
       "[gated_silu] up must have the shape [2, 3] of gate, got [2, 4]"},
      {[] {
         gated_silu(turned(), f32({2, 3}));
       },
       std::string("[gated_silu] gate") + kTurned},
      {[] {
         gated_silu(f32({2, 3}));
       },
       "[gated_silu] gate_up must be [.., 2F], got [2, 3]"},
      {[] { gated_silu(f32({})); }, "[gated_silu] gate_up must be [.., 2F], got []"},
      {[] {
         kernels::gated_silu_backward(f32({2}), f32({2}), f32({2}), f32({3}), false, {}, false);
       },
       "[gated_silu] dgate must have the shape [2] of gate, got [3]"},
      {[] {
         kernels::gated_silu_backward(f32({2}), f32({2}), f32({2}), {}, false, f32({3}), false);
       },
       "[gated_silu] dup must have the shape [2] of gate, got [3]"},
      {[] { kernels::gated_silu_backward(f32({2}), f32({2}), bf16({2}), {}, false, {}, false); },
       "[gated_silu] dy must be f32, got bf16"},
  };
}

// Sizes that end inside of a vector, span blocks and pieces, and are empty.
const std::vector<std::pair<std::string, Shape>>& sizes() {
  static const std::vector<std::pair<std::string, Shape>> all = {
      {"odd", {2, 3, 17}}, {"block", {3, 1040}}, {"pieces", {16403}},    {"narrow", {5, 1}},
      {"vector", {9}},     {"no_rows", {0, 8}},  {"no_columns", {3, 0}},
  };
  return all;
}

double sum_of(double x, double r) {
  return x + r;
}
double product_of(double x, double r) {
  return x * r;
}
double gated(double gate, double up) {
  return exact_silu(gate) * up;
}

void add_rows(std::vector<OpCase>& cases, const std::string& size, const Shape& shape) {
  cases.push_back(binary("add/" + size, shape, add, sum_of));
  cases.push_back(binary("mul/" + size, shape, mul, product_of));
  cases.push_back(binary(
      "gated_silu/" + size, shape, [](Variable g, Variable u) { return gated_silu(g, u); }, gated));
  cases.push_back(bias(size, shape));
  cases.push_back(unary(
      "scale/" + size, shape, [](Variable x) { return scale(std::move(x), -1.5); },
      [](double x) { return -1.5 * x; }));
  cases.push_back(unary("silu/" + size, shape, silu, exact_silu));
  cases.push_back(unary("gelu/" + size, shape, gelu, exact_gelu));
  cases.push_back(unary("gelu_tanh/" + size, shape, gelu_tanh, exact_gelu_tanh));
  cases.push_back(unary("quick_gelu/" + size, shape, quick_gelu, exact_quick_gelu));
  cases.push_back(unary(
      "exp/" + size, shape, [](Variable x) { return exp(std::move(x)); },
      [](double x) { return std::exp(x); }));
  cases.push_back(cast_row(size, shape, DType::f32, DType::bf16));
  cases.push_back(cast_row(size, shape, DType::bf16, DType::f32));
}

}  // namespace

std::vector<OpCase> elementwise_cases() {
  std::vector<OpCase> cases;
  for (const auto& [size, shape] : sizes()) {
    add_rows(cases, size, shape);
  }
  cases[0].mistakes = add_mistakes();
  cases[1].mistakes = product_mistakes();
  cases[2].mistakes = gated_mistakes();
  cases[3].mistakes = bias_mistakes();
  cases[5].mistakes = activation_mistakes();
  cases[10].mistakes = cast_mistakes();
  cases.push_back(fused_gate("odd", {2, 3, 34}));
  cases.push_back(fused_gate("block", {3, 2060}));
  cases.push_back(fused_gate("no_rows", {0, 8}));
  // The same Variable twice: both gradients go to one place.
  cases.push_back(unary(
      "mul/square", {3, 17}, [](Variable x) { return mul(x, x); }, [](double x) { return x * x; }));
  cases.push_back(unary(
      "add/double", {3, 17}, [](Variable x) { return add(x, x); }, [](double x) { return 2 * x; }));
  const std::size_t tests = cases.size();
  add_rows(cases, "benchmark", {2048, 3072});
  for (std::size_t i = tests; i < cases.size(); ++i) {
    cases[i].benchmark = true;
    cases[i].test = false;
  }
  return cases;
}

}  // namespace reprise::testing

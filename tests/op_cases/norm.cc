// Rows of the norm family.
#include "autograd/norm.h"

#include <cmath>
#include <utility>

#include "kernels/norm.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

constexpr double kEpsilon = 1e-5;

enum class Kind : std::uint8_t { rms, layer, layer_without_bias };

// y, and of the residual form the sum.
std::vector<Array> oracle(Kind kind, bool residual, const std::vector<Array>& inputs) {
  Array sum = inputs[0];
  if (residual) {
    for (std::size_t i = 0; i < sum.at.size(); ++i) {
      sum.at[i] += inputs[1].at[i];
    }
  }
  const Array& weight = inputs[residual ? 2 : 1];
  const std::int64_t width = weight.shape[0];
  Array y(sum.shape);
  for (std::int64_t row = 0; width > 0 && row < sum.shape.rows(); ++row) {
    const double* x = &sum.at[static_cast<std::size_t>(row * width)];
    double mean = 0, square = 0;
    for (std::int64_t c = 0; kind != Kind::rms && c < width; ++c) {
      mean += x[c] / static_cast<double>(width);
    }
    for (std::int64_t c = 0; c < width; ++c) {
      square += (x[c] - mean) * (x[c] - mean) / static_cast<double>(width);
    }
    for (std::int64_t c = 0; c < width; ++c) {
      y[row * width + c] = (x[c] - mean) / std::sqrt(square + kEpsilon) * weight[c] +
                           (kind == Kind::layer ? inputs.back()[c] : 0.0);
    }
  }
  return residual ? std::vector<Array>{y, sum} : std::vector<Array>{y};
}

std::vector<Variable> run(Kind kind, bool residual, const std::vector<Variable>& in) {
  const Variable& weight = in[residual ? 2 : 1];
  const Variable bias = kind == Kind::layer ? in.back() : Variable();
  if (!residual) {
    return {kind == Kind::rms ? rms_norm(in[0], weight, kEpsilon)
                              : layer_norm(in[0], weight, bias, kEpsilon)};
  }
  auto [y, sum] = kind == Kind::rms ? rms_norm_residual(in[0], in[1], weight, kEpsilon)
                                    : layer_norm_residual(in[0], in[1], weight, bias, kEpsilon);
  return {std::move(y), std::move(sum)};
}

OpCase row(Kind kind, bool residual, const std::string& size, const Shape& shape) {
  OpCase op;
  op.name = std::string(kind == Kind::rms     ? "rms_norm"
                        : kind == Kind::layer ? "layer_norm"
                                              : "layer_norm_without_bias") +
            (residual ? "_residual/" : "/") + size;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}}};
  if (residual) {
    op.inputs.push_back({.name = "residual", .shape = shape, .strided = true, .values = {}});
  }
  op.inputs.push_back({.name = "weight", .shape = {shape.back()}, .parameter = true, .values = {}});
  if (kind == Kind::layer) {
    op.inputs.push_back({.name = "bias", .shape = {shape.back()}, .parameter = true, .values = {}});
  }
  op.run = [=](const std::vector<Variable>& in) { return run(kind, residual, in); };
  op.oracle = [=](const std::vector<Array>& in) { return oracle(kind, residual, in); };
  op.cuda = true;
  // An element: square, sum, two factors; of layer_norm also the mean, its difference and the bias.
  op.forward_flops = shape.numel() * ((kind == Kind::rms ? 4 : 7) + (residual ? 1 : 0));
  op.backward_flops = 2 * op.forward_flops;
  return op;
}

Tensor f32(const Shape& shape) {
  return Tensor::zeros(shape, DType::f32);
}

std::vector<Mistake> rms_norm_mistakes() {
  return {
      {[] {
         rms_norm(f32({2, 8}), f32({7}), kEpsilon);
       },
       "[rms_norm] weight must be [C] = [8], got [7]"},
      {[] {
         rms_norm(f32({2, 8}), Tensor::zeros({8}, DType::bf16), kEpsilon);
       },
       "[rms_norm] weight must be f32, got bf16"},
      {[] {
         rms_norm(Tensor::zeros({2, 8}, DType::i64), f32({8}), kEpsilon);
       },
       "[rms_norm] x must be f32 or bf16, got i64"},
      {[] { rms_norm(f32({}), f32({1}), kEpsilon); }, "[rms_norm] x must be [.., C], got a scalar"},
      {[] {
         rms_norm(f32({2, 8}), f32({8}), -1.0);
       },
       "[rms_norm] epsilon must not be negative, got -1"},
      {[] {
         rms_norm(f32({8, 2}).transpose(0, 1), f32({8}), kEpsilon);
       },
       "[rms_norm] x must be rows of unit stride, got shape [2, 8] with other strides: call "
       "contiguous()"},
      {[] {
         rms_norm(f32({2, 8}), f32({8, 2}).slice(1, 0, 1).as_view({8}, {2}, 0), kEpsilon);
       },
       "[rms_norm] weight must be contiguous, got shape [8] with other strides: call contiguous()"},
      {[] {
         rms_norm(f32({2, 8}), Tensor::zeros({8}, DType::f32, meta), kEpsilon);
       },
       "[rms_norm] weight must be on cpu, got meta"},
  };
}

std::vector<Mistake> residual_mistakes() {
  return {
      {[] {
         rms_norm_residual(f32({2, 8}), f32({3, 8}), f32({8}), kEpsilon);
       },
       "[rms_norm_residual] residual must be [.., C] = [2, 8], got [3, 8]"},
      {[] {
         layer_norm_residual(f32({2, 8}), f32({2, 8}), f32({8}), f32({9}), kEpsilon);
       },
       "[layer_norm_residual] bias must be [C] = [8], got [9]"},
  };
}

std::vector<Mistake> layer_norm_mistakes() {
  return {
      {[] {
         layer_norm(f32({2, 8}), f32({8}), f32({9}), kEpsilon);
       },
       "[layer_norm] bias must be [C] = [8], got [9]"},
      {[] {
         kernels::layer_norm(f32({2, 8}), f32({8}), {}, kEpsilon, f32({2, 8}), f32({3}), f32({2}));
       },
       "[layer_norm] mean must be [..] = [2], got [3]"},
      {[] {
         kernels::layer_norm(f32({2, 8}), f32({8}), {}, kEpsilon, f32({2, 7}), f32({2}), f32({2}));
       },
       "[layer_norm] y must be [.., C] = [2, 8], got [2, 7]"},
  };
}

std::vector<Mistake> backward_mistakes() {
  return {
      {[] {
         kernels::rms_norm_backward(f32({2, 8}), {}, f32({2, 7}), f32({8}), f32({2}),
                                    {{f32({2, 8})}, {}, {}});
       },
       "[rms_norm_backward] x must be [.., C] = [2, 8], got [2, 7]"},
      {[] {
         kernels::rms_norm_backward(f32({2, 8}), {}, f32({2, 8}), f32({8}), f32({2}),
                                    {{}, {Tensor::zeros({8}, DType::bf16)}, {}});
       },
       "[rms_norm_backward] dweight must be f32, got bf16"},
      {[] {
         kernels::layer_norm_backward(f32({2, 8}), f32({2, 9}), f32({2, 8}), f32({8}), f32({2}),
                                      f32({2}), {{f32({2, 8})}, {}, {}});
       },
       "[layer_norm_backward] dsum must be [.., C] = [2, 8], got [2, 9]"},
      {[] {
         kernels::layer_norm_backward(f32({2, 8}), {}, f32({2, 8}), f32({8}), f32({2}), f32({2}),
                                      {{}, {}, {f32({4})}});
       },
       "[layer_norm_backward] dbias must be [C] = [8], got [4]"},
  };
}

}  // namespace

std::vector<OpCase> norm_cases() {
  std::vector<OpCase> cases;
  for (const Kind kind : {Kind::rms, Kind::layer, Kind::layer_without_bias}) {
    for (const bool residual : {false, true}) {
      cases.push_back(row(kind, residual, "odd", {2, 3, 17}));
      cases.push_back(row(kind, residual, "even", {5, 64}));
      cases.push_back(row(kind, residual, "several_chunks", {35, 24}));
      cases.push_back(row(kind, residual, "wide", {2, 1100}));
      if (kind != Kind::layer_without_bias) {
        cases.push_back(row(kind, residual, "wider_than_registers", {2, 8200}));
      }
      cases.push_back(row(kind, residual, "narrow", {3, 1}));
      cases.back().tolerance = 2;  // the gradient of x is what is left of a difference
      cases.push_back(row(kind, residual, "vector", {9}));
      cases.push_back(row(kind, residual, "no_rows", {0, 8}));
      cases.push_back(row(kind, residual, "no_columns", {3, 0}));
      OpCase large = row(kind, residual, "benchmark", {2048, 768});
      large.benchmark = true;
      large.test = false;
      cases.push_back(std::move(large));
    }
  }
  cases[0].mistakes = rms_norm_mistakes();
  cases[1].mistakes = residual_mistakes();
  cases[2].mistakes = layer_norm_mistakes();
  cases[3].mistakes = backward_mistakes();
  return cases;
}

}  // namespace reprise::testing

// Rows of the dropout family.
#include "autograd/dropout.h"

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/dropout.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

constexpr std::uint64_t kSeed = 0x9876543210fedcba, kOffset = 0xfffffffe;  // carries

OpCase row(const std::string& name, const Shape& shape, double p) {
  OpCase op;
  // Without dropping the result is x itself, which cannot be copied from a device when strided.
  op.cuda = p > 0;
  op.name = "dropout/" + name;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}}};
  op.run = [p](const std::vector<Variable>& in) {
    Generator generator{kSeed, kOffset};
    return std::vector<Variable>{dropout(in[0], p, generator)};
  };
  op.oracle = [p](const std::vector<Array>& in) {
    Array y = in[0];
    for (std::size_t i = 0; i < y.at.size(); ++i) {
      const bool keep = uniform(philox(kSeed, kOffset + i / 4)[i % 4]) >= p;
      y.at[i] = keep ? y.at[i] / (1 - p) : 0;
    }
    return std::vector<Array>{y};
  };
  return op;
}

std::vector<Mistake> mistakes() {
  const auto x = [] { return Tensor::zeros({2, 3}, DType::f32); };
  const auto drop = [=](double p) {
    Generator generator;
    dropout(x(), p, generator);
  };
  return {
      {[=] { drop(1.0); }, "[dropout] p must be in [0, 1), got 1"},
      {[=] { drop(-0.5); }, "[dropout] p must be in [0, 1), got -0.5"},
      {[=] { drop(std::numeric_limits<double>::quiet_NaN()); },
       "[dropout] p must be in [0, 1), got nan"},
      {[=] { kernels::dropout(x(), 1.5, 0, 0, x()); }, "[dropout] p must be in [0, 1), got 1.5"},
      {[=] {
         Generator generator;
         dropout(Tensor::zeros({2}, DType::i64), 0.5, generator);
       },
       "[dropout] x must be f32 or bf16, got i64"},
      {[=] {
         kernels::dropout(x(), 0.5, 0, 0, Tensor::zeros({2, 3}, DType::i64));
       },
       "[dropout] y must be f32 or bf16, got i64"},
      {[=] {
         kernels::dropout(x(), 0.5, 0, 0, Tensor::zeros({2, 4}, DType::f32));
       },
       "[dropout] y must have the shape [2, 3] of x, got [2, 4]"},
      {[=] {
         Generator generator;
         dropout(Tensor::zeros({3, 2}, DType::f32).transpose(0, 1), 0.5, generator);
       },
       "[dropout] x must be rows of unit stride, got shape [2, 3] with other strides: call "
       "contiguous()"},
  };
}

}  // namespace

std::vector<OpCase> dropout_cases() {
  std::vector<OpCase> cases = {
      row("odd", {2, 3, 17}, 0.25),       row("block", {3, 1041}, 0.5),
      row("pieces", {16403}, 0.1),        row("nothing_dropped", {5, 4}, 0.0),
      row("nearly_all", {7, 11}, 0.9375), row("no_rows", {0, 8}, 0.5),
  };
  cases[0].mistakes = mistakes();
  OpCase large = row("benchmark", {2048, 768}, 0.1);
  large.benchmark = true;
  large.test = false;
  cases.push_back(std::move(large));
  return cases;
}

}  // namespace reprise::testing

// Rows of the families cross_entropy, linear_cross_entropy and reduce.
#include <cmath>
#include <utility>

#include "autograd/cross_entropy.h"
#include "autograd/linear_cross_entropy.h"
#include "autograd/reduce.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

constexpr std::int64_t kIgnored = -100;

// The loss of logits [N, V], all in double.
Array cross_entropy_oracle(const Array& x, const Array& labels, double items) {
  const std::int64_t words = x.shape.back();
  double total = 0, valid = 0;
  for (std::int64_t n = 0; n < labels.shape.numel(); ++n) {
    const auto label = static_cast<std::int64_t>(labels[n]);
    if (label == kIgnored) {
      continue;
    }
    double sum = 0;
    for (std::int64_t v = 0; v < words; ++v) {
      sum += std::exp(x[n * words + v]);
    }
    total += std::log(sum) - x[n * words + label];
    valid += 1;
  }
  Array loss(Shape{});
  loss[0] = total / (items > 0 ? items : valid);
  return loss;
}

Argument labels_argument(const Shape& shape, std::int64_t words) {
  Argument labels{.name = "labels",
                  .shape = shape,
                  .fill = Fill::indices,
                  .limit = words,
                  .gradient = false,
                  .values = {}};
  for (std::int64_t n = 0; n < shape.numel(); ++n) {
    labels.values.push_back(n % 4 == 1 ? kIgnored : n * 7 % words);
  }
  return labels;
}

OpCase cross_entropy_row(const std::string& name, const Shape& shape, double items) {
  OpCase op;
  op.cuda = true;
  op.name = "cross_entropy/" + name;
  const Shape rows(shape.sizes().first(static_cast<std::size_t>(shape.rank() - 1)));
  op.inputs = {{.name = "logits", .shape = shape, .strided = true, .values = {}},
               labels_argument(rows, shape.back())};
  op.run = [items](const std::vector<Variable>& in) {
    return std::vector<Variable>{cross_entropy(in[0], in[1].tensor(), items)};
  };
  op.oracle = [items](const std::vector<Array>& in) {
    return std::vector<Array>{cross_entropy_oracle(in[0], in[1], items)};
  };
  op.forward_flops = 4 * shape.numel();
  op.backward_flops = 3 * shape.numel();
  return op;
}

OpCase linear_row(const std::string& name, std::int64_t tokens, std::int64_t width,
                  std::int64_t words, double items) {
  OpCase op;
  op.name = "linear_cross_entropy/" + name;
  op.cuda = true;
  op.inputs = {{.name = "x", .shape = {tokens, width}, .values = {}},
               {.name = "w", .shape = {words, width}, .parameter = true, .values = {}},
               labels_argument({tokens}, words)};
  op.run = [items](const std::vector<Variable>& in) {
    return std::vector<Variable>{linear_cross_entropy(in[0], in[1], in[2].tensor(), items)};
  };
  op.oracle = [items](const std::vector<Array>& in) {
    const std::int64_t rows = in[0].shape[0], columns = in[0].shape[1], n_words = in[1].shape[0];
    Array logits(Shape{rows, n_words});
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t v = 0; v < n_words; ++v) {
        for (std::int64_t c = 0; c < columns; ++c) {
          logits[n * n_words + v] += in[0][n * columns + c] * in[1][v * columns + c];
        }
      }
    }
    return std::vector<Array>{cross_entropy_oracle(logits, in[2], items)};
  };
  // The logits and both gradients are formed in forward.
  op.forward_flops = 3 * 2 * tokens * width * words;
  op.backward_flops = 0;
  // Logits are held in bf16, and so is their gradient.
  op.tolerance = 1.5;
  return op;
}

enum class Reduction : std::uint8_t { sum, mean, mean_square };

OpCase reduce_row(Reduction kind, const std::string& name, const Shape& shape) {
  OpCase op;
  op.cuda = true;
  op.name = std::string(kind == Reduction::sum    ? "sum"
                        : kind == Reduction::mean ? "mean"
                                                  : "mean_square") +
            "/" + name;
  op.inputs = {{.name = "x", .shape = shape, .strided = shape.rank() > 0, .values = {}}};
  op.run = [kind](const std::vector<Variable>& in) {
    return std::vector<Variable>{kind == Reduction::sum    ? sum(in[0])
                                 : kind == Reduction::mean ? mean(in[0])
                                                           : mean_square(in[0])};
  };
  op.oracle = [kind](const std::vector<Array>& in) {
    Array out(Shape{});
    for (const double x : in[0].at) {
      out[0] += kind == Reduction::mean_square ? x * x : x;
    }
    if (kind != Reduction::sum) {
      out[0] /= static_cast<double>(in[0].at.size());
    }
    return std::vector<Array>{out};
  };
  return op;
}

Tensor f32(const Shape& shape) {
  return Tensor::zeros(shape, DType::f32);
}

Tensor ids(std::vector<std::int64_t> values) {
  const auto count = static_cast<std::int64_t>(values.size());
  return Tensor::from(values, Shape{count});
}

std::vector<Mistake> cross_entropy_mistakes() {
  return {
      {[] {
         cross_entropy(f32({2, 5}), ids({1, 5}));
       },
       "[cross_entropy] label of row 1 must be -100 or in [0, V) = [0, 5), got 5"},
      {[] {
         cross_entropy(f32({2, 5}), ids({1}));
       },
       "[cross_entropy] labels must be the leading sizes of x = [2], got [1]"},
      {[] {
         cross_entropy(f32({2, 5}), f32({2}));
       },
       "[cross_entropy] labels must be i64, got f32"},
      {[] { cross_entropy(f32({}), ids({1})); }, "[cross_entropy] x must be [.., V], got a scalar"},
      {[] {
         cross_entropy(f32({1, 5}), ids({1}), -2);
       },
       "[cross_entropy] items must be 0 or a positive number, got -2"},
      {[] { cross_entropy(ids({1}), ids({1})); },
       "[cross_entropy] x must be f32 or bf16, got i64"}};
}

std::vector<Mistake> linear_mistakes() {
  return {{[] {
             linear_cross_entropy(f32({2, 3}), f32({5, 4}), ids({1, 2}));
           },
           "[linear_cross_entropy] w must be [V, C] with C = 3 as x [2, 3] has, got [5, 4]"},
          {[] {
             linear_cross_entropy(f32({2, 3}), f32({5, 3}), ids({-1, 2}));
           },
           "[linear_cross_entropy] label of row 0 must be -100 or in [0, V) = [0, 5), got -1"},
          {[] {
             linear_cross_entropy(f32({2, 1, 3}), f32({5, 3}), ids({1, 2}));
           },
           "[linear_cross_entropy] x must be [N, C], got [2, 1, 3]"},
          {[] {
             linear_cross_entropy(f32({2, 3}), Tensor::zeros({5, 3}, DType::bf16), ids({1, 2}));
           },
           "[linear_cross_entropy] w must be f32, got bf16"}};
}

}  // namespace

std::vector<OpCase> losses_cases() {
  std::vector<OpCase> cases = {
      cross_entropy_row("mean", {9, 33}, 0),
      cross_entropy_row("items", {9, 33}, 5),
      cross_entropy_row("batch", {2, 3, 100}, 0),
      cross_entropy_row("one_word", {3, 1}, 0),
      cross_entropy_row("empty", {0, 7}, 2),
      linear_row("mean", 9, 12, 33, 0),
      linear_row("items", 70, 5, 17, 20),
      linear_row("one", 1, 1, 2, 0),
      linear_row("empty", 0, 3, 4, 2),
      reduce_row(Reduction::sum, "odd", {3, 5, 7}),
      reduce_row(Reduction::sum, "scalar", {}),
      reduce_row(Reduction::sum, "empty", {0, 3}),
      reduce_row(Reduction::mean, "odd", {3, 35}),
      reduce_row(Reduction::mean, "several_blocks", {7, 400}),
      reduce_row(Reduction::mean_square, "odd", {3, 35}),
      reduce_row(Reduction::mean_square, "several_blocks", {7, 400}),
  };
  cases[0].mistakes = cross_entropy_mistakes();
  cases[5].mistakes = linear_mistakes();
  cases[9].mistakes = {{[] { sum(ids({1})); }, "[sum] x must be f32 or bf16, got i64"}};
  cases[14].mistakes = {
      {[] { mean_square(ids({1})); }, "[sum_squares] x must be f32 or bf16, got i64"}};
  OpCase head = linear_row("gpt2", 512, 768, 50257, 0);
  OpCase loss = cross_entropy_row("gpt2", {512, 50257}, 0);
  OpCase all = reduce_row(Reduction::mean_square, "large", {2048, 4096});
  for (OpCase* op : {&head, &loss, &all}) {
    op->benchmark = true;
    op->test = false;
    cases.push_back(std::move(*op));
  }
  return cases;
}

}  // namespace reprise::testing

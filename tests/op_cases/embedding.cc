// Rows of the embedding family.
#include "autograd/embedding.h"

#include <string>
#include <utility>
#include <vector>

#include "kernels/embedding.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

OpCase row(const std::string& name, const Shape& ids, std::int64_t rows, std::int64_t width,
           std::vector<std::int64_t> values = {}) {
  OpCase op;
  op.cuda = true;
  op.name = "embedding/" + name;
  op.inputs = {
      {.name = "ids",
       .shape = ids,
       .fill = Fill::indices,
       .limit = rows,
       .gradient = false,
       .values = std::move(values)},
      {.name = "table", .shape = {rows, width}, .strided = true, .parameter = true, .values = {}}};
  op.run = [](const std::vector<Variable>& in) {
    return std::vector<Variable>{embedding(in[0], in[1])};
  };
  op.oracle = [](const std::vector<Array>& in) {
    std::vector<std::int64_t> sizes(in[0].shape.sizes().begin(), in[0].shape.sizes().end());
    const std::int64_t columns = in[1].shape[1];
    sizes.push_back(columns);
    Array y{Shape(std::span<const std::int64_t>(sizes))};
    for (std::int64_t i = 0; i < y.shape.numel(); ++i) {
      y[i] = in[1][static_cast<std::int64_t>(in[0][i / columns]) * columns + i % columns];
    }
    return std::vector<Array>{y};
  };
  return op;
}

std::vector<Mistake> mistakes() {
  const auto table = [] { return Tensor::zeros({5, 3}, DType::f32); };
  const auto ids = [] { return Tensor::zeros({4}, DType::i64); };
  const auto dy = [] { return Tensor::zeros({4, 3}, DType::f32); };
  const auto of = [](std::vector<std::int64_t> values) {
    const auto count = static_cast<std::int64_t>(values.size());
    return Tensor::from(values, {count});
  };
  return {
      {[=] {
         embedding(of({0, 4, 5}), table());
       },
       "[embedding] id at position 2 must be in [0, V) = [0, 5), got 5"},
      {[=] {
         embedding(of({0, -100}), table());
       },
       "[embedding] id at position 1 must be in [0, V) = [0, 5), got -100"},
      {[=] {
         embedding(Tensor::from(std::vector<std::int64_t>{7}, {1}, meta),
                   Tensor::zeros({5, 3}, DType::f32, meta));
       },
       "[embedding] id at position 0 must be in [0, V) = [0, 5), got 7"},
      {[=] { embedding(dy(), table()); }, "[embedding] ids must be i64, got f32"},
      {[=] {
         embedding(Tensor::zeros({3, 2}, DType::i64).transpose(0, 1), table());
       },
       "[embedding] ids must be contiguous, got shape [2, 3] with other strides: call "
       "contiguous()"},
      {[=] {
         embedding(Tensor::zeros({1, 1, 1, 1, 1, 1}, DType::i64), table());
       },
       "[shape] rank must be at most 6, got 7"},
      {[=] {
         kernels::embedding(Tensor::zeros({1, 1, 1, 1, 1, 1}, DType::i64), table(), dy());
       },
       "[embedding] ids must have at most 5 dimensions, got [1, 1, 1, 1, 1, 1]"},
      {[=] { embedding(ids(), Tensor::zeros({5}, DType::f32)); },
       "[embedding] table must be [V, C], got [5]"},
      {[=] { kernels::embedding(ids(), Tensor::zeros({5}, DType::f32), dy()); },
       "[embedding] table must be [V, C], got [5]"},
      {[=] {
         embedding(ids(), Tensor::zeros({5, 3}, DType::i64));
       },
       "[embedding] table must be f32 or bf16, got i64"},
      {[=] {
         embedding(ids(), Tensor::zeros({3, 5}, DType::f32).transpose(0, 1));
       },
       "[embedding] table must be rows of unit stride, got shape [5, 3] with other strides: call "
       "contiguous()"},
      {[=] { embedding(ids(), table(), 5); }, "[embedding] padding must be below V = 5, got 5"},
      {[=] {
         kernels::embedding(ids(), table(), Tensor::zeros({3, 3}, DType::f32));
       },
       "[embedding] y must be [.., C] = [4, 3], got [3, 3]"},
      {[=] {
         kernels::embedding(ids(), table(), Tensor::zeros({4, 3}, DType::bf16));
       },
       "[embedding] y must be f32, got bf16"},
      {[=] { kernels::embedding_gradient(ids(), table(), -1, table(), false); },
       "[embedding] dy must be [.., C] = [4, 3], got [5, 3]"},
      {[=] { kernels::embedding_gradient(ids(), dy(), -1, Tensor::zeros({3}, DType::f32), false); },
       "[embedding] dtable must be [V, C], got [3]"},
      {[=] {
         kernels::embedding_gradient(ids(), dy(), -1, ids().reshape({2, 2}), false);
       },
       "[embedding] dtable must be f32 or bf16, got i64"},
      {[=] {
         kernels::embedding_gradient(ids(), ids().reshape({4, 1}), -1, table(), false);
       },
       "[embedding] dy must be f32 or bf16, got i64"},
  };
}

}  // namespace

std::vector<OpCase> embedding_cases() {
  std::vector<OpCase> cases = {
      row("odd", {2, 3}, 11, 7),
      row("repeated", {3, 4}, 5, 33, {1, 1, 4, 1, 0, 4, 1, 1, 1, 2, 1, 4}),
      row("many", {4, 64}, 50, 24),
      row("wide", {5}, 4, 1100),
      row("scalar_id", {}, 6, 5),
      row("no_ids", {0}, 6, 5),
      row("no_columns", {3}, 6, 0),
  };
  // Runs of one id that fill and cross the chunks in which a device adds them up, and more ids than
  // it sorts in a tile.
  const auto runs = [](std::int64_t count, auto id) {
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < count; ++i) {
      ids.push_back(id(i));
    }
    return ids;
  };
  cases.push_back(row("all_equal", {5, 41}, 9, 20, runs(205, [](auto) { return 4; })));
  cases.push_back(row("one_chunk", {32}, 3, 8, runs(32, [](auto) { return 2; })));
  cases.push_back(row("long_runs", {2, 150}, 7, 12, runs(300, [](auto i) {
                        return i % 3 == 0 ? 6 : i < 97 ? 1 : i % 50 == 0 ? 0 : 3;
                      })));
  cases.push_back(row("several_tiles", {2, 2100}, 70000, 1,
                      runs(4200, [](auto i) { return i % 5 == 0 ? 69999 : i * 7919 % 70000; })));
  cases[0].mistakes = mistakes();
  OpCase large = row("benchmark", {4, 512}, 50257, 768);
  large.benchmark = true;
  large.test = false;
  cases.push_back(std::move(large));
  return cases;
}

}  // namespace reprise::testing

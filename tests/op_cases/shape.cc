// Rows of the views, and of the copies that go with them.
#include "autograd/shape.h"

#include <string>
#include <utility>
#include <vector>

#include "autograd/elementwise.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

using Run = std::function<std::vector<Variable>(const std::vector<Variable>&)>;
using Oracle = std::function<std::vector<Array>(const std::vector<Array>&)>;

OpCase row(const std::string& name, const std::vector<Shape>& shapes, bool strided, Run run,
           Oracle oracle) {
  OpCase op;
  op.name = name;
  for (const Shape& shape : shapes) {
    op.inputs.push_back({.name = "x", .shape = shape, .strided = strided, .values = {}});
  }
  op.run = std::move(run);
  op.oracle = std::move(oracle);
  return op;
}

// [begin, end) of one dimension.
Array sliced(const Array& x, int dim, std::int64_t begin, std::int64_t end) {
  std::int64_t inner = 1;
  for (int d = dim + 1; d < x.shape.rank(); ++d) {
    inner *= x.shape[d];
  }
  Array y(x.shape.with(dim, end - begin));
  const std::int64_t from = x.shape[dim] * inner, to = (end - begin) * inner;
  for (std::int64_t i = 0; i < y.shape.numel(); ++i) {
    y[i] = x[i / to * from + begin * inner + i % to];
  }
  return y;
}

Array swapped(const Array& x, int a, int b) {
  Array y(x.shape.with(a, x.shape[b]).with(b, x.shape[a]));
  const Tensor::Strides from = contiguous_strides(x.shape);
  for (std::int64_t i = 0; i < y.shape.numel(); ++i) {
    std::int64_t left = i, at = 0;
    for (int d = y.shape.rank() - 1; d >= 0; --d) {
      at += left % y.shape[d] * from[static_cast<std::size_t>(d == a ? b : d == b ? a : d)];
      left /= y.shape[d];
    }
    y[i] = x[at];
  }
  return y;
}

Array shaped(const Array& x, const Shape& shape) {
  Array y(shape);
  y.at = x.at;
  return y;
}

OpCase slice_row(const std::string& name, const Shape& shape, int dim, std::int64_t begin,
                 std::int64_t end) {
  return row(
      "slice/" + name, {shape}, true,
      [=](const auto& in) { return std::vector<Variable>{slice(in[0], dim, begin, end)}; },
      [=](const auto& in) { return std::vector<Array>{sliced(in[0], dim, begin, end)}; });
}

OpCase transpose_row(const std::string& name, const Shape& shape, int a, int b) {
  return row(
      "transpose/" + name, {shape}, true,
      [=](const auto& in) { return std::vector<Variable>{transpose(in[0], a, b)}; },
      [=](const auto& in) { return std::vector<Array>{swapped(in[0], a, b)}; });
}

OpCase concat_row(const std::string& name, const std::vector<Shape>& shapes, int dim) {
  return row(
      "concat/" + name, shapes, true,
      [=](const auto& in) {
        std::vector<Variable> parts = in;
        return std::vector<Variable>{concat(parts, dim)};
      },
      [=](const auto& in) {
        std::int64_t size = 0;
        for (const Array& x : in) {
          size += x.shape[dim];
        }
        Array y(in[0].shape.with(dim, size));
        std::int64_t inner = 1, at = 0;
        for (int d = dim + 1; d < y.shape.rank(); ++d) {
          inner *= y.shape[d];
        }
        for (const Array& x : in) {
          const std::int64_t width = x.shape[dim] * inner;
          for (std::int64_t i = 0; i < x.shape.numel(); ++i) {
            y[i / width * size * inner + at + i % width] = x[i];
          }
          at += width;
        }
        return std::vector<Array>{y};
      });
}

// Three overlapping parts of a fused product as heads: what a decoder does with it, and a gradient
// that is added to three times.
OpCase fused_row() {
  return row(
      "slice/fused_heads", {{2, 3, 30}}, false,
      [](const auto& in) {
        const auto part = [&](std::int64_t begin, std::int64_t end) {
          return reshape(slice(in[0], 2, begin, end), Shape{2, 3, 2, 6});
        };
        return std::vector<Variable>{part(0, 12), scale(contiguous(part(9, 21)), 2.0),
                                     transpose(part(18, 30), 1, 2)};
      },
      [](const auto& in) {
        const auto part = [&](std::int64_t begin, std::int64_t end) {
          return shaped(sliced(in[0], 2, begin, end), Shape{2, 3, 2, 6});
        };
        Array middle = part(9, 21);
        for (double& x : middle.at) {
          x *= 2;
        }
        return std::vector<Array>{part(0, 12), middle, swapped(part(18, 30), 1, 2)};
      });
}

std::vector<Mistake> mistakes() {
  const auto x = [] { return Tensor::zeros({2, 3}, DType::f32); };
  return {
      {[=] { reshape(x(), {7}); }, "[reshape] shape must have 6 elements as [2, 3], got [7]"},
      {[=] { reshape(x().transpose(0, 1), {6}); },
       "[reshape] strides of [3, 2] do not allow [6]: call contiguous() first"},
      {[=] { slice(x(), 2, 0, 1); }, "[slice] dimension must be in [0, 2), got 2"},
      {[=] { slice(x(), 1, 2, 4); }, "[slice] range must lie in [0, 3), got [2, 4)"},
      {[=] { transpose(x(), 0, 2); }, "[transpose] dimensions must be in [0, 2), got 0 and 2"},
      {[=] {
         concat({x(), x()}, 2);
       },
       "[concat] dimension must be in [0, 2), got 2"},
      {[=] {
         concat({x(), Tensor::zeros({3, 3}, DType::f32)}, 1);
       },
       "[concat] part 1 must be f32 [2, 3] but for dimension 1, got f32 [3, 3]"},
      {[=] {
         concat({x(), Tensor::zeros({2, 3}, DType::bf16)}, 1);
       },
       "[concat] part 1 must be f32 [2, 3] but for dimension 1, got bf16 [2, 3]"},
      {[=] { concat(std::initializer_list<Variable>{}, 0); },
       "[concat] needs from 1 to 16 parts, got 0"},
  };
}

}  // namespace

std::vector<OpCase> shape_cases() {
  std::vector<OpCase> cases = {
      row(
          "reshape/split", {{4, 6}}, true,
          [](const auto& in) {
            return std::vector<Variable>{reshape(in[0], Shape{2, 2, 3, 2})};
          },
          [](const auto& in) {
            return std::vector<Array>{shaped(in[0], Shape{2, 2, 3, 2})};
          }),
      row(
          "reshape/merge", {{2, 3, 4}}, false,
          [](const auto& in) { return std::vector<Variable>{reshape(in[0], Shape{24})}; },
          [](const auto& in) { return std::vector<Array>{shaped(in[0], Shape{24})}; }),
      slice_row("columns", {4, 7}, 1, 2, 5),
      slice_row("middle", {2, 5, 3}, 1, 1, 4),
      slice_row("rows", {5, 4}, 0, 3, 5),
      slice_row("nothing", {5, 4}, 0, 2, 2),
      transpose_row("matrix", {4, 7}, 0, 1),
      transpose_row("heads", {2, 3, 4, 5}, 1, 2),
      transpose_row("outer", {2, 3, 4}, 0, 2),
      row(
          "contiguous/transposed", {{3, 4, 5}}, true,
          [](const auto& in) {
            return std::vector<Variable>{contiguous(transpose(in[0], 0, 2)), contiguous(in[0])};
          },
          [](const auto& in) {
            return std::vector<Array>{swapped(in[0], 0, 2), in[0]};
          }),
      concat_row("rows", {{2, 3}, {4, 3}, {1, 3}}, 0),
      concat_row("columns", {{2, 3, 2}, {2, 3, 5}}, 2),
      concat_row("middle", {{2, 3, 2}, {2, 0, 2}, {2, 1, 2}}, 1),
      fused_row(),
  };
  for (OpCase& op : cases) {
    op.cuda = true;
  }
  cases[0].mistakes = mistakes();
  return cases;
}

}  // namespace reprise::testing

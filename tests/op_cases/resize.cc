// Rows of the resize family.
#include "autograd/resize.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kernels/resize.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

// The kernel of the convolution, as the paper has it.
double cubic(double u) {
  constexpr double A = -0.75;
  u = std::abs(u);
  return u <= 1  ? (A + 2) * u * u * u - (A + 3) * u * u + 1
         : u < 2 ? A * u * u * u - 5 * A * u * u + 8 * A * u - 4 * A
                 : 0.0;
}

// Every element of an axis extended by its edges, weighted by its distance.
Array oracle(const Array& x, std::int64_t height, std::int64_t width) {
  const std::int64_t H = x.shape[0], W = x.shape[1], C = x.shape[2];
  Array y(Shape{height, width, C});
  const auto position = [](std::int64_t i, std::int64_t from, std::int64_t to) {
    return (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) -
           0.5;
  };
  for (std::int64_t i = 0; i < height; ++i) {
    for (std::int64_t j = 0; j < width; ++j) {
      for (std::int64_t p = -4; p < H + 4; ++p) {
        const double row = cubic(position(i, H, height) - static_cast<double>(p));
        for (std::int64_t q = -4; row != 0 && q < W + 4; ++q) {
          const double weight = row * cubic(position(j, W, width) - static_cast<double>(q));
          const std::int64_t from =
              std::clamp<std::int64_t>(p, 0, H - 1) * W + std::clamp<std::int64_t>(q, 0, W - 1);
          for (std::int64_t c = 0; weight != 0 && c < C; ++c) {
            y[(i * width + j) * C + c] += weight * x[from * C + c];
          }
        }
      }
    }
  }
  return y;
}

OpCase row(const std::string& size, const Shape& shape, std::int64_t height, std::int64_t width) {
  OpCase op;
  op.name = "resize_bicubic/" + size;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .parameter = true, .values = {}}};
  op.run = [=](const std::vector<Variable>& in) {
    return std::vector<Variable>{resize_bicubic(in[0], height, width)};
  };
  op.oracle = [=](const std::vector<Array>& in) {
    return std::vector<Array>{oracle(in[0], height, width)};
  };
  op.cuda = true;
  return op;
}

std::vector<Mistake> mistakes() {
  const auto f32 = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32); };
  const auto ids = [](const Shape& shape) { return Tensor::zeros(shape, DType::i64); };
  return {
      {[=] {
         resize_bicubic(ids({2, 3, 4}), 4, 4);
       },
       "[resize_bicubic] x must be f32 or bf16, got i64"},
      {[=] {
         resize_bicubic(f32({2, 3}), 4, 4);
       },
       "[resize_bicubic] x must be [H, W, C] with one row and column at least, got [2, 3]"},
      {[=] {
         resize_bicubic(f32({0, 3, 4}), 4, 4);
       },
       "[resize_bicubic] x must be [H, W, C] with one row and column at least, got [0, 3, 4]"},
      {[=] {
         resize_bicubic(f32({2, 3, 4}), 4, 0);
       },
       "[resize_bicubic] y must be [height, width, C] with one row and column at least, got [4, "
       "0, 4]"},
      {[=] {
         resize_bicubic(f32({2, 4, 3}).transpose(1, 2), 4, 4);
       },
       "[resize_bicubic] x must be rows of unit stride, got shape [2, 3, 4] with other strides: "
       "call contiguous()"},
      {[=] {
         kernels::resize_bicubic(f32({2, 3, 4}), f32({4, 4, 5}));
       },
       "[resize_bicubic] y must have C = 4 channels, got 5"},
      {[=] {
         kernels::resize_bicubic(f32({2, 3, 4}), Tensor::zeros({4, 4, 4}, DType::bf16));
       },
       "[resize_bicubic] y must be f32, got bf16"},
      {[=] {
         kernels::resize_bicubic(f32({2, 3, 4}), Tensor::zeros({4, 4, 4}, DType::f32, meta));
       },
       "[resize_bicubic] y must be on cpu, got meta"},
      {[=] {
         kernels::resize_bicubic_gradient(f32({4, 4, 4}), f32({2, 3, 5}));
       },
       "[resize_bicubic_gradient] dy must have C = 5 channels, got 4"},
      {[=] {
         kernels::resize_bicubic_gradient(ids({4, 4, 4}), f32({2, 3, 4}));
       },
       "[resize_bicubic_gradient] dy must be f32 or bf16, got i64"},
      {[=] {
         kernels::resize_bicubic_gradient(f32({4, 4, 4}), f32({3, 4}));
       },
       "[resize_bicubic_gradient] dx must be [H, W, C] with one row and column at least, got [3, "
       "4]"},
  };
}

}  // namespace

std::vector<OpCase> resize_cases() {
  std::vector<OpCase> cases = {
      row("larger", {4, 5, 7}, 7, 9),
      row("smaller", {9, 8, 16}, 4, 3),
      row("by_a_ratio_of_table_sizes", {24, 24, 3}, 35, 35),
      row("same", {3, 4, 9}, 3, 4),
      row("one_pixel", {1, 1, 5}, 4, 3),
      row("to_one_pixel", {6, 5, 5}, 1, 1),
      row("one_row_doubled", {1, 6, 17}, 2, 12),
      row("much_larger", {2, 3, 8}, 23, 31),
      row("much_smaller", {31, 23, 8}, 3, 2),
      row("wide", {3, 3, 1100}, 4, 4),
      row("no_channels", {3, 3, 0}, 4, 4),
  };
  cases[0].mistakes = mistakes();
  OpCase large = row("benchmark", {24, 24, 1024}, 35, 35);
  large.benchmark = true;
  large.test = false;
  cases.push_back(std::move(large));
  return cases;
}

}  // namespace reprise::testing

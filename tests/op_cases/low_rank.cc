// Rows of the low-rank family.
#include "kernels/low_rank.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "autograd/low_rank.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

constexpr std::uint64_t kSeed = 77, kOffset = 0xfffffff0;  // carries

OpCase down(const std::string& size, const Shape& x, std::int64_t rank, double scale, double p,
            bool wide) {
  OpCase op;
  op.name = "low_rank/" + size;
  const std::int64_t in = x.back();
  op.inputs = {
      {.name = "x", .shape = x, .strided = true, .values = {}},
      {.name = "a", .shape = {rank, in}, .always_f32 = wide, .parameter = true, .values = {}}};
  op.run = [=](const std::vector<Variable>& inputs) {
    Generator generator{kSeed, kOffset};
    return std::vector<Variable>{
        low_rank(inputs[0], inputs[1], {.scale = scale, .dropout = p}, &generator)};
  };
  op.oracle = [=](const std::vector<Array>& inputs) {
    const auto &from = inputs[0], &a = inputs[1];
    Array u(from.shape.with(from.shape.rank() - 1, rank));
    for (std::int64_t row = 0; row < from.shape.rows(); ++row) {
      for (std::int64_t r = 0; r < rank; ++r) {
        for (std::int64_t i = 0; i < in; ++i) {
          const auto at = static_cast<std::uint64_t>(row * in + i);
          const bool keep = p == 0 || uniform(philox(kSeed, kOffset + at / 4)[at % 4]) >= p;
          u[row * rank + r] += keep ? scale * from[row * in + i] / (1 - p) * a[r * in + i] : 0;
        }
      }
    }
    return std::vector<Array>{u};
  };
  const std::int64_t flops = 2 * x.rows() * rank * in;
  op.forward_flops = flops;
  op.backward_flops = 2 * flops;
  return op;
}

OpCase up(const std::string& size, const Shape& y, std::int64_t rank, bool wide) {
  OpCase op;
  op.name = "add_low_rank/" + size;
  const std::int64_t out = y.back();
  const Shape u = y.with(y.rank() - 1, rank);
  op.inputs = {
      {.name = "y", .shape = y, .strided = true, .values = {}},
      {.name = "u", .shape = u, .always_f32 = wide, .values = {}},
      {.name = "b", .shape = {out, rank}, .always_f32 = wide, .parameter = true, .values = {}}};
  op.run = [](const std::vector<Variable>& inputs) {
    return std::vector<Variable>{add_low_rank(inputs[0], inputs[1], inputs[2])};
  };
  op.oracle = [=](const std::vector<Array>& inputs) {
    Array z = inputs[0];
    for (std::int64_t row = 0; row < y.rows(); ++row) {
      for (std::int64_t o = 0; o < out; ++o) {
        for (std::int64_t r = 0; r < rank; ++r) {
          z[row * out + o] += inputs[1][row * rank + r] * inputs[2][o * rank + r];
        }
      }
    }
    return std::vector<Array>{z};
  };
  const std::int64_t flops = 2 * y.rows() * rank * out;
  op.forward_flops = flops;
  op.backward_flops = 2 * flops;
  return op;
}

OpCase norms(const std::string& size, std::int64_t in, std::int64_t out, std::int64_t rank,
             bool in_out, bool wide) {
  OpCase op;
  op.name = "merged_norms/" + size;
  op.inputs = {
      {.name = "w",
       .shape = in_out ? Shape{in, out} : Shape{out, in},
       .gradient = false,
       .values = {}},
      {.name = "a", .shape = {rank, in}, .gradient = false, .always_f32 = wide, .values = {}},
      {.name = "b", .shape = {out, rank}, .gradient = false, .always_f32 = wide, .values = {}}};
  constexpr double kScale = 0.5;
  op.run = [=](const std::vector<Variable>& inputs) {
    return std::vector<Variable>{merged_norms(inputs[0], in_out, inputs[1], inputs[2], kScale)};
  };
  op.oracle = [=](const std::vector<Array>& inputs) {
    Array v(Shape{out});
    for (std::int64_t o = 0; o < out; ++o) {
      double squares = 0;
      for (std::int64_t i = 0; i < in; ++i) {
        double w = inputs[0][in_out ? i * out + o : o * in + i];
        for (std::int64_t r = 0; r < rank; ++r) {
          w += kScale * inputs[2][o * rank + r] * inputs[1][r * in + i];
        }
        squares += w * w;
      }
      v[o] = 1 / std::sqrt(squares);
    }
    return std::vector<Array>{v};
  };
  return op;
}

Tensor f32(const Shape& shape) {
  return Tensor::zeros(shape, DType::f32);
}
Tensor bf16(const Shape& shape) {
  return Tensor::zeros(shape, DType::bf16);
}

std::vector<Mistake> mistakes() {
  const auto ids = [] { return Tensor::zeros({2, 3}, DType::i64); };
  return {
      {[=] {
         low_rank(ids(), f32({4, 3}), {});
       },
       "[low_rank] x must be f32 or bf16, got i64"},
      {[=] {
         low_rank(f32({2, 3}), ids(), {});
       },
       "[low_rank] a must be f32 or bf16, got i64"},
      {[=] {
         low_rank(f32({2, 3}), bf16({4, 3}), {});
       },
       "[low_rank] a must be f32 as x, got bf16"},
      {[=] {
         low_rank(f32({2, 3}), f32({4, 2}), {});
       },
       "[low_rank] a must be [R, I] with the I of x [2, 3], got [4, 2]"},
      {[=] {
         low_rank(f32({}), f32({4, 2}), {});
       },
       "[low_rank] x must be [.., I] and a [R, I], got [] and [4, 2]"},
      {[=] {
         low_rank(f32({2, 3}), f32({4, 3}), {.dropout = 1});
       },
       "[low_rank] dropout must be in [0, 1), got 1"},
      {[=] {
         low_rank(f32({2, 3}), f32({4, 3}), {.dropout = 0.5});
       },
       "[low_rank] dropout needs a generator"},
      {[=] {
         low_rank(f32({2, 3}), Tensor::zeros({4, 3}, DType::f32, meta), {});
       },
       "[low_rank] a must be on cpu, got meta"},
      {[=] {
         kernels::low_rank(f32({2, 3}), f32({4, 3}), {}, f32({2, 5}));
       },
       "[low_rank] u must be [.., R] = [2, 4], got [2, 5]"},
      {[=] {
         kernels::low_rank(bf16({2, 3}), f32({4, 3}), {}, bf16({2, 4}));
       },
       "[low_rank] u must be f32, got bf16"},
      {[=] {
         kernels::low_rank_backward(f32({2, 5}), f32({2, 3}), f32({4, 3}), {}, {}, {});
       },
       "[low_rank] du must be [.., R] = [2, 4], got [2, 5]"},
      {[=] {
         kernels::low_rank_backward(f32({2, 4}), f32({2, 3}), f32({4, 3}), {}, {f32({3, 2})}, {});
       },
       "[low_rank] dx must be [.., I] = [2, 3], got [3, 2]"},
      {[=] {
         kernels::low_rank_backward(f32({2, 4}), f32({2, 3}), f32({4, 3}), {}, {}, {f32({3, 4})});
       },
       "[low_rank] da must be [R, I] = [4, 3], got [3, 4]"},
      {[=] {
         kernels::low_rank_backward(f32({2, 4}), f32({2, 3}), f32({4, 3}), {}, {}, {ids()});
       },
       "[low_rank] da must be f32 or bf16, got i64"},
      {[=] {
         kernels::add_low_rank_backward(f32({2, 3}), f32({2, 4}), f32({3, 4}), {f32({2, 3})}, {});
       },
       "[add_low_rank] du must be [.., R] = [2, 4], got [2, 3]"},
      {[=] {
         kernels::add_low_rank_backward(f32({2, 3}), f32({2, 4}), f32({3, 4}), {}, {f32({4, 3})});
       },
       "[add_low_rank] db must be [O, R] = [3, 4], got [4, 3]"},
      {[=] {
         add_low_rank(ids(), f32({2, 4}), f32({3, 4}));
       },
       "[add_low_rank] y must be f32 or bf16, got i64"},
      {[=] {
         add_low_rank(f32({2, 3}), bf16({2, 4}), bf16({3, 4}));
       },
       "[add_low_rank] b must be f32 as y, got bf16"},
      {[=] {
         add_low_rank(bf16({2, 3}), bf16({2, 4}), f32({3, 4}));
       },
       "[add_low_rank] u must be f32, got bf16"},
      {[=] {
         add_low_rank(f32({2, 3}), f32({2, 4}), f32({2, 4}));
       },
       "[add_low_rank] b must be [O, R] with the O of y [2, 3], got [2, 4]"},
      {[=] {
         add_low_rank(f32({2, 3}), f32({3, 4}), f32({3, 4}));
       },
       "[add_low_rank] u must be [.., R] = [2, 4], got [3, 4]"},
      {[=] {
         merged_norms(f32({3}), false, f32({2, 3}), f32({3, 2}), 1);
       },
       "[merged_norms] w must be a matrix, got [3]"},
      {[=] {
         merged_norms(f32({5, 3}), false, f32({3}), f32({5, 2}), 1);
       },
       "[merged_norms] a must be [R, I], got [3]"},
      {[=] {
         merged_norms(f32({5, 3}), true, f32({2, 3}), f32({5, 2}), 1);
       },
       "[merged_norms] a must be [R, I] = [2, 5], got [2, 3]"},
      {[=] {
         merged_norms(f32({5, 3}), false, f32({2, 3}), f32({3, 2}), 1);
       },
       "[merged_norms] b must be [O, R] = [5, 2], got [3, 2]"},
      {[=] {
         merged_norms(ids(), false, f32({2, 3}), f32({2, 2}), 1);
       },
       "[merged_norms] w must be f32 or bf16, got i64"},
      {[=] {
         merged_norms(f32({5, 3}), false, f32({2, 3}), bf16({5, 2}), 1);
       },
       "[merged_norms] b must be f32, got bf16"},
      {[=] {
         kernels::merged_norms(f32({5, 3}), false, f32({2, 3}), f32({5, 2}), 1, f32({3}));
       },
       "[merged_norms] v must be [O] = [5], got [3]"},
      {[=] {
         kernels::merged_norms(f32({5, 3}), false, f32({2, 3}), f32({5, 2}), 1, bf16({5}));
       },
       "[merged_norms] v must be f32, got bf16"},
  };
}

}  // namespace

std::vector<OpCase> low_rank_cases() {
  std::vector<OpCase> cases{
      down("scaled", {3, 5, 12}, 4, 2.0, 0, false),
      down("odd", {7, 13}, 3, 1.0, 0, false),
      down("dropped", {2, 9, 10}, 4, 0.5, 0.3, false),
      down("wide", {5, 12}, 4, 2.0, 0, true),
      down("wide_dropped", {6, 11}, 2, 1.0, 0.25, true),
      // More rows than the workspace has.
      down("long", {521, 3}, 2, 1.0, 0.5, false),
      down("long_wide", {2, 520, 2}, 1, 1.0, 0, true),
      down("no_rows", {0, 4}, 2, 1.0, 0.5, true),
      // Several tiles of a device each way, and ranks on either side of what is narrow there.
      down("wide_rank", {66, 37}, 33, 0.5, 0.2, false),
      up("wide_rank", {40, 67}, 33, false),
      up("rows", {3, 5, 12}, 4, false),
      up("wide", {6, 11}, 3, true),
      up("long_wide", {530, 3}, 2, true),
      up("no_rows", {0, 4}, 2, true),
      norms("out_in", 12, 7, 3, false, false),
      norms("in_out", 9, 10, 2, true, false),
      norms("wide_rank", 70, 19, 35, false, false),
      norms("wide", 6, 131, 2, false, true),
      norms("wide_in_out", 5, 130, 2, true, true),
  };
  for (OpCase& op : cases) {
    op.cuda = op.name.find("/long") == op.name.npos;
  }
  cases.front().mistakes = mistakes();
  return cases;
}

}  // namespace reprise::testing

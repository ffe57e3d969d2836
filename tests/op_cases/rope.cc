// Rows of the rope family.
#include "autograd/rope.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "tests/op_case.h"

namespace reprise::testing {
namespace {

struct Turn {
  RopeOptions options;
  std::int64_t pairs;
  std::vector<std::int64_t> positions;  // [T] or [B, T], of each section
  bool per_text = false;
  bool twice = false;  // the table holds its frequencies twice
};

std::vector<float> frequencies(const Turn& turn) {
  const std::int64_t count = turn.twice ? turn.pairs / 2 : turn.pairs;
  std::vector<float> result;
  for (std::int64_t i = 0; i < turn.pairs; ++i) {
    result.push_back(static_cast<float>(
        std::pow(10000.0, -static_cast<double>(i % count) / static_cast<double>(count))));
  }
  return result;
}

std::size_t section_of(const Turn& turn, std::int64_t pair) {
  std::size_t section = 0;
  for (std::int64_t end = 0; section < turn.options.sections.size(); ++section) {
    end += turn.options.sections[section];
    if (pair < end) {
      return section;
    }
  }
  return 0;
}

Array oracle(const Turn& turn, const Array& x) {
  const std::int64_t T = x.shape[1], H = x.shape[2], D = x.shape[3];
  const std::vector<float> inv_freq = frequencies(turn);
  Array y = x;
  for (std::int64_t token = 0; token < x.shape[0] * T; ++token) {
    const auto at = static_cast<std::size_t>(turn.per_text ? token : token % T);
    const auto count = static_cast<std::size_t>(turn.per_text ? x.shape[0] * T : T);
    for (std::int64_t head = 0; head < H; ++head) {
      const std::int64_t from = (token * H + head) * D;
      for (std::int64_t i = 0; i < turn.pairs; ++i) {
        const auto position = static_cast<float>(turn.positions[section_of(turn, i) * count + at]);
        const double angle = position * inv_freq[static_cast<std::size_t>(i)];
        const double c = std::cos(angle) * turn.options.attention_factor;
        const double s = std::sin(angle) * turn.options.attention_factor;
        const bool half = turn.options.style == RopeStyle::half;
        const std::int64_t a = from + (half ? i : 2 * i);
        const std::int64_t b = half ? a + turn.pairs : a + 1;
        y[a] = x[a] * c - x[b] * s;
        y[b] = x[b] * c + x[a] * s;
      }
    }
  }
  return y;
}

OpCase row(const std::string& name, const Shape& shape, Turn turn) {
  OpCase op;
  op.name = "rope/" + name;
  op.inputs = {{.name = "x", .shape = shape, .strided = true, .values = {}}};
  op.run = [turn, shape](const std::vector<Variable>& in) {
    std::vector<std::int64_t> sizes;
    if (!turn.options.sections.empty()) {
      sizes.push_back(static_cast<std::int64_t>(turn.options.sections.size()));
    }
    if (turn.per_text) {
      sizes.push_back(shape[0]);
    }
    sizes.push_back(shape[1]);
    const Shape at{std::span<const std::int64_t>(sizes)};
    const Device device = in[0].device();
    return std::vector<Variable>{rope(in[0], Tensor::from(turn.positions, at, device),
                                      Tensor::from(frequencies(turn), {turn.pairs}, device),
                                      turn.options)};
  };
  op.oracle = [turn](const std::vector<Array>& in) {
    return std::vector<Array>{oracle(turn, in[0])};
  };
  op.cuda = true;
  return op;
}

std::vector<std::int64_t> counted(std::int64_t from, std::int64_t count) {
  std::vector<std::int64_t> result;
  for (std::int64_t i = 0; i < count; ++i) {
    result.push_back(from + i);
  }
  return result;
}

// bf16 has no other rounding than that of the result.
OpCase f32_tables(OpCase op) {
  op.tolerance = 0.3;
  return op;
}

std::vector<Mistake> mistakes() {
  const auto x = [] { return Tensor::zeros({2, 3, 4, 8}, DType::f32); };
  const auto at = [] { return Tensor::zeros({3}, DType::i64); };
  const auto f = [] { return Tensor::zeros({4}, DType::f32); };
  return {
      {[=] {
         rope(Tensor::zeros({2, 3, 4, 8}, DType::i64), at(), f());
       },
       "[rope] x must be f32 or bf16, got i64"},
      {[=] {
         rope(x().reshape({6, 4, 8}), at(), f());
       },
       "[rope] x must be [B, T, H, D], got [6, 4, 8]"},
      {[=] { rope(x(), f(), f()); }, "[rope] positions must be i64, got f32"},
      {[=] { rope(x(), Tensor::zeros({4}, DType::i64), f()); },
       "[rope] positions must be [B, T] = [2, 3] or [T], got [4]"},
      {[=] {
         rope(x(), Tensor::zeros({3, 2}, DType::i64).transpose(0, 1), f());
       },
       "[rope] positions must be contiguous, got shape [2, 3] with other strides: call "
       "contiguous()"},
      {[=] { rope(x(), Tensor::zeros({3}, DType::i64, meta), f()); },
       "[rope] positions must be on cpu, got meta"},
      {[=] { rope(x(), at(), Tensor::zeros({4}, DType::bf16)); },
       "[rope] inv_freq must be f32, got bf16"},
      {[=] { rope(x(), at(), Tensor::zeros({5}, DType::f32)); },
       "[rope] inv_freq must be [D_rot / 2] with D_rot at most D = 8, got [5]"},
      {[=] { rope(x(), at(), Tensor::zeros({4}, DType::f32, meta)); },
       "[rope] inv_freq must be on cpu, got meta"},
      {[=] { rope(x(), at(), Tensor::zeros({8}, DType::f32).as_view({4}, {2}, 0)); },
       "[rope] inv_freq must be contiguous, got shape [4] with other strides: call contiguous()"},
      {[=] {
         rope(Tensor::zeros({2, 3, 8, 4}, DType::f32).transpose(2, 3), at(), f());
       },
       "[rope] x must have unit stride within a head, got shape [2, 3, 4, 8] with other strides: "
       "call contiguous()"},
      {[=] {
         rope(x(), at(), f(), {.sections = {2, 2}});
       },
       "[rope] positions must be [R, B, T] = [2, 2, 3] or [R, T], got [3]"},
      {[=] {
         rope(x(), Tensor::zeros({2, 3}, DType::i64), f(), {.sections = {1, 2}});
       },
       "[rope] sections must add up to D_rot / 2 = 4, got 3"},
      {[=] {
         rope(x(), Tensor::zeros({2, 3}, DType::i64), f(), {.sections = {5, -1}});
       },
       "[rope] section 1 must not be negative, got -1"},
      {[=] {
         rope(x(), Tensor::zeros({9, 3}, DType::i64), f(),
              {.sections = {4, 0, 0, 0, 0, 0, 0, 0, 0}});
       },
       "[rope] sections must be at most 8, got 9"},
      {[=] {
         kernels::rope(x(), at(), f(), {}, Tensor::zeros({2, 3, 4, 7}, DType::f32));
       },
       "[rope] y must have the shape [2, 3, 4, 8] of x, got [2, 3, 4, 7]"},
      {[=] {
         kernels::rope(x(), at(), f(), {}, Tensor::zeros({2, 3, 4, 8}, DType::i64));
       },
       "[rope] y must be f32 or bf16, got i64"},
  };
}

}  // namespace

std::vector<OpCase> rope_cases() {
  const RopeOptions half, interleaved{RopeStyle::interleaved, 1};
  const RopeOptions text{.sections = {2, 3, 3}}, vision{.sections = {20, 20}, .f32_tables = true};
  const std::vector<std::int64_t> mixed = {0, 5, 1000000, 3, 131071, 77777777};
  std::vector<OpCase> cases = {
      row("half", {2, 5, 3, 16}, {half, 8, counted(0, 5)}),
      row("interleaved", {2, 5, 3, 16}, {interleaved, 8, counted(0, 5)}),
      row("half_partial", {2, 3, 2, 23}, {half, 5, counted(9, 3)}),
      row("interleaved_partial", {2, 3, 2, 23}, {interleaved, 5, counted(9, 3)}),
      row("half_wide", {1, 3, 2, 600}, {half, 300, counted(4, 3)}),
      row("interleaved_wide", {1, 3, 2, 600}, {interleaved, 290, counted(4, 3)}),
      row("half_far_positions_per_text", {2, 3, 2, 64}, {half, 32, mixed, true}),
      row("attention_factor", {1, 4, 2, 32}, {{RopeStyle::half, 1.25}, 16, counted(0, 4)}),
      row("backward_positions", {1, 4, 2, 32}, {half, 16, {-1, -50, -3000, 0}}),
      row("nothing_rotated", {1, 2, 2, 8}, {half, 0, counted(0, 2)}),
      row("many_tokens", {2, 70, 4, 64}, {half, 32, counted(0, 70)}),
      row("no_tokens", {2, 0, 3, 16}, {half, 8, {}}),
      row("sections", {2, 3, 2, 16}, {text, 8, {0, 1, 2, 7, 70, 700, 1, 10, 1000}}),
      row("sections_per_text", {2, 3, 2, 16}, {text, 8, counted(5, 18), true}),
      row("sections_interleaved", {1, 2, 3, 21},
          {{.style = RopeStyle::interleaved, .sections = {0, 5, 1, 2}}, 8, counted(3, 8)}),
      row("sections_wide", {1, 2, 1, 600}, {{.sections = {130, 20, 150}}, 300, counted(3, 6)}),
      f32_tables(row("sections_table_twice", {1, 6, 2, 80},
                     {vision, 40, {0, 0, 0, 1, 1, 1, 0, 1, 2, 0, 1, 2}, false, true})),
      f32_tables(row("f32_tables", {1, 4, 2, 32}, {{.f32_tables = true}, 16, counted(1, 4)})),
  };
  cases[0].mistakes = mistakes();
  OpCase large = row("benchmark", {4, 512, 32, 128}, {half, 64, counted(0, 512)});
  large.benchmark = true;
  large.test = false;
  cases.push_back(std::move(large));
  return cases;
}

}  // namespace reprise::testing

// Rows of attention.
#include "autograd/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/op_case.h"

namespace reprise::testing {
namespace {

struct Setting {
  std::string name;
  std::int64_t B, T, H, S, K, D;
  AttentionSpec spec{};  // without tensors: a row holds no memory between the tests
  std::uint64_t seed = 0;
  std::vector<std::int64_t> mask{}, documents{};  // [B, S], [B, T]
};

bool sees(const Setting& s, std::int64_t b, std::int64_t i, std::int64_t j) {
  const AttentionSpec& o = s.spec;
  const std::int64_t at = i + s.S - s.T;
  if ((o.causal && j > at) || (o.window > 0 && at - o.window >= j)) {
    return false;
  }
  if (!s.mask.empty() && s.mask[static_cast<std::size_t>(b * s.S + j)] == 0) {
    return false;
  }
  return s.documents.empty() || s.documents[static_cast<std::size_t>(b * s.T + i)] ==
                                    s.documents[static_cast<std::size_t>(b * s.T + j)];
}

double kept(const Setting& s, std::int64_t row, std::int64_t j) {
  if (s.spec.dropout == 0) {
    return 1;
  }
  const auto block = static_cast<std::uint64_t>(row * ((s.S + 3) / 4) + j / 4);
  const std::uint32_t word = philox(s.seed, block)[static_cast<std::size_t>(j % 4)];
  return uniform(word) < static_cast<float>(s.spec.dropout) ? 0 : 1 / (1 - s.spec.dropout);
}

Array oracle(const Setting& s, const std::vector<Array>& in) {
  const Array &q = in[0], &k = in[1], &v = in[2];
  Array out(q.shape);
  for (std::int64_t row = 0; row < s.B * s.H * s.T; ++row) {  // [B, H, T]
    const std::int64_t b = row / (s.H * s.T), h = row / s.T % s.H, i = row % s.T;
    const std::int64_t query = ((b * s.T + i) * s.H + h) * s.D;
    const auto key = [&](std::int64_t j) { return ((b * s.S + j) * s.K + h / (s.H / s.K)) * s.D; };
    std::vector<double> score;
    double highest = -1e300, sum = 0;
    for (std::int64_t j = 0; j < s.S; ++j) {
      double dot = 0;
      for (std::int64_t c = 0; c < s.D; ++c) {
        dot += q[query + c] * k[key(j) + c];
      }
      score.push_back(dot * s.spec.scale);
      highest = sees(s, b, i, j) ? std::max(highest, score.back()) : highest;
    }
    for (std::int64_t j = 0; j < s.S; ++j) {
      double& p = score[static_cast<std::size_t>(j)];
      p = sees(s, b, i, j) ? std::exp(p - highest) : 0;
      sum += p;
    }
    for (std::int64_t j = 0; j < s.S && sum > 0; ++j) {
      const double p = score[static_cast<std::size_t>(j)] / sum * kept(s, row, j);
      for (std::int64_t c = 0; c < s.D; ++c) {
        out[query + c] += p * v[key(j) + c];
      }
    }
  }
  return out;
}

OpCase row(const Setting& s) {
  OpCase op;
  op.name = "attention/" + s.name;
  op.cuda = true;
  op.inputs = {{.name = "q", .shape = {s.B, s.T, s.H, s.D}, .strided = true, .values = {}},
               {.name = "k", .shape = {s.B, s.S, s.K, s.D}, .strided = true, .values = {}},
               {.name = "v", .shape = {s.B, s.S, s.K, s.D}, .strided = true, .values = {}}};
  op.run = [s](const std::vector<Variable>& in) {
    Generator generator{.seed = s.seed};
    AttentionSpec spec = s.spec;
    spec.generator = &generator;
    if (!s.mask.empty()) {
      spec.mask = Tensor::from(s.mask, Shape{s.B, s.S}, in[0].device());
    }
    if (!s.documents.empty()) {
      spec.documents = Tensor::from(s.documents, Shape{s.B, s.T}, in[0].device());
    }
    return std::vector<Variable>{attention(in[0], in[1], in[2], spec)};
  };
  op.tolerance = 1.5;  // in bf16 the probabilities are rounded too
  op.oracle = [s](const std::vector<Array>& in) { return std::vector<Array>{oracle(s, in)}; };
  // Two products a visible pair forward; five backward, as the scores are computed again. What
  // padding and documents hide is counted on the host alone: see VisiblePairs in attention_test.cc.
  if (!s.mask.empty() || !s.documents.empty()) {
    return op;
  }
  std::int64_t pairs = 0;
  for (std::int64_t at = 0; at < s.B * s.T * s.S; ++at) {
    pairs += sees(s, at / (s.T * s.S), at / s.S % s.T, at % s.S) ? s.H : 0;
  }
  op.forward_flops = 2 * 2 * pairs * s.D;
  op.backward_flops = 5 * 2 * pairs * s.D;
  return op;
}

std::vector<Mistake> mistakes() {
  const auto mistake = [](const Shape& q, const Shape& k, const AttentionSpec& spec,
                          std::string message) {
    return Mistake{[=] {
                     const auto f32 = [](const Shape& s) { return Tensor::zeros(s, DType::f32); };
                     attention(f32(q), f32(k), f32(k), spec);
                   },
                   std::move(message)};
  };
  const Shape q{2, 3, 4, 5}, k{2, 3, 2, 5};
  return {
      mistake({2, 3}, k, {}, "[attention] q must have four dimensions [B, T, H, D], got [2, 3]"),
      mistake(q, {2, 3, 3, 5}, {}, "[attention] H must be a multiple of K, got H = 4 and K = 3"),
      mistake(q, k, {.dropout = 0.5}, "[attention] dropout 0.5 needs a generator"),
      mistake(q, k, {.most_documents = -1},
              "[attention] most_documents must not be negative, got -1"),
      mistake(q, k, {.window = 2}, "[attention] window must be 0 without causal, got 2"),
  };
}

}  // namespace

std::vector<OpCase> attention_cases() {
  std::vector<OpCase> rows;
  rows.push_back(row({"full", 2, 5, 2, 7, 2, 3, {.scale = 0.5}}));
  rows.front().mistakes = mistakes();
  rows.push_back(row({"causal", 1, 9, 2, 9, 2, 4, {.scale = 0.5, .causal = true}}));
  rows.push_back(row({"one", 1, 1, 1, 1, 1, 1, {}}));
  rows.push_back(row({"one_query", 2, 1, 2, 6, 1, 4, {.causal = true}}));
  rows.push_back(row({"grouped", 1, 6, 4, 6, 2, 4, {.scale = 0.5, .causal = true}}));
  rows.push_back(row({"window", 1, 9, 1, 9, 1, 4, {.causal = true, .window = 3}}));
  Setting padded{"padding_first_rows_see_nothing", 2, 5, 1, 5, 1, 4, {.causal = true}};
  padded.mask = {0, 0, 1, 1, 1, 1, 1, 1, 0, 0};
  rows.push_back(row(padded));
  Setting packed{"documents", 1, 8, 2, 8, 1, 4, {.causal = true}};
  packed.documents = {0, 0, 0, 1, 4, 4, 4, 4};
  rows.push_back(row(packed));
  // Sizes that a library's fused kernels take in bf16.
  rows.push_back(row({"fused", 2, 6, 4, 9, 2, 8, {.scale = 0.3}}));
  rows.push_back(row({"fused_causal", 2, 9, 2, 9, 1, 16, {.scale = 0.25, .causal = true}}));
  rows.push_back(row({"fused_more_keys", 1, 4, 2, 7, 2, 8, {.scale = 0.3, .causal = true}}));
  rows.push_back(
      row({"fused_window", 1, 9, 2, 11, 1, 8, {.scale = 0.3, .causal = true, .window = 3}}));
  padded = {
      "fused_padding", 2, 5, 2, 5, 1, 8, {.scale = 0.3, .causal = true, .padded_right = true}};
  padded.mask = {1, 1, 1, 0, 0, 1, 1, 1, 1, 1};
  rows.push_back(row(padded));
  packed = {
      "fused_documents", 2, 8, 4, 8, 2, 8, {.scale = 0.3, .causal = true, .most_documents = 5}};
  packed.documents = {0, 0, 0, 1, 4, 4, 4, 4, 2, 2, 3, 3, 3, 3, 3, 3};
  rows.push_back(row(packed));
  packed.name = "fused_documents_full";
  packed.spec = {.scale = 0.3, .window = 0, .most_documents = 9};
  rows.push_back(row(packed));
  rows.push_back(row({"dropout", 1, 6, 2, 9, 1, 4, {.scale = 0.5, .dropout = 0.4}, 77}));
  rows.push_back(row({"dropout_of_groups",
                      1,
                      5,
                      2,
                      7,
                      1,
                      8,
                      {.scale = 0.3, .causal = true, .window = 2, .dropout = 0.3},
                      5}));
  rows.push_back(row({"wide_head", 1, 3, 1, 4, 1, 72, {.scale = 0.1}}));
  rows.push_back(row({"widest_head", 1, 3, 2, 6, 1, 136, {.scale = 0.1, .dropout = 0.3}, 3}));
  rows.push_back(row({"no_keys", 1, 3, 1, 0, 1, 4, {}}));
  rows.push_back(row({"no_queries", 1, 0, 1, 3, 1, 4, {}}));
  rows.push_back(row({"empty_batch", 0, 3, 1, 3, 1, 4, {}}));
  OpCase large = row({"gpt2", 4, 512, 12, 512, 12, 64, {.scale = 0.125, .causal = true}});
  large.benchmark = true;
  large.test = false;
  rows.push_back(std::move(large));
  return rows;
}

}  // namespace reprise::testing

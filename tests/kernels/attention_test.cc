#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/cuda_device.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "tests/error_of.h"

namespace reprise::kernels {
namespace {

using testing::error_of;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Sizes {
  std::int64_t B, T, H, S, K, D;
};

struct Problem {
  std::string name;
  Sizes size;
  AttentionOptions options{};
  std::vector<std::int64_t> mask{};       // [B, S]
  std::vector<std::int64_t> documents{};  // [B, T]
  bool fused = false;                     // q, k and v are slices of one projection
};

Tensor random(std::uint64_t seed, const Shape& shape, DType dtype) {
  const Tensor x = Tensor::empty(shape, dtype);
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const float value = normal(engine);
    if (dtype == DType::f32) {
      x.data<float>()[i] = value;
    } else {
      x.data<bfloat16>()[i] = to_bfloat16(value);
    }
  }
  return x;
}

std::vector<double> doubles(const Tensor& x) {
  const Tensor dense = (x.device().kind == DeviceKind::cuda ? x.to(reprise::cpu) : x).contiguous();
  std::vector<double> values(static_cast<std::size_t>(dense.numel()));
  for (std::int64_t i = 0; i < dense.numel(); ++i) {
    values[static_cast<std::size_t>(i)] =
        dense.dtype() == DType::f32 ? dense.data<float>()[i] : to_float(dense.data<bfloat16>()[i]);
  }
  return values;
}

AttentionInputs inputs_of(const Problem& problem, DType dtype, Device device = reprise::cpu) {
  const auto [B, T, H, S, K, D] = problem.size;
  AttentionInputs in;
  if (problem.fused) {  // [B, T, H + 2 K heads of D]
    const Tensor qkv = random(1, Shape{B, T, H + 2 * K, D}, dtype).to(device);
    in.q = qkv.slice(2, 0, H);
    in.k = qkv.slice(2, H, H + K);
    in.v = qkv.slice(2, H + K, H + 2 * K);
  } else {
    in.q = random(1, Shape{B, T, H, D}, dtype).to(device);
    in.k = random(2, Shape{B, S, K, D}, dtype).to(device);
    in.v = random(3, Shape{B, S, K, D}, dtype).to(device);
  }
  if (!problem.mask.empty()) {
    in.mask = Tensor::from(problem.mask, Shape{B, S}, device);
  }
  if (!problem.documents.empty()) {
    in.documents = Tensor::from(problem.documents, Shape{B, T}, device);
  }
  return in;
}

bool sees(const Problem& p, std::int64_t b, std::int64_t i, std::int64_t j) {
  const auto [B, T, H, S, K, D] = p.size;
  const std::int64_t at = i + S - T;
  return (!p.options.causal || j <= at) && (p.options.window == 0 || at - p.options.window < j) &&
         (p.mask.empty() || p.mask[static_cast<std::size_t>(b * S + j)] != 0) &&
         (p.documents.empty() || p.documents[static_cast<std::size_t>(b * T + i)] ==
                                     p.documents[static_cast<std::size_t>(b * T + j)]);
}

double kept(const Problem& p, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
  const AttentionOptions& o = p.options;
  if (o.dropout == 0) {
    return 1;
  }
  const auto row = static_cast<std::uint64_t>((b * p.size.H + h) * p.size.T + i);
  const auto blocks = static_cast<std::uint64_t>((p.size.S + 3) / 4);
  const PhiloxBlock words =
      philox(o.seed, o.offset + row * blocks + static_cast<std::uint64_t>(j / 4));
  return uniform(words[static_cast<std::size_t>(j % 4)]) < static_cast<float>(o.dropout)
             ? 0
             : 1 / (1 - o.dropout);
}

struct Oracle {
  std::vector<double> out, log_sum_exp, dq, dk, dv;
};

// The formulas of the header, one query and head at a time.
Oracle oracle(const Problem& p, const AttentionInputs& in, const Tensor& dout) {
  const auto [B, T, H, S, K, D] = p.size;
  const auto q = doubles(in.q), k = doubles(in.k), v = doubles(in.v), g = doubles(dout);
  Oracle r;
  r.out.resize(q.size());
  r.dq.resize(q.size());
  r.dk.resize(k.size());
  r.dv.resize(k.size());
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t h = 0; h < H; ++h) {
      for (std::int64_t i = 0; i < T; ++i) {
        const std::size_t query = static_cast<std::size_t>(((b * T + i) * H + h) * D);
        const auto key = [&](std::int64_t j) {
          return static_cast<std::size_t>(((b * S + j) * K + h / (H / K)) * D);
        };
        const auto d = static_cast<std::size_t>(D);
        std::vector<double> probability(static_cast<std::size_t>(S));
        double sum = 0, highest = -kInfinity;
        for (int pass = 0; pass < 2; ++pass) {
          for (std::int64_t j = 0; j < S; ++j) {
            if (!sees(p, b, i, j)) {
              continue;
            }
            double score = 0;
            for (std::size_t c = 0; c < d; ++c) {
              score += q[query + c] * k[key(j) + c];
            }
            score *= p.options.scale;
            if (pass == 0) {
              highest = std::max(highest, score);
            } else {
              sum += probability[static_cast<std::size_t>(j)] = std::exp(score - highest);
            }
          }
        }
        r.log_sum_exp.push_back(sum > 0 ? highest + std::log(sum) : -kInfinity);
        double delta = 0;
        for (std::int64_t j = 0; j < S && sum > 0; ++j) {
          const double weight =
              probability[static_cast<std::size_t>(j)] / sum * kept(p, b, h, i, j);
          for (std::size_t c = 0; c < d; ++c) {
            r.out[query + c] += weight * v[key(j) + c];
          }
        }
        for (std::size_t c = 0; c < d; ++c) {
          delta += r.out[query + c] * g[query + c];
        }
        for (std::int64_t j = 0; j < S && sum > 0; ++j) {
          const double weight = probability[static_cast<std::size_t>(j)] / sum;
          double dp = 0;
          for (std::size_t c = 0; c < d; ++c) {
            dp += g[query + c] * v[key(j) + c];
            r.dv[key(j) + c] += weight * kept(p, b, h, i, j) * g[query + c];
          }
          const double e = weight * (dp * kept(p, b, h, i, j) - delta) * p.options.scale;
          for (std::size_t c = 0; c < d; ++c) {
            r.dq[query + c] += e * k[key(j) + c];
            r.dk[key(j) + c] += e * q[query + c];
          }
        }
      }
    }
  }
  return r;
}

struct Outcome {
  Tensor out, log_sum_exp, dq, dk, dv;
};

Outcome run(const Problem& p, const AttentionInputs& in, const Tensor& dout,
            bool accumulate = false) {
  const auto [B, T, H, S, K, D] = p.size;
  const DType dtype = in.q.dtype();
  const Device device = in.q.device();
  const Shape of_q{B, T, H, D}, of_k{B, S, K, D};
  Outcome r{Tensor::empty(of_q, dtype, device), Tensor::empty(Shape{B, H, T}, DType::f32, device),
            Tensor::full(of_q, dtype, 3, device), Tensor::full(of_k, dtype, 3, device),
            Tensor::full(of_k, dtype, 3, device)};
  attention(in, r.out, r.log_sum_exp, p.options);
  attention_backward(in, r.out, r.log_sum_exp, dout,
                     {r.dq, r.dk, r.dv, accumulate, accumulate, accumulate}, p.options);
  return r;
}

// Largest difference over the scale of the values.
double difference(const Tensor& x, const std::vector<double>& want, double shift = 0) {
  const auto values = doubles(x);
  double worst = 0, scale = 0.5;
  for (std::size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::isfinite(want[i]) ? std::abs(want[i]) : 0);
  }
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (values[i] == want[i] + shift) {
      continue;  // infinities
    }
    const double apart = std::abs(values[i] - want[i] - shift);
    worst = std::max(worst, std::isfinite(apart) ? apart / (scale + shift) : kInfinity);
  }
  return worst;
}

std::vector<std::int64_t> numbers(std::int64_t count,
                                  const std::function<std::int64_t(std::int64_t)>& f) {
  std::vector<std::int64_t> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(f(i));
  }
  return values;
}

std::vector<Problem> problems() {
  std::vector<Problem> all;
  all.push_back({"one", {1, 1, 1, 1, 1, 1}});
  all.push_back({"odd", {2, 7, 3, 5, 3, 11}, {.scale = 0.3}});
  all.push_back({"one query of many keys", {2, 1, 4, 130, 2, 16}, {.scale = 0.25, .causal = true}});
  all.push_back({"causal", {2, 70, 2, 70, 2, 8}, {.scale = 0.5, .causal = true}});
  all.push_back({"causal, fewer keys than queries", {1, 9, 2, 5, 1, 8}, {.causal = true}});
  all.push_back({"causal, more keys than queries", {1, 100, 2, 190, 1, 8}, {.causal = true}});
  all.push_back(
      {"grouped, fused", {2, 67, 4, 67, 2, 16}, {.scale = 0.25, .causal = true}, {}, {}, true});
  all.push_back({"window", {1, 200, 2, 200, 1, 8}, {.causal = true, .window = 17}});
  all.push_back({"window of one", {1, 66, 1, 66, 1, 8}, {.causal = true, .window = 1}});
  all.push_back({"window, more keys", {1, 40, 1, 300, 1, 8}, {.causal = true, .window = 90}});
  all.push_back({"several tiles of keys", {1, 65, 1, 1111, 1, 8}, {.scale = 0.4}});
  all.push_back({"several tiles of keys, causal", {1, 600, 2, 600, 1, 4}, {.causal = true}});
  all.push_back(
      {"several tasks a head", {1, 1100, 1, 1100, 1, 4}, {.causal = true, .window = 600}});
  Problem padded{"padding", {3, 80, 2, 80, 1, 8}, {.scale = 0.5}};
  padded.mask = numbers(240, [](std::int64_t i) {
    return i / 80 == 0 ? i % 80 < 50 : i / 80 == 1 ? i % 80 >= 70 || i % 80 == 3 : 0;
  });
  all.push_back(padded);
  padded.name = "padding on the left, causal: the first rows see nothing";
  padded.options.causal = true;
  all.push_back(padded);
  Problem packed{"documents", {2, 150, 2, 150, 2, 8}, {.scale = 0.5}};
  packed.documents = numbers(300, [](std::int64_t i) {
    return i < 150 ? (i >= 3) + (i >= 64) + (i >= 65) + (i >= 140) : 7;
  });
  all.push_back(packed);
  packed.name = "documents, causal, padding";
  packed.options.causal = true;
  packed.mask = numbers(300, [](std::int64_t i) { return i % 11 != 0; });
  all.push_back(packed);
  Problem dropped{"dropout",
                  {2, 75, 2, 75, 1, 8},
                  {.scale = 0.3, .causal = true, .dropout = 0.3, .seed = 5, .offset = 9}};
  all.push_back(dropped);
  dropped.name = "dropout over several tiles";
  dropped.size = {1, 33, 2, 577, 2, 4};
  dropped.options.causal = false;
  dropped.options.offset = 0xfffffff0u;  // the counter carries into its upper half
  all.push_back(dropped);
  dropped.name = "dropout, wide heads, a window, groups";
  dropped.size = {1, 40, 2, 75, 1, 132};
  dropped.options = {.scale = 0.1, .causal = true, .window = 49, .dropout = 0.2, .seed = 8};
  all.push_back(dropped);
  all.push_back({"heads of 100", {1, 70, 2, 66, 2, 100}, {.scale = 0.1}});
  return all;
}

// Also compiled for the SIMT shim, which takes the small ones and runs the tests named _cuda.
class AttentionOn : public ::testing::TestWithParam<Device> {
 protected:
  static bool takes(const Problem& p) {
    return GetParam() == reprise::cpu || p.size.T * p.size.S < 40000;
  }
};
std::vector<Device> devices() {
  std::vector<Device> all{reprise::cpu};
  if (cuda_device_count() > 0) {
    all.push_back({DeviceKind::cuda, 0});
  }
  return all;
}
INSTANTIATE_TEST_SUITE_P(All, AttentionOn, ::testing::ValuesIn(devices()), [](const auto& at) {
  return std::string(at.param == reprise::cpu ? "on_cpu" : "on_cuda");
});

TEST_P(AttentionOn, AgreesWithTheFormula) {
  for (const Problem& p : problems()) {
    if (!takes(p)) {
      continue;
    }
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const double allowed = dtype == DType::f32 ? 1e-5 : 2e-2;
      const AttentionInputs in = inputs_of(p, dtype, GetParam());
      const Tensor dout = random(4, in.q.shape(), dtype).to(GetParam());
      const Oracle want = oracle(p, inputs_of(p, dtype), dout);
      const Outcome got = run(p, in, dout);
      const std::string where = p.name + " " + std::string(name(dtype));
      EXPECT_LT(difference(got.out, want.out), allowed) << where;
      EXPECT_LT(difference(got.log_sum_exp, want.log_sum_exp), 1e-5) << where;
      EXPECT_LT(difference(got.dq, want.dq), allowed) << where;
      EXPECT_LT(difference(got.dk, want.dk), allowed) << where;
      EXPECT_LT(difference(got.dv, want.dv), allowed) << where;
      const Outcome added = run(p, in, dout, true);
      EXPECT_LT(difference(added.dq, want.dq, 3), allowed) << where;
      EXPECT_LT(difference(added.dk, want.dk, 3), allowed) << where;
      EXPECT_LT(difference(added.dv, want.dv, 3), allowed) << where;
    }
  }
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())) == 0;
}

bool same_bits(const Outcome& a, const Outcome& b) {
  return same_bits(a.out, b.out) && same_bits(a.log_sum_exp, b.log_sum_exp) &&
         same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) && same_bits(a.dv, b.dv);
}

TEST(Attention, SameBitsForAnyThreadsAndStrides) {
  const int before = threads();
  for (const Problem& p : problems()) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      AttentionInputs in = inputs_of(p, dtype);
      Tensor dout = random(4, in.q.shape(), dtype);
      set_threads(1);
      const Outcome one = run(p, in, dout);
      set_threads(3);
      EXPECT_TRUE(same_bits(one, run(p, in, dout))) << p.name;
      // The same values inside wider rows, at other addresses.
      const auto wider = [](const Tensor& x) {
        const Shape& s = x.shape();
        const Tensor all = random(8, Shape{s[0], s[1], s[2] + 2, s[3]}, x.dtype());
        const Tensor inside = all.slice(2, 1, 1 + s[2]);
        inside.copy_from(x);
        return inside;
      };
      in.q = wider(in.q);
      in.k = wider(in.k);
      in.v = wider(in.v);
      dout = wider(dout);
      EXPECT_TRUE(same_bits(one, run(p, in, dout))) << p.name;
    }
  }
  set_threads(before);
}

TEST(Attention, GradientsThatAreNotWanted) {
  const Problem p{"", {2, 40, 4, 50, 2, 8}, {.causal = true}};
  const AttentionInputs in = inputs_of(p, DType::f32);
  const Tensor dout = random(4, in.q.shape(), DType::f32);
  const Outcome all = run(p, in, dout);
  for (int one = 0; one < 3; ++one) {
    const Tensor& want = one == 0 ? all.dq : one == 1 ? all.dk : all.dv;
    const Tensor got = Tensor::full(want.shape(), DType::f32, 3);
    AttentionGradients to;
    (one == 0 ? to.dq : one == 1 ? to.dk : to.dv) = got;
    attention_backward(in, all.out, all.log_sum_exp, dout, to, p.options);
    EXPECT_TRUE(same_bits(want, got)) << one;
  }
}

TEST(Attention, EmptySizes) {
  for (const Sizes size :
       {Sizes{0, 3, 2, 3, 1, 4}, Sizes{2, 0, 2, 3, 1, 4}, Sizes{2, 3, 2, 0, 1, 4},
        Sizes{2, 3, 0, 3, 0, 4}, Sizes{2, 3, 0, 3, 2, 4}}) {
    const Problem p{"", size};
    const AttentionInputs in = inputs_of(p, DType::f32);
    const Outcome got = run(p, in, random(4, in.q.shape(), DType::f32));
    for (const Tensor* x : {&got.out, &got.dq, &got.dk, &got.dv}) {
      for (const double value : doubles(*x)) {
        EXPECT_EQ(value, 0);
      }
    }
    for (const double value : doubles(got.log_sum_exp)) {
      EXPECT_EQ(value, -kInfinity);
    }
  }
}

TEST(Attention, NotANumberGoesThrough) {
  const Problem p{"", {1, 20, 1, 20, 1, 8}, {.causal = true}};
  for (int which = 0; which < 3; ++which) {
    const AttentionInputs in = inputs_of(p, DType::f32);
    const Tensor& x = which == 0 ? in.q : which == 1 ? in.k : in.v;
    x.data<float>()[8 * 12] = std::numeric_limits<float>::quiet_NaN();
    const Outcome got = run(p, in, random(4, in.q.shape(), DType::f32));
    EXPECT_TRUE(std::isnan(got.out.data<float>()[8 * 12])) << which;
    if (which != 2) {  // what is not seen is multiplied by 0, which is NaN
      EXPECT_FALSE(std::isnan(got.out.data<float>()[8 * 11])) << which;
    }
  }
}

TEST(Attention, LargeScores) {
  Problem p{"", {1, 9, 1, 9, 1, 4}, {.scale = 1e4}};
  const AttentionInputs in = inputs_of(p, DType::f32);
  const Tensor dout = random(4, in.q.shape(), DType::f32);
  const Outcome got = run(p, in, dout);
  EXPECT_LT(difference(got.out, oracle(p, in, dout).out), 1e-3);
  for (const double value : doubles(got.dq)) {
    EXPECT_TRUE(std::isfinite(value));
  }
}

TEST(Attention, VisiblePairs) {
  for (const Problem& p : problems()) {
    const auto [B, T, H, S, K, D] = p.size;
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < B; ++b) {
      for (std::int64_t i = 0; i < T; ++i) {
        for (std::int64_t j = 0; j < S; ++j) {
          count += sees(p, b, i, j) ? 1 : 0;
        }
      }
    }
    EXPECT_EQ(visible_pairs(inputs_of(p, DType::f32), p.options), count) << p.name;
  }
}

TEST(Attention, WorkspaceOnMetaIsThatOfTheDevice) {
  for (const Problem& p : problems()) {
    const auto workspace = [&](Device device) {
      AttentionInputs in = inputs_of(p, DType::bf16);
      Tensor dout = random(4, in.q.shape(), DType::bf16);
      for (Tensor* x : {&in.q, &in.k, &in.v, &dout, &in.mask, &in.documents}) {
        if (x->defined()) {
          *x = x->contiguous().to(device);
        }
      }
      const auto [B, T, H, S, K, D] = p.size;
      const auto make = [&](const Shape& shape, DType dtype) {
        return Tensor::empty(shape, dtype, device);
      };
      const Tensor out = make({B, T, H, D}, DType::bf16), lse = make({B, H, T}, DType::f32);
      const Tensor dq = make(out.shape(), DType::bf16), dk = make({B, S, K, D}, DType::bf16),
                   dv = make({B, S, K, D}, DType::bf16);
      std::vector<std::int64_t> peaks;
      for (int pass = 0; pass < 2; ++pass) {
        allocator(device).reset_peak();
        if (pass == 0) {
          attention(in, out, lse, p.options);
        } else {
          attention_backward(in, out, lse, dout, {.dq = dq, .dk = dk, .dv = dv}, p.options);
        }
        const auto report = allocator(device).report();
        peaks.push_back(report.peak[static_cast<std::size_t>(MemoryKind::workspace)]);
      }
      return peaks;
    };
    EXPECT_EQ(workspace(reprise::cpu), workspace(reprise::meta)) << p.name;
    EXPECT_GT(workspace(reprise::meta)[1], 0) << p.name;
  }
}

TEST(Attention, WorkspaceIsMuchLessThanTheProbabilities) {
  const std::int64_t T = 16384;
  const auto empty = [](const Shape& shape, DType dtype) {
    return Tensor::empty(shape, dtype, reprise::meta);
  };
  const Tensor x = empty({1, T, 1, 64}, DType::f32), lse = empty({1, 1, T}, DType::f32);
  allocator(reprise::meta).reset_peak();
  attention_backward({x, x, x, {}, {}}, x, lse, x, {x, x, x}, {.causal = true});
  const auto report = allocator(reprise::meta).report();
  EXPECT_LT(report.peak[static_cast<std::size_t>(MemoryKind::workspace)], 4 * T * T / 30);
}

TEST(Attention, WhatTheCudaSideRefuses) {
  const DryRunFor stands_for(DeviceKind::cuda);
  const auto says = [](std::int64_t T, std::int64_t D, bool backward) {
    const Tensor x = Tensor::empty({1, T, 1, D}, DType::f32, reprise::meta);
    const Tensor lse = Tensor::empty({1, 1, T}, DType::f32, reprise::meta);
    return error_of([&] {
      if (backward) {
        attention_backward({x, x, x, {}, {}}, x, lse, x, {x, x, x}, {});
      } else {
        attention({x, x, x, {}, {}}, x, lse, {});
      }
    });
  };
  EXPECT_EQ(says(3, 256, false), "no error");
  EXPECT_EQ(says(3, 256, true), "no error");
  const std::string size = " heads must have at most 256 elements on a CUDA device, got D = 257";
  EXPECT_EQ(says(3, 257, false), "[attention]" + size);
  EXPECT_EQ(says(3, 257, true), "[attention_backward]" + size);
  EXPECT_EQ(says((std::int64_t{1} << 30) + 1, 1, false),
            "[attention] T and S must be at most 1073741824 on a CUDA device, got 1073741825 and "
            "1073741825");
}

TEST(Attention, Mistakes) {
  const auto f32 = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32); };
  const auto i64 = [](const Shape& shape) { return Tensor::zeros(shape, DType::i64); };
  const Tensor q = f32({2, 3, 4, 5}), k = f32({2, 6, 2, 5});
  const Tensor out = f32({2, 3, 4, 5}), lse = f32({2, 4, 3});
  const auto says = [&](const AttentionInputs& in, const AttentionOptions& options = {}) {
    return error_of([&] { attention(in, out, lse, options); });
  };
  EXPECT_EQ(says({q, k, k, {}, {}}), "no error");
  EXPECT_EQ(says({i64({2, 3, 4, 5}), k, k, {}, {}}), "[attention] q must be f32 or bf16, got i64");
  EXPECT_EQ(says({f32({2, 3}), k, k, {}, {}}),
            "[attention] q must have four dimensions [B, T, H, D], got [2, 3]");
  EXPECT_EQ(says({q, Tensor::zeros({2, 6, 2, 5}, DType::bf16), k, {}, {}}),
            "[attention] k must be f32, got bf16");
  EXPECT_EQ(says({q, k, Tensor::zeros({2, 6, 2, 5}, DType::f32, reprise::meta), {}, {}}),
            "[attention] v must be on cpu, got meta");
  EXPECT_EQ(says({q, f32({2, 6, 5, 2}).transpose(2, 3), k, {}, {}}),
            "[attention] k must have unit inner stride, got 2: call contiguous()");
  EXPECT_EQ(says({q, f32({2, 6, 2, 4}), k, {}, {}}),
            "[attention] k must be [B, S, K, D] = [2, 6, 2, 5], got [2, 6, 2, 4]");
  EXPECT_EQ(says({q, k, f32({2, 5, 2, 5}), {}, {}}),
            "[attention] v must be [B, S, K, D] = [2, 6, 2, 5], got [2, 5, 2, 5]");
  EXPECT_EQ(says({q, f32({2, 6, 3, 5}), f32({2, 6, 3, 5}), {}, {}}),
            "[attention] H must be a multiple of K, got H = 4 and K = 3");
  EXPECT_EQ(says({f32({2, 3, 4, 0}), f32({2, 6, 2, 0}), f32({2, 6, 2, 0}), {}, {}}),
            "[attention] heads must have a size, got D = 0");
  EXPECT_EQ(says({q, k, k, {}, {}}, {.window = 2}),
            "[attention] window must be 0 without causal, got 2");
  EXPECT_EQ(says({q, k, k, {}, {}}, {.causal = true, .window = -1}),
            "[attention] window must not be negative, got -1");
  EXPECT_EQ(says({q, k, k, {}, {}}, {.dropout = 1}),
            "[attention] dropout must be in [0, 1), got 1");
  EXPECT_EQ(says({q, k, k, f32({2, 6}), {}}), "[attention] mask must be i64, got f32");
  EXPECT_EQ(says({q, k, k, i64({2, 3}), {}}),
            "[attention] mask must be [B, S] = [2, 6], got [2, 3]");
  EXPECT_EQ(says({q, k, k, {}, i64({2, 6})}),
            "[attention] documents must be [B, T] = [2, 3], got [2, 6]");
  EXPECT_EQ(says({q, k, k, {}, i64({2, 3})}),
            "[attention] documents need as many keys as queries, got T = 3 and S = 6");
  const Tensor k3 = f32({2, 3, 2, 5});
  EXPECT_EQ(
      says({q, k3, k3, {}, Tensor::from(std::vector<std::int64_t>{5, 0, 0, 1, 3, 2}, {2, 3})}),
      "[attention] documents must not decrease along T, got 0 after 5 at [0, 1]");
  EXPECT_EQ(says({q, k3, k3, {}, i64({2, 3})}, {.most_documents = 1}),
            "[attention] most_documents must not be less than there are, got 1 for 2");
  const auto masked = [&](const std::vector<std::int64_t>& mask) {
    return says({q, k3, k3, Tensor::from(mask, {2, 3}), {}}, {.padded_right = true});
  };
  EXPECT_EQ(masked({1, 1, 0, 2, 0, 0}), "no error");
  EXPECT_EQ(masked({1, 1, 1, 1, 0, 1}),
            "[attention] padded_right must hold, but the mask is 1 at [1, 2]");
  EXPECT_EQ(masked({1, 1, 1, 0, 0, 0}),
            "[attention] padded_right must hold, but the mask is 0 at [1, 0]");
  EXPECT_EQ(error_of([&] {
              attention({q, k, k, {}, {}}, f32({2, 3, 4, 6}), lse, {});
            }),
            "[attention] out must be [B, T, H, D] = [2, 3, 4, 5], got [2, 3, 4, 6]");
  EXPECT_EQ(error_of([&] {
              attention({q, k, k, {}, {}}, out, f32({2, 3, 4}), {});
            }),
            "[attention] log_sum_exp must be [B, H, T] = [2, 4, 3], got [2, 3, 4]");
  const auto backward_says = [&](const Tensor& dout, const AttentionGradients& to) {
    return error_of([&] { attention_backward({q, k, k, {}, {}}, out, lse, dout, to, {}); });
  };
  EXPECT_EQ(backward_says(out, {f32({2, 3, 4, 5}), {}, {}}), "no error");
  EXPECT_EQ(backward_says(k, {}),
            "[attention_backward] dout must be [B, T, H, D] = [2, 3, 4, 5], got [2, 6, 2, 5]");
  EXPECT_EQ(backward_says(out, {k, {}, {}}),
            "[attention_backward] dq must be [B, T, H, D] = [2, 3, 4, 5], got [2, 6, 2, 5]");
  EXPECT_EQ(backward_says(out, {{}, q, {}}),
            "[attention_backward] dk must be [B, S, K, D] = [2, 6, 2, 5], got [2, 3, 4, 5]");
  EXPECT_EQ(backward_says(out, {{}, {}, q}),
            "[attention_backward] dv must be [B, S, K, D] = [2, 6, 2, 5], got [2, 3, 4, 5]");
}

}  // namespace
}  // namespace reprise::kernels

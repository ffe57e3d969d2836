// What the rows of docs/conformance.md share: a small model, and the check that every row passes.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/elementwise.h"
#include "autograd/matmul.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "autograd/tape.h"
#include "core/philox.h"
#include "distributed/reducer.h"
#include "nn/linear.h"

namespace reprise::testing {

// Calls body(communicator) on every rank: of this process's threads, or of the job that this
// process is a rank of.
void on_ranks(const std::function<void(distributed::Communicator&)>& body);

using Values = std::vector<std::vector<float>>;  // by parameter; empty: absent

// Three layers, of which a row's forward uses some.
struct Net {
  static constexpr std::int64_t kWidth = 12, kRows = 6;  // a rank's rows

  bool segments = true;  // false: segment() only calls
  int rank = 0;
  nn::Linear l1, l2, l3;
  std::vector<Parameter*> parameters;

  explicit Net(DType dtype = DType::f32)
      : l1(kWidth, kWidth, {.bias = true}, {cpu, dtype}),
        l2(kWidth, kWidth, {.bias = true}, {cpu, dtype}),
        l3(kWidth, kWidth, {.bias = true}, {cpu, dtype}) {
    nn::Linear* layers[] = {&l1, &l2, &l3};
    for (std::size_t i = 0; i < 3; ++i) {
      const std::string name = "l" + std::to_string(i + 1);
      layers[i]->weight.set_name(name + ".weight");
      layers[i]->bias.set_name(name + ".bias");
      parameters.push_back(&layers[i]->weight);
      parameters.push_back(&layers[i]->bias);
    }
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const Tensor value = parameters[i]->write();
      for (std::int64_t k = 0; k < value.numel(); ++k) {
        const float x = 0.6f * (uniform(philox(40 + i, static_cast<std::uint64_t>(k))[0]) - 0.5f);
        if (dtype == DType::f32) {
          value.data<float>()[k] = x;
        } else {
          value.data<bfloat16>()[k] = to_bfloat16(x);
        }
      }
    }
  }

  template <class F, class... A>
  decltype(auto) segment(F&& f, A&&... args) const {
    if (segments) {
      return checkpoint("segment", std::forward<F>(f), std::forward<A>(args)...);
    }
    return std::invoke(std::forward<F>(f), std::forward<A>(args)...);
  }
  // A layer and a non-linear function, so that a replay has something to do.
  static Variable block(const nn::Linear& layer, Variable x) { return silu(layer(std::move(x))); }

  Values gradients() const {
    Values all;
    for (const Parameter* p : parameters) {
      all.push_back(p->has_gradient() ? p->gradient().to_vector<float>() : std::vector<float>());
    }
    return all;
  }
  void zero() {
    for (Parameter* p : parameters) {
      p->zero_gradient();
    }
  }
  void update() {
    for (Parameter* p : parameters) {
      if (p->has_gradient()) {
        float* value = p->write().data<float>();
        for (std::int64_t i = 0; i < p->value().numel(); ++i) {
          value[i] -= 0.1f * p->gradient().data<float>()[i];
        }
      }
    }
  }
};

using Forward = std::function<Variable(Net&, Variable x, int iteration)>;

struct Conform {
  int micro_batches = 1;
  bool tied = false;  // l1.weight stands for l2's too: the list has it once
  distributed::ReducerOptions options = {};
};

// Rows of rank r in an iteration: micro-batch m of k.
inline Tensor rows_of(int rank, int iteration, int micro = 0, int micro_batches = 1) {
  const std::int64_t count = Net::kRows / micro_batches;
  std::vector<float> values;
  for (std::int64_t i = 0; i < count * Net::kWidth; ++i) {
    const std::uint64_t at = static_cast<std::uint64_t>(micro * count * Net::kWidth + i);
    values.push_back(
        uniform(philox(static_cast<std::uint64_t>(1000 + 100 * iteration + rank), at)[0]) - 0.5f);
  }
  return Tensor::from(values, {count, Net::kWidth});
}

constexpr int kIterations = 5;

// Five steps; the gradients of each.
inline std::vector<Values> train(distributed::Communicator& ranks, const Forward& forward,
                                 bool segments, distributed::BucketOptions buckets,
                                 const Conform& conform) {
  Net net;
  net.segments = segments;
  net.rank = ranks.rank();
  distributed::ReducerOptions options = conform.options;
  options.buckets = buckets;
  distributed::Reducer reducer(ranks, net.parameters, options);
  Tape tape;
  std::vector<Values> result;
  const int k = conform.micro_batches;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    net.zero();
    for (int m = 0; m < k; ++m) {
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      BackwardOptions backward;
      backward.scale = {1.0 / k};
      const Variable loss =
          mean_square(forward(net, rows_of(ranks.rank(), iteration, m, k), iteration));
      m + 1 < k ? reducer.accumulate(loss, backward) : reducer.backward(loss, backward);
    }
    result.push_back(net.gradients());
    net.update();
  }
  return result;
}

// The whole batch in one process, without segments: one backward a step.
inline std::vector<Values> train_alone(int ranks, const Forward& forward) {
  Net net;
  net.segments = false;
  std::vector<Values> result;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    net.zero();
    Tape tape;
    const Tape::Scope scope(tape);
    std::vector<Variable> losses;
    for (int r = 0; r < ranks; ++r) {
      net.rank = r;
      losses.push_back(mean_square(forward(net, rows_of(r, iteration), iteration)));
    }
    BackwardOptions options;
    options.scale.assign(static_cast<std::size_t>(ranks), 1.0 / ranks);
    backward(losses, options);
    result.push_back(net.gradients());
    net.update();
  }
  return result;
}

inline bool same_bits(const std::vector<Values>& a, const std::vector<Values>& b) {
  for (std::size_t s = 0; s < a.size(); ++s) {
    for (std::size_t p = 0; p < a[s].size(); ++p) {
      if (a[s][p].size() != b[s][p].size() ||
          (!a[s][p].empty() &&
           std::memcmp(a[s][p].data(), b[s][p].data(), 4 * a[s][p].size()) != 0)) {
        return false;
      }
    }
  }
  return a.size() == b.size();
}

inline void expect_close(const std::vector<Values>& got, const std::vector<Values>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t s = 0; s < got.size(); ++s) {
    for (std::size_t p = 0; p < got[s].size(); ++p) {
      ASSERT_EQ(got[s][p].size(), expected[s][p].size()) << "step " << s << ", parameter " << p;
      for (std::size_t i = 0; i < got[s][p].size(); ++i) {
        const float e = expected[s][p][i];
        ASSERT_NEAR(got[s][p][i], e, 5e-5 + 1.3e-6 * std::abs(e))
            << "step " << s << ", parameter " << p;
      }
    }
  }
}

// With segments the bits of the run without, for small and large buckets, on every rank; and the
// gradients of one process with the whole batch.
inline void expect_conformance(const Forward& forward, const Conform& conform = {}) {
  on_ranks([&](distributed::Communicator& ranks) {
    const std::vector<Values> plain = train(ranks, forward, false, {}, conform);
    EXPECT_TRUE(same_bits(train(ranks, forward, true, {}, conform), plain));
    EXPECT_TRUE(same_bits(train(ranks, forward, true, {1, 1}, conform), plain));
    expect_close(plain, train_alone(ranks.size(), forward));
    EXPECT_FALSE(same_bits({plain[0]}, {plain[1]}));
  });
}

}  // namespace reprise::testing

#include "tests/simt/fused_simt.h"

#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "core/dtype.h"
#include "core/error.h"
#include "tests/simt/capture_simt.h"
#include "tests/simt/simt.h"

namespace reprise::testing {

FusedRecord& fused_record() {
  static FusedRecord record;
  return record;
}
std::string& fused_refusal_of_library() {
  static std::string why;
  return why;
}
std::string& fused_library_missing() {
  static std::string why;
  return why;
}

namespace {

using kernels::FusedGraph;
using kernels::FusedPlan;
using kernels::FusedRole;

// One sequence of one run.
class Sequence {
 public:
  Sequence(const FusedGraph& graph, const FusedPlan::Pointers& pointers, std::int64_t n)
      : g_(graph), pointers_(pointers), n_(n), queries_(graph.T), keys_(graph.S) {
    if (g_.padded) {
      queries_ = static_cast<const std::int32_t*>(at(FusedRole::query_tokens))[n];
      keys_ = static_cast<const std::int32_t*>(at(FusedRole::key_tokens))[n];
    }
    ensure(queries_ >= 0 && queries_ <= g_.T && keys_ >= 0 && keys_ <= g_.S, "tokens fit");
  }

  void run() const {
    for (std::int64_t h = 0; h < g_.H; ++h) {
      for (std::int64_t i = 0; i < queries_ && !g_.backward; ++i) {
        forward(h, i);
      }
    }
    for (std::int64_t h = 0; h < g_.K && g_.backward; ++h) {
      backward(h);
    }
  }

 private:
  void* at(FusedRole role, bool offsets = false) const {
    void* const pointer = pointers_.at(static_cast<std::size_t>(fused_id(role, offsets)));
    ensure(pointer != nullptr, "{} has an address", name(role));
    return pointer;
  }
  std::int64_t place(FusedRole role, std::int64_t h, std::int64_t i) const {
    const auto& s = g_.strides.at(static_cast<std::size_t>(role));
    const std::int64_t begin =
        g_.ragged ? static_cast<const std::int64_t*>(at(role, true))[n_] : n_ * s.batch;
    return begin + h * s.head + i * s.token;
  }
  std::vector<double> row(FusedRole role, std::int64_t h, std::int64_t i) const {
    ensure(reinterpret_cast<std::uintptr_t>(at(role)) % 16 == 0, "{} is aligned", name(role));
    const auto* const from = static_cast<const bfloat16*>(at(role)) + place(role, h, i);
    std::vector<double> values;
    for (std::int64_t c = 0; c < g_.D; ++c) {
      values.push_back(to_float(from[c]));
    }
    return values;
  }
  void write(FusedRole role, std::int64_t h, std::int64_t i, const std::vector<double>& row) const {
    auto* const to = static_cast<bfloat16*>(at(role)) + place(role, h, i);
    for (std::size_t c = 0; c < row.size(); ++c) {
      to[c] = to_bfloat16(static_cast<float>(row[c]));
    }
    simt::define_memory(to, row.size() * 2);
  }
  float& statistic(std::int64_t h, std::int64_t i) const {
    return static_cast<float*>(at(FusedRole::stats))[place(FusedRole::stats, h, i)];
  }

  bool sees(std::int64_t i, std::int64_t j) const {
    const std::int64_t from = i + (g_.from_last_key ? keys_ - queries_ : 0);
    return (!g_.causal || j <= from) && (g_.window == 0 || from - g_.window < j);
  }
  double score(const std::vector<double>& q, std::int64_t h, std::int64_t j) const {
    return static_cast<double>(g_.scale) * dot(q, row(FusedRole::k, h, j));
  }
  static double dot(const std::vector<double>& x, const std::vector<double>& y) {
    double sum = 0;
    for (std::size_t c = 0; c < x.size(); ++c) {
      sum += x[c] * y[c];
    }
    return sum;
  }
  static void add(std::vector<double>& to, double weight, const std::vector<double>& x) {
    for (std::size_t c = 0; c < x.size(); ++c) {
      to[c] += weight * x[c];
    }
  }

  void forward(std::int64_t h, std::int64_t i) const {
    const std::int64_t group = h / (g_.H / g_.K);
    const std::vector<double> q = row(FusedRole::q, h, i);
    std::vector<double> weights, out(static_cast<std::size_t>(g_.D));
    double highest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (std::int64_t j = 0; j < keys_; ++j) {
      weights.push_back(score(q, group, j));
      highest = sees(i, j) ? std::max(highest, weights.back()) : highest;
    }
    ensure(std::isfinite(highest), "a query that sees nothing is not given to the library");
    for (std::int64_t j = 0; j < keys_; ++j) {
      double& weight = weights[static_cast<std::size_t>(j)];
      weight = sees(i, j) ? std::exp(weight - highest) : 0;
      sum += weight;
    }
    for (std::int64_t j = 0; j < keys_; ++j) {
      add(out, weights[static_cast<std::size_t>(j)] / sum, row(FusedRole::v, group, j));
    }
    write(FusedRole::out, h, i, out);
    statistic(h, i) = static_cast<float>(highest + std::log(sum));
    simt::define_memory(&statistic(h, i), 4);
  }

  // The keys of one head, and the queries of the heads that share it.
  void backward(std::int64_t group) const {
    const std::vector<double> zero(static_cast<std::size_t>(g_.D));
    std::vector<std::vector<double>> dk(static_cast<std::size_t>(keys_), zero), dv = dk;
    for (std::int64_t h = group * (g_.H / g_.K); h < (group + 1) * (g_.H / g_.K); ++h) {
      for (std::int64_t i = 0; i < queries_; ++i) {
        const std::vector<double> q = row(FusedRole::q, h, i), g = row(FusedRole::dout, h, i);
        const double delta = dot(g, row(FusedRole::out, h, i));
        std::vector<double> dq = zero;
        for (std::int64_t j = 0; j < keys_; ++j) {
          if (!sees(i, j)) {
            continue;
          }
          const double p = std::exp(score(q, group, j) - static_cast<double>(statistic(h, i)));
          const double e =
              p * (dot(g, row(FusedRole::v, group, j)) - delta) * static_cast<double>(g_.scale);
          add(dq, e, row(FusedRole::k, group, j));
          add(dk[static_cast<std::size_t>(j)], e, q);
          add(dv[static_cast<std::size_t>(j)], p, g);
        }
        write(FusedRole::dq, h, i, dq);
      }
    }
    for (std::int64_t j = 0; j < keys_; ++j) {
      write(FusedRole::dk, group, j, dk[static_cast<std::size_t>(j)]);
      write(FusedRole::dv, group, j, dv[static_cast<std::size_t>(j)]);
    }
  }

  const FusedGraph& g_;
  const FusedPlan::Pointers& pointers_;
  std::int64_t n_, queries_, keys_;
};

class Plan final : public FusedPlan {
 public:
  explicit Plan(const FusedGraph& graph) : graph_(graph) {}
  void run(const Pointers& pointers, void* workspace, void*) const override {
    ensure(workspace != nullptr && reinterpret_cast<std::uintptr_t>(workspace) % 64 == 0,
           "the workspace is aligned");
    fused_record().runs.push_back({graph_, pointers});
    if (simt::options().corners) {
      return;
    }
    on_device("fused attention", [graph = graph_, pointers] {
      for (std::int64_t n = 0; n < graph.batch; ++n) {
        Sequence(graph, pointers, n).run();
      }
    });
  }

 private:
  FusedGraph graph_;
};

class StandIn final : public kernels::FusedLibrary {
 public:
  std::unique_ptr<FusedPlan> plan(const FusedGraph& graph, std::int64_t most_bytes,
                                  std::string& why) override {
    if (!fused_library_missing().empty()) {
      kernels::fail_without_cudnn(fused_library_missing());
    }
    ensure(most_bytes > 0, "the library has a workspace");
    fused_record().asked.push_back(graph);
    why = fused_refusal_of_library();
    return why.empty() ? std::make_unique<Plan>(graph) : nullptr;
  }
};

}  // namespace
}  // namespace reprise::testing

namespace reprise::kernels::cuda {

FusedLibrary* fused_library() {
  static testing::StandIn one;
  return &one;
}

}  // namespace reprise::kernels::cuda

// A model of toy ops with what makes readiness hard: a weight tied over blocks and used inside
// nested segments, dropout, an unused parameter, and one that only some ranks use.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "core/philox.h"
#include "tests/autograd/toy_ops.h"

namespace reprise::testing {

struct ToyModel {
  static constexpr std::int64_t kWidth = 96;
  static constexpr int kBlocks = 6;
  std::vector<std::unique_ptr<Parameter>> owned;
  std::vector<Parameter*> parameters;  // tied, branch, unused, then two a block

  explicit ToyModel(int extra = 0) {
    add("tied", kWidth);
    add("branch", kWidth);
    add("unused", kWidth);
    for (int b = 0; b < kBlocks; ++b) {
      add("block." + std::to_string(b) + ".scale", kWidth);
      add("block." + std::to_string(b) + ".bias", kWidth);
    }
    for (int e = 0; e < extra; ++e) {
      add("extra." + std::to_string(e), kWidth);
    }
  }

  void add(const std::string& name, std::int64_t width) {
    std::vector<float> values;
    for (std::int64_t i = 0; i < width; ++i) {
      values.push_back(uniform(philox(parameters.size() + 100, static_cast<std::uint64_t>(i))[0]) -
                       0.4f);
    }
    owned.push_back(std::make_unique<Parameter>(name, Tensor::from(values, {width})));
    parameters.push_back(owned.back().get());
  }

  Variable block(Variable x, int b, Generator& generator) {
    auto body = [&](const Variable& in) {
      Variable h = toy_mul_add(in, *parameters[3 + 2 * static_cast<std::size_t>(b)],
                               *parameters[4 + 2 * static_cast<std::size_t>(b)]);
      h = checkpoint("inner", [&] { return toy_mul(toy_tanh(h), *parameters[0]); });
      return toy_dropout(toy_add(h, in), 0.1f, generator);
    };
    return checkpoint("block", body, x);
  }

  // `branch` says whether the parameter of that name takes part.
  Variable loss(const Tensor& data, std::uint64_t seed, bool branch) {
    Generator generator{seed, 0};
    Variable x = data;
    for (int b = 0; b < kBlocks; ++b) {
      x = block(std::move(x), b, generator);
    }
    if (branch) {
      x = toy_mul(x, *parameters[1]);
    }
    return toy_sum(toy_square(x));
  }

  void zero() {
    for (Parameter* p : parameters) {
      p->zero_gradient();
    }
  }
};

inline Tensor toy_data(std::uint64_t seed) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < ToyModel::kWidth; ++i) {
    values.push_back(uniform(philox(seed, static_cast<std::uint64_t>(i))[0]) - 0.5f);
  }
  return Tensor::from(values, {ToyModel::kWidth});
}

}  // namespace reprise::testing

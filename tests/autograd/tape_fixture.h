// What the tests of the tape share: small tensors, a count of the toy ops' calls, exact error
// texts.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "autograd/tape.h"
#include "tests/autograd/toy_ops.h"

namespace reprise::testing {

// One element per float.
inline Tensor vec(std::vector<float> values, Device device = cpu) {
  const auto n = static_cast<std::int64_t>(values.size());
  return Tensor::from(values, {n}, device);
}
inline std::vector<float> numbers(const Tensor& tensor) {
  return tensor.to_vector<float>();
}
inline std::vector<float> numbers(const Variable& variable) {
  return numbers(variable.tensor());
}

// Counts the calls of the toy ops while it lives.
class CallCount {
 public:
  CallCount() {
    ToyHook::call = [this](std::string_view op, bool backward) {
      ++(backward ? backwards_ : forwards_)[std::string(op)];
      ++(backward ? all_backwards_ : all_forwards_);
    };
  }
  ~CallCount() { ToyHook::call = nullptr; }
  CallCount(const CallCount&) = delete;

  std::int64_t forwards(const std::string& op) { return forwards_[op]; }
  std::int64_t backwards(const std::string& op) { return backwards_[op]; }
  std::int64_t forwards() const { return all_forwards_; }
  std::int64_t backwards() const { return all_backwards_; }
  void clear() {
    forwards_.clear();
    backwards_.clear();
    all_forwards_ = all_backwards_ = 0;
  }

 private:
  std::map<std::string, std::int64_t> forwards_, backwards_;
  std::int64_t all_forwards_ = 0, all_backwards_ = 0;
};

// The text of the Error that f throws; fails the test when it throws none, or another kind.
template <class F>
std::string error_of(F&& f) {
  try {
    std::forward<F>(f)();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& other) {
    ADD_FAILURE() << "not an Error: " << other.what();
    return {};
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

// Every test ends with the bytes it started with and no damaged guard.
class TapeTest : public ::testing::Test {
 protected:
  // Not SetUp and TearDown: the members of derived fixtures come after, and go before.
  TapeTest() {
    allocator(cpu).set_poison(true);
    bytes_before_ = live();
  }
  ~TapeTest() override {
    ToyHook::call = nullptr;
    allocator(cpu).set_fault(nullptr);
    EXPECT_EQ(live(), bytes_before_);
    EXPECT_EQ(allocator(cpu).damaged_guards(), 0);
    allocator(cpu).set_poison(false);
  }
  static std::int64_t live() { return allocator(cpu).report().live_bytes; }
  static std::int64_t live(MemoryKind kind) {
    return allocator(cpu).report().live[static_cast<std::size_t>(kind)];
  }

 private:
  std::int64_t bytes_before_ = 0;
};

// Policies used all over the tests, by the name that a failure prints.
inline std::vector<std::pair<std::string, Policies>> policy_examples() {
  std::vector<std::pair<std::string, Policies>> all;
  for (const std::string& name : Policies::names()) {
    all.emplace_back(name, Policies::named(name));
  }
  all.emplace_back("tanh", Policies().set("*", keep_ops({"toy_tanh"})));
  all.emplace_back("tanh or all saved",
                   Policies().set("b*", keep_ops({"toy_tanh"}) | keep_all()).set("a", keep_all()));
  return all;
}

}  // namespace reprise::testing

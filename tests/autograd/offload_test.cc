// Values of the tape in host memory: bytes of both accounts, gradients, order of the copies, and
// failures in the middle of them.
#include <cstring>
#include <memory>

#include "core/host_copy.h"
#include "tests/autograd/tape_fixture.h"
#include "tests/core/cuda_stand_in.h"

namespace reprise::testing {
namespace {

constexpr std::int64_t kElements = 64, kBytes = 4 * kElements;
constexpr int kBlocks = 12;

struct Injected : std::runtime_error {
  Injected() : std::runtime_error("injected") {}
};

// Twelve blocks of five ops; each saves what it reads.
struct Stack {
  explicit Stack(Device device = cpu) : device(device) {
    for (int i = 0; i < kBlocks; ++i) {
      const Tensor value = Tensor::full({kElements}, DType::f32, 0.3 + 0.1 * i, device);
      weights.push_back(std::make_unique<Parameter>(std::to_string(i), value, true));
    }
  }
  Variable block(Variable x, int i) const {
    Variable h = toy_tanh(toy_mul(x, *weights[static_cast<std::size_t>(i)]));
    return toy_add(toy_square(toy_tanh(std::move(h))), std::move(x));
  }
  Variable operator()(bool segments = true) const {
    Variable x(Tensor::full({kElements}, DType::f32, 0.5, device));
    for (int i = 0; i < kBlocks; ++i) {
      x = segments ? checkpoint("block", [&] { return block(std::move(x), i); })
                   : block(std::move(x), i);
    }
    return toy_sum(std::move(x));
  }
  std::vector<std::vector<float>> gradients() {
    std::vector<std::vector<float>> all;
    for (auto& w : weights) {
      all.push_back(numbers(w->gradient()));
    }
    forget();
    return all;
  }
  void forget() {
    for (auto& w : weights) {
      w->zero_gradient();
    }
  }
  Device device;
  std::vector<std::unique_ptr<Parameter>> weights;
};

class Offloading : public TapeTest {
 protected:
  Offloading() { EXPECT_EQ(host_live(), 0); }
  ~Offloading() override {
    allocator(host_of(cpu)).set_fault(nullptr);
    EXPECT_EQ(host_live(), 0);
  }
  static std::int64_t host_live() { return allocator(host_of(cpu)).report().live_bytes; }
};

Policies kept_and_offloaded(int distance = 0) {
  return Policies().set("*", keep_all()).offload("*").offload_outside().offload_distance(distance);
}

TEST_F(Offloading, LowersTheDevicesPeakAsPredictedAndChangesNoBit) {
  Stack stack, shadow(meta);
  const StepReport plain = measure_step([&] { return stack(); }, Policies::named("keep-all"), cpu);
  const auto expected = stack.gradients();
  std::int64_t last = plain.peak_transient_bytes;
  for (const int distance : {8, 2, 0}) {
    const Policies policies = kept_and_offloaded(distance);
    const StepReport step = measure_step([&] { return stack(); }, policies, cpu);
    EXPECT_EQ(stack.gradients(), expected);
    EXPECT_LT(step.peak_transient_bytes, last) << distance;
    last = step.peak_transient_bytes;
    EXPECT_EQ(step.tape.replayed_records, 0);
    // Three values a block; the last ones would come back before they have left.
    EXPECT_LE(step.tape.offloaded_bytes, 3 * kBlocks * kBytes);
    EXPECT_GT(step.tape.offloaded_bytes, (3 * kBlocks - distance - 4) * kBytes);
    EXPECT_LE(step.host_peak_bytes, step.tape.offloaded_bytes);
    EXPECT_GT(step.host_peak_bytes, 0);
    const StepReport predicted = dry_run([&] { return shadow(); }, policies);
    EXPECT_EQ(predicted.peak_bytes, step.peak_bytes);
    EXPECT_EQ(predicted.host_peak_bytes, step.host_peak_bytes);
    EXPECT_EQ(predicted.at_peak, step.at_peak);
    shadow.forget();
  }
  // Of 37 values that keep-all holds, what a block wants is left.
  EXPECT_LE(last, 6 * kBytes);
}

// Around: records outside of segments, and what a segment starts from. Inside: what an inner
// segment starts from, while the outer one's replay waits for the sweep to come to it.
TEST_F(Offloading, AroundAndInsideASegment) {
  Stack stack;
  const auto forward = [&] {
    Variable x = toy_square(Variable(Tensor::full({kElements}, DType::f32, 0.5)));
    x = checkpoint("outer", [&] {
      for (int i = 0; i < kBlocks; ++i) {
        x = checkpoint("inner", [&] { return stack.block(std::move(x), i); });
      }
      return x;
    });
    return toy_sum(toy_square(toy_mul(std::move(x), *stack.weights[0])));
  };
  // Of the sweep: while a segment is open, what its inner ones start from stays.
  const auto from_here = [](const Tape&) { allocator(cpu).reset_peak(); };
  const StepReport plain = measure_step(forward, {}, cpu, {}, from_here);
  const auto expected = stack.gradients();
  struct Case {
    const char* what;
    Policies policies;
    std::int64_t most, least;
  };
  const Case cases[] = {
      {"around", Policies().offload("outer").offload_outside(), 6 * kBytes, 3 * kBytes},
      {"inside", Policies().offload("inner"), kBlocks * kBytes, (kBlocks - 2) * kBytes},
      {"both", Policies().offload("*").offload_outside(), (kBlocks + 6) * kBytes,
       (kBlocks + 1) * kBytes}};
  for (Case c : cases) {
    const StepReport step =
        measure_step(forward, c.policies.offload_distance(0), cpu, {}, from_here);
    EXPECT_EQ(stack.gradients(), expected) << c.what;
    EXPECT_LE(step.tape.offloaded_bytes, c.most) << c.what;
    EXPECT_GE(step.tape.offloaded_bytes, c.least) << c.what;
    EXPECT_EQ(step.tape.replayed_records, plain.tape.replayed_records) << c.what;
    if (c.what != std::string("around")) {
      EXPECT_LT(step.peak_transient_bytes, plain.peak_transient_bytes / 2) << c.what;
    }
  }
}

TEST_F(Offloading, SavedValuesOfRecordsOutsideOfSegments) {
  Stack stack;
  const StepReport plain = measure_step([&] { return stack(false); }, {}, cpu);
  const auto expected = stack.gradients();
  const Policies policies = Policies().offload_outside().offload_distance(1);
  const StepReport step = measure_step([&] { return stack(false); }, policies, cpu);
  EXPECT_EQ(stack.gradients(), expected);
  EXPECT_GE(step.host_peak_bytes, (3 * kBlocks - 3) * kBytes);
  EXPECT_LT(step.peak_transient_bytes, plain.peak_transient_bytes / 3);
}

TEST_F(Offloading, OnlyWhatTheRuleNames) {
  Stack stack;
  const auto bytes = [&](Policies policies) {
    const StepReport step =
        measure_step([&] { return stack(); }, policies.offload_distance(0), cpu);
    stack.gradients();
    return step.tape.offloaded_bytes;
  };
  const Policies kept = Policies().set("*", keep_all());
  EXPECT_EQ(bytes(kept), 0);
  EXPECT_EQ(bytes(Policies(kept).offload("other")), 0);
  const std::int64_t tanh = bytes(Policies(kept).offload("block", offload_ops({"toy_tanh"})));
  EXPECT_GE(tanh, 2 * (kBlocks - 1) * kBytes);
  EXPECT_LE(tanh, 2 * kBlocks * kBytes);
  EXPECT_EQ(bytes(Policies(kept).offload("block", offload_named({"nobody"}))), 0);
  // The first rule that matches.
  EXPECT_EQ(bytes(Policies(kept).offload("b*", offload_named({"nobody"})).offload("*")), 0);
  const auto constants = [](const Candidate& c) { return c.op.empty() && c.ordinal == -1; };
  EXPECT_EQ(bytes(Policies(kept).offload("*", constants)), kBytes);
}

TEST_F(Offloading, AHandleKeepsAValueWhereItIs) {
  Tape tape;
  Parameter w("w", Tensor::full({kElements}, DType::f32, 2), true);
  const Tape::Scope scope(tape, kept_and_offloaded());
  Variable held = toy_square(toy_mul(Variable(Tensor::full({kElements}, DType::f32, 3)), w));
  Variable y = toy_square(held);
  for (int i = 0; i < 3; ++i) {
    y = toy_scale(std::move(y), 1);
  }
  EXPECT_EQ(host_live(), 2 * kBytes) << "the constant and the product";
  EXPECT_EQ(held.tensor().data<float>()[0], 36);
  held = Variable();
  y = toy_scale(std::move(y), 1);
  EXPECT_EQ(host_live(), 3 * kBytes) << "it leaves once the handle is gone";
  const Variable loss = toy_sum(std::move(y));
  backward(loss);
  EXPECT_EQ(w.gradient().data<float>()[0], 4 * 2 * 2 * 2 * 3 * 3 * 3 * 3);
}

TEST_F(Offloading, MemoryOfTheUsersStays) {
  const Tensor mine = Tensor::full({kElements}, DType::f32, 3);
  std::vector<float> mapped(kElements, 2);
  Parameter w("w", Tensor::full({kElements}, DType::f32, 2), true);
  Tape tape;
  const Tape::Scope scope(tape, kept_and_offloaded());
  Variable y = toy_mul(Variable(mine), w);
  y = toy_mul(Variable(Tensor::wrap(mapped.data(), {kElements}, DType::f32)), std::move(y));
  y = toy_mul(toy_mul(std::move(y), w), w);
  y = toy_scale(toy_scale(std::move(y), 1), 1);
  EXPECT_EQ(tape.report().offloaded_bytes, 2 * kBytes) << "the products";
  backward(toy_sum(std::move(y)));
  EXPECT_EQ(w.gradient().data<float>()[0], 3 * 2 * 3 * 2 * 2);
}

TEST_F(Offloading, ASecondSweepFindsWhatTheFirstBroughtBack) {
  Stack stack;
  std::vector<std::vector<float>> expected;
  for (const bool offloaded : {false, true}) {
    Tape tape;
    const Tape::Scope scope(tape, offloaded ? kept_and_offloaded() : Policies());
    const Variable loss = stack();
    backward(loss, {.keep = true});
    const std::int64_t fetched = tape.report().fetched_bytes;
    backward(loss);
    if (!offloaded) {
      expected = stack.gradients();
      continue;
    }
    EXPECT_GE(fetched, (3 * kBlocks - 3) * kBytes);
    EXPECT_LT(tape.report().fetched_bytes, fetched / 4);
    EXPECT_EQ(stack.gradients(), expected);
  }
}

TEST_F(Offloading, ATapeThatIsResetLetsGoOfHostMemory) {
  Stack stack;
  Tape tape;
  const Tape::Scope scope(tape, kept_and_offloaded());
  const Variable loss = stack();
  EXPECT_GT(host_live(), 0);
  tape.reset();
  EXPECT_EQ(host_live(), 0);
}

// Both accounts, and the runtime's own calls, fail at every k, in forward and in backward.
TEST_F(Offloading, FailsAtEveryCallAndTheTapeIsUsable) {
  Stack stack;
  Tape tape;
  const Tape::Scope scope(tape, kept_and_offloaded(2));
  backward(stack());
  const auto expected = stack.gradients();
  std::int64_t in_forward = 0, in_backward = 0;
  for (const bool runtime : {false, true}) {
    for (int k = 0;; ++k) {
      int left = -1;
      const auto count = [&left] {
        if (left >= 0 && left-- == 0) {
          throw Injected();
        }
      };
      CudaStandIn::Options options;
      options.first_stream_is_host = true;
      options.fault = [&](const char* call) {
        if (runtime && std::strcmp(call, "destroy_stream") != 0) {
          count();
        }
      };
      const auto device = std::make_shared<CudaStandIn>(options);
      Streams streams(device);
      const CopiesThrough through(streams);
      const auto fault = [&](std::size_t) { count(); };
      if (!runtime) {
        allocator(cpu).set_fault(fault);
        allocator(host_of(cpu)).set_fault(fault);
      }
      bool swept = false, failed = false;
      left = k;
      try {
        const Variable loss = stack();
        swept = true;
        backward(loss);
      } catch (const Injected&) {
        failed = true;
      }
      left = -1;
      allocator(cpu).set_fault(nullptr);
      allocator(host_of(cpu)).set_fault(nullptr);
      ++(swept ? in_backward : in_forward);
      if (failed && !swept) {
        tape.reset();
      }
      stack.forget();
      EXPECT_EQ(host_live(), 0) << k;
      backward(stack());
      EXPECT_EQ(stack.gradients(), expected) << k;
      ASSERT_TRUE(device->violations().empty()) << device->violations()[0];
      if (!failed) {
        break;
      }
    }
  }
  EXPECT_GT(in_forward, 200);
  EXPECT_GT(in_backward, 200);
}

// The copy back of a block's values begins before the sweep comes to the block: when its first
// backward runs, the values of the block below are on their way, though nobody has waited for them.
TEST_F(Offloading, CopiesBackBeginAheadOfTheSweep) {
  Stack stack;
  CudaStandIn::Options options;
  options.first_stream_is_host = true;
  const auto device = std::make_shared<CudaStandIn>(options);
  Streams streams(device);
  const CopiesThrough through(streams);
  Tape tape;
  const Tape::Scope scope(tape, kept_and_offloaded(10));
  const Variable loss = stack();
  const std::int64_t left = device->count("copy");
  EXPECT_GT(left, 3 * (kBlocks - 4));
  int backwards = 0;
  std::vector<std::int64_t> ahead;
  ToyHook::call = [&](std::string_view, bool is_backward) {
    // A block has five records, and three values.
    if (is_backward && ++backwards % 5 == 2 && backwards > 15 && backwards < 5 * (kBlocks - 1)) {
      ahead.push_back(device->count("copy") - left - tape.report().fetched_bytes / kBytes);
    }
  };
  backward(loss);
  ToyHook::call = nullptr;
  ASSERT_FALSE(ahead.empty());
  for (const std::int64_t copies : ahead) {
    EXPECT_GE(copies, 3);
  }
  EXPECT_TRUE(device->violations().empty()) << device->violations()[0];
}

TEST_F(Offloading, NamedPolicies) {
  Stack stack;
  measure_step([&] { return stack(); }, {}, cpu);
  const auto expected = stack.gradients();
  for (const std::string name : {"keep-all+offload", "inputs-only+offload", "nested+offload"}) {
    const StepReport step = measure_step([&] { return stack(); }, Policies::named(name), cpu);
    EXPECT_EQ(stack.gradients(), expected) << name;
    EXPECT_GT(step.host_peak_bytes, 0) << name;
  }
}

TEST_F(Offloading, WhatIsInHostMemoryIsExplained) {
  Stack stack;
  Tape tape;
  const Tape::Scope scope(tape, kept_and_offloaded(0));
  const Variable loss = stack();
  const std::string text = explain(tape);
  EXPECT_NE(text.find("            256            512            768        0              0\n"),
            std::string::npos)
      << text;
  backward(loss);
}

TEST_F(Offloading, Mistakes) {
  EXPECT_EQ(error_of([] { Policies().offload("s*", Offload()); }),
            "[policy] what leaves segments \"s*\" is empty");
  EXPECT_EQ(error_of([] { Policies().offload_outside(Offload()); }),
            "[policy] what leaves outside of segments is empty");
  EXPECT_EQ(error_of([] { Policies().offload_distance(-1); }),
            "[policy] the distance of values in host memory must be 0 or more ops, got -1");
}

}  // namespace
}  // namespace reprise::testing

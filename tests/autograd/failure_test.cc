// An op and the allocator failing at the k-th call, for every k of a small step.
#include "autograd/parameter_sweep.h"
#include "autograd/tape_state.h"
#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

struct Injected : std::runtime_error {
  Injected() : std::runtime_error("injected") {}
};

class Failures : public TapeTest {
 protected:
  Variable forward() {
    Variable x(vec({0.5f, -1}));
    x = checkpoint("a", [&] {
      Variable y = checkpoint("b", [&] { return toy_tanh(toy_mul(toy_tanh(x), w_)); });
      return toy_add(toy_mul(y, w_), toy_mul(y, v_));
    });
    return toy_sum(toy_mul(x, w_));
  }
  // Runs the sweep with the k-th call failing; false when it did not come to k.
  bool fails(const Variable& loss, int k, bool allocation, const BackwardOptions& options = {}) {
    int left = k;
    auto count = [&left] {
      if (left-- == 0) {
        throw Injected();
      }
    };
    if (allocation) {
      allocator(cpu).set_fault([&](std::size_t) { count(); });
    } else {
      ToyHook::call = [&](std::string_view, bool) { count(); };
    }
    bool failed = false;
    try {
      backward(loss, options);
    } catch (const Injected&) {
      failed = true;
    }
    allocator(cpu).set_fault(nullptr);
    ToyHook::call = nullptr;
    return failed;
  }
  // Gradients as they stand, stale or not; nothing when absent.
  std::vector<std::vector<float>> gradients() {
    std::vector<std::vector<float>> all;
    for (Parameter* p : {&w_, &v_}) {
      all.push_back(p->has_gradient() ? numbers(Parameter::Sweep::present(*p))
                                      : std::vector<float>());
    }
    return all;
  }
  void zero() {
    w_.zero_gradient();
    v_.zero_gradient();
  }
  // For every k, from gradients made by `steps` sweeps.
  void every_call(int steps, bool allocation) {
    Tape tape;
    Tape::Scope scope(tape);
    auto prepare = [&] {
      zero();
      for (int i = 0; i < steps; ++i) {
        backward(forward());
      }
    };
    prepare();
    const auto before = gradients();
    backward(forward());
    const auto after = gradients();
    int k = 0;
    for (;; ++k) {
      prepare();
      {
        Variable loss = forward();
        if (!fails(loss, k, allocation)) {
          EXPECT_EQ(gradients(), after);
          break;
        }
        EXPECT_TRUE(tape.state().sweeping == false);
      }
      const auto now = gradients();
      for (std::size_t p = 0; p < now.size(); ++p) {
        EXPECT_TRUE(now[p] == before[p] || (steps > 0 && now[p] == after[p])) << "k = " << k;
      }
      for (Parameter* p : {&w_, &v_}) {
        const std::string text = "[gradient] the gradient of " + p->name() +
                                 " is stale after a failed backward: zero it first";
        EXPECT_TRUE(p->stale());
        EXPECT_EQ(error_of([&] { p->gradient(); }), text);
        EXPECT_EQ(error_of([&] { p->write_gradient(); }), text);
      }
      EXPECT_EQ(error_of([&] { backward(forward()); }),
                "[backward] the gradient of v is stale after a failed backward: zero it first");
      tape.reset();
    }
    EXPECT_GE(k, 8) << "the step is smaller than thought";
  }

  Parameter w_{"w", vec({0.5f, 0.25f})}, v_{"v", vec({2, -0.5f})};
};

TEST_F(Failures, AnOpFailsAtEveryCallWithoutGradientsBefore) {
  every_call(0, false);
}
TEST_F(Failures, AnOpFailsAtEveryCallOnAccumulatedGradients) {
  every_call(1, false);
}
TEST_F(Failures, TheAllocatorFailsAtEveryCallWithoutGradientsBefore) {
  every_call(0, true);
}
TEST_F(Failures, TheAllocatorFailsAtEveryCallOnAccumulatedGradients) {
  every_call(1, true);
}

TEST_F(Failures, WithUndoEveryGradientIsAsBeforeAndNotStale) {
  Tape tape;
  Tape::Scope scope(tape);
  backward(forward());
  const auto before = gradients();
  BackwardOptions options;
  options.undo = true;
  int k = 0;
  while (fails(forward(), k++, false, options)) {
    EXPECT_EQ(gradients(), before);
    EXPECT_FALSE(w_.stale());
    EXPECT_NO_THROW(w_.gradient());
  }
  EXPECT_GE(k, 10);
  EXPECT_NE(gradients(), before);
}

TEST_F(Failures, WithUndoAGradientThatACallbackZeroedIsRestored) {
  Tape tape;
  Tape::Scope scope(tape);
  for (bool bound : {false, true}) {
    zero();
    if (bound) {
      w_.bind_gradient(Tensor::zeros({2}, DType::f32));
      v_.bind_gradient(Tensor::zeros({2}, DType::f32));
    }
    backward(forward());
    const auto before = gradients();
    BackwardOptions options;
    options.undo = true;
    int ready = 0;
    options.on_ready = [&](Parameter& p) {
      p.zero_gradient();
      if (++ready == 2) {
        throw Injected();
      }
    };
    EXPECT_THROW(backward(forward(), options), Injected);
    EXPECT_EQ(gradients(), before) << bound;
    EXPECT_FALSE(w_.stale());
  }
}

TEST_F(Failures, WhatIsUnderWayInASweepCannotBeChangedFromOutside) {
  Tape tape;
  Tape::Scope scope(tape);
  backward(forward());
  BackwardOptions options;
  options.on_ready = [&](Parameter& ready) {
    if (&ready == &v_) {  // w comes later
      EXPECT_EQ(error_of([&] { w_.zero_gradient(); }),
                "[zero_gradient] a sweep still adds to the gradient of w: wait for on_ready");
      EXPECT_EQ(error_of([&] {
                  w_.bind_gradient(vec({0, 0}));
                }),
                "[bind_gradient] a sweep still adds to the gradient of w: wait for on_ready");
      EXPECT_EQ(error_of([&] { w_.set_grad_dtype(DType::f32); }),
                "[set_grad_dtype] a sweep still adds to the gradient of w: wait for on_ready");
      EXPECT_EQ(error_of([&] { w_.set_gradient_present(); }),
                "[set_gradient_present] a sweep still adds to the gradient of w: wait for "
                "on_ready");
      EXPECT_EQ(error_of([&] {
                  w_.bind_value(vec({0, 0}));
                }),
                "[bind_value] a sweep may still read w: wait for on_last_read");
    }
    ready.zero_gradient();
    ready.bind_gradient(Tensor::zeros({2}, DType::f32));
  };
  options.on_last_read = [&](Parameter& p) { p.bind_value(vec({9, 9})); };
  backward(forward(), options);
  EXPECT_FALSE(w_.has_gradient());
  EXPECT_EQ(numbers(w_.value()), (std::vector<float>{9, 9}));
  EXPECT_NO_THROW(w_.bind_value(vec({1, 1})));
  EXPECT_NO_THROW(w_.zero_gradient());
}

TEST_F(Failures, ABoundGradientIsAbsentAgain) {
  Tape tape;
  Tape::Scope scope(tape);
  Tensor bucket = Tensor::zeros({2}, DType::f32);
  w_.bind_gradient(bucket);
  backward(forward());
  const auto expected = numbers(bucket);
  zero();
  for (int k = 0; fails(forward(), k, true); ++k) {
    EXPECT_FALSE(w_.has_gradient());
    EXPECT_TRUE(w_.stale());
    zero();
  }
  EXPECT_EQ(numbers(bucket), expected);
  EXPECT_TRUE(w_.gradient().shares_storage(bucket));
}

TEST_F(Failures, AForwardThatFailsAtAnyCallLeavesTheTapeUsable) {
  Tape tape;
  Tape::Scope scope(tape);
  backward(forward());
  const auto expected = gradients();
  for (bool allocation : {false, true}) {
    int k = 0;
    for (bool failed = true; failed; ++k) {
      zero();
      int left = k;
      failed = false;
      auto count = [&left] {
        if (left-- == 0) {
          throw Injected();
        }
      };
      if (allocation) {
        allocator(cpu).set_fault([&](std::size_t) { count(); });
      } else {
        ToyHook::call = [&](std::string_view, bool) { count(); };
      }
      try {
        forward();
      } catch (const Injected&) {
        failed = true;
      }
      allocator(cpu).set_fault(nullptr);
      ToyHook::call = nullptr;
      EXPECT_FALSE(tape.state().segment_open());
      // What was recorded stays and is not in the way.
      backward(forward());
      EXPECT_EQ(gradients(), expected) << "k = " << k;
    }
    EXPECT_GE(k, 8);
  }
}

// The outer policy is asked at each op of the outer segment, and at its close about what the inner
// one keeps: there it throws a second time, while the first exception is under way.
TEST_F(Failures, APolicyThatThrowsLeavesTheTapeUsable) {
  Tape tape;
  int calls = 0, fatal = -1;
  const Policies policies = Policies()
                                .set("outer",
                                     [&](const Candidate&) {
                                       if (++calls >= fatal && fatal > 0) {
                                         throw Injected();
                                       }
                                       return Keep::Drop;
                                     })
                                .set("inner", keep_ops({"toy_tanh"}));
  Tape::Scope scope(tape, policies);
  auto step = [&] {
    calls = 0;
    Variable x = checkpoint("outer", [&] {
      Variable y = checkpoint("inner", [&] {
        return toy_square(toy_tanh(toy_mul(vec({1, 2}), w_)));
      });
      return toy_square(toy_mul(y, v_));
    });
    return toy_sum(x);
  };
  backward(step());
  const auto expected = gradients();
  const int asked = calls;
  EXPECT_EQ(asked, 3) << "two ops, and the inner's tanh at the close";
  for (fatal = 1; fatal <= asked; ++fatal) {
    zero();
    EXPECT_THROW(step(), Injected) << fatal;
    EXPECT_FALSE(tape.state().segment_open()) << fatal;
    EXPECT_TRUE(tape.state().records().empty()) << fatal;
    EXPECT_EQ(live(MemoryKind::saved), 0) << fatal;
    fatal = -fatal;
    backward(step());
    EXPECT_EQ(gradients(), expected) << -fatal;
    fatal = -fatal;
  }
}

TEST_F(Failures, ACallbackThatThrowsIsAFailureOfTheSweep) {
  Tape tape;
  Tape::Scope scope(tape);
  BackwardOptions options;
  options.on_ready = [](Parameter&) { throw Injected(); };
  EXPECT_THROW(backward(forward(), options), Injected);
  EXPECT_TRUE(w_.stale());
  EXPECT_TRUE(v_.stale());
  zero();
  backward(forward());
}

TEST_F(Failures, AGradientThatIsAskedForAndCannotBeCopiedIsAFailureOfTheSweep) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable x = toy_mul(w_, v_);
  Variable loss = toy_sum(toy_add(x, x));
  const Variable wanted[] = {x, x};  // twice: the second is a copy
  int allocations = 0;
  allocator(cpu).set_fault([&](std::size_t) { ++allocations; });
  BackwardOptions keep;
  keep.keep = true;
  grad({&loss, 1}, wanted, keep);
  allocator(cpu).set_fault([&](std::size_t) {
    if (--allocations == 0) {
      throw Injected();
    }
  });
  zero();
  EXPECT_THROW(grad({&loss, 1}, wanted), Injected);
  allocator(cpu).set_fault(nullptr);
  EXPECT_TRUE(w_.stale());
  EXPECT_FALSE(w_.has_gradient());
}

TEST_F(Failures, WhatTheCallerDidWrongTouchesNothing) {
  Tape tape;
  Tape::Scope scope(tape);
  backward(forward());
  const auto before = gradients();
  Variable loss = forward();
  w_.write();
  error_of([&] { backward(loss); });
  EXPECT_EQ(gradients(), before);
  EXPECT_FALSE(w_.stale());
}

}  // namespace
}  // namespace reprise::testing

// What is dropped, what is executed again, and how much is alive meanwhile.
#include "autograd/dropout.h"
#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

class Replays : public TapeTest {
 protected:
  Parameter w_{"w", vec({0.5f, 0.25f})};
};

TEST_F(Replays, OnlyWhatIsNeededIsExecuted) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable loss = toy_sum(checkpoint("s", [&] {
    Variable x = toy_mul(w_, w_);           // saves parameters only; its value feeds square
    Variable y = toy_square(x);             // saves x
    Variable dead = toy_tanh(toy_tanh(y));  // not reached by the loss
    return toy_scale(y, 3);                 // saves nothing
  }));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards("toy_mul"), 1);
  EXPECT_EQ(count.forwards(), 1) << "square, scale and the dead branch are not executed";
  EXPECT_EQ(count.backwards("toy_tanh"), 0);
  EXPECT_EQ(tape.report().replayed_records, 1);
}

TEST_F(Replays, TheLastProductOfABlockIsNeverReplayed) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable x(vec({1, 2}));
  for (int i = 0; i < 5; ++i) {
    x = checkpoint("block", [&] { return toy_add(x, toy_mul(toy_tanh(toy_square(x)), w_)); });
  }
  Variable loss = toy_sum(std::move(x));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards("toy_square"), 5);
  EXPECT_EQ(count.forwards("toy_tanh"), 5);
  EXPECT_EQ(count.forwards("toy_mul"), 0) << "the product feeds only an add";
  EXPECT_EQ(count.forwards("toy_add"), 0) << "a block's output is held by the next block";
}

TEST_F(Replays, DeadBranchesAreNotReplayed) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable dead, alive;
  checkpoint("outer", [&] {
    Variable x = toy_mul(w_, w_);
    dead = checkpoint("dead", [&] { return toy_square(toy_tanh(toy_square(toy_tanh(x)))); });
    alive = toy_scale(toy_square(x), 2);
  });
  Variable loss = toy_sum(std::move(alive));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards("toy_mul"), 1);
  EXPECT_EQ(count.forwards(), 1);
}

TEST_F(Replays, ASegmentIsReplayedOnce) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable loss = toy_sum(checkpoint("s", [&] {
    Variable x = w_;
    for (int i = 0; i < 6; ++i) {
      x = toy_scale(toy_tanh(x), 2);
    }
    return x;
  }));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards("toy_tanh"), 6);
  EXPECT_EQ(count.forwards("toy_scale"), 5);
}

TEST_F(Replays, PinnedValuesAreNotReplayed) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable pinned;
  Variable loss = toy_sum(checkpoint("s", [&] {
    pinned = toy_tanh(toy_square(w_));
    return toy_square(pinned);
  }));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards(), 0);
}

TEST_F(Replays, DropoutIsReplayedWithItsOwnNumbers) {
  auto gradient = [&](const Policies& policies, bool segment) {
    Parameter w("w", Tensor::full({64}, DType::f32, 0.5));
    Generator generator{3, 11};
    Tape tape;
    Tape::Scope scope(tape, policies);
    auto f = [&] {
      Variable x = dropout(toy_square(w), 0.5, generator);
      return toy_square(dropout(toy_tanh(x), 0.25, generator));
    };
    backward(toy_sum(segment ? checkpoint("s", f) : f()));
    return numbers(w.gradient());
  };
  const auto expected = gradient({}, false);
  EXPECT_EQ(gradient(Policies::named("inputs-only"), true), expected);
  EXPECT_EQ(gradient(Policies::named("keep-all"), true), expected);
  // And the mask of the gradient is that of the value.
  Generator generator{3, 11};
  Parameter w("w", Tensor::full({64}, DType::f32, 1));
  Tape tape;
  Tape::Scope scope(tape);
  Variable y = dropout(w, 0.5, generator);
  const auto kept = numbers(y);
  backward(toy_sum(y));
  EXPECT_EQ(numbers(w.gradient()), kept);
}

TEST_F(Replays, MustKeepOutputsAreExecutedOnceAtAnyDepth) {
  Tape tape;
  Tape::Scope scope(tape);
  Variable loss = toy_sum(checkpoint("a", [&] {
    // Only the outer segments ask for it.
    Variable x = checkpoint(
        "b", [&] { return toy_square(checkpoint("c", [&] { return toy_keep(toy_tanh(w_)); })); });
    return toy_square(x);
  }));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards("toy_keep"), 0);
  EXPECT_GT(count.forwards("toy_tanh"), 0);
}

TEST_F(Replays, ValuesOfAReplayAreReleasedAtTheirLastUse) {
  // A long chain whose backward needs only its end: a replay holds two values at a time.
  Parameter w("w", Tensor::full({256}, DType::f32, 0.5));
  const std::int64_t base = live();
  Tape tape;
  Tape::Scope scope(tape);
  Variable loss = toy_sum(checkpoint("s", [&] {
    Variable x = w;
    for (int i = 0; i < 50; ++i) {
      x = toy_scale(x, 1.01f);
    }
    return toy_square(x);
  }));
  allocator(cpu).reset_peak();
  backward(loss);
  // The chain's value in place, its copy being made, and the gradients.
  EXPECT_LE(allocator(cpu).report().peak_bytes - base, 4 * 1024 + 16);
  EXPECT_EQ(tape.report().replayed_records, 50);
}

TEST_F(Replays, ASegmentsForwardPeakIsThatOfInference) {
  Parameter w("w", Tensor::full({256}, DType::f32, 0.5));
  Tape tape;
  Tape::Scope scope(tape);
  const std::int64_t base = live();
  allocator(cpu).reset_peak();
  Variable loss = toy_sum(checkpoint("s", [&] {
    Variable x = w;
    for (int i = 0; i < 500; ++i) {
      x = toy_tanh(toy_square(std::move(x)));
    }
    return x;
  }));
  EXPECT_LE(allocator(cpu).report().peak_bytes - base, 3 * 1024);
  backward(loss);
}

// Five records a block; four of its values are saved when no segment is open.
Variable block(const Variable& x, const Parameter& w) {
  Variable y = toy_square(toy_mul(x, w));
  y = toy_tanh(toy_tanh(std::move(y)));
  return toy_add(x, std::move(y));
}
Variable halves(const Variable& x, const Parameter& w, int blocks) {
  return checkpoint("half", [&] {
    if (blocks == 1) {
      return block(x, w);
    }
    Variable middle = halves(x, w, blocks / 2);
    return halves(middle, w, blocks - blocks / 2);
  });
}

enum class Layout : std::uint8_t { flat, one_a_block, by_halves };

// Peak of a step in activations.
std::int64_t peak(int blocks, Layout shape, std::int64_t* replayed = nullptr) {
  constexpr std::int64_t kBytes = 64 * 4;
  const std::int64_t base = allocator(meta).report().live_bytes;
  std::int64_t result = 0;
  {
    Parameter w("w", Tensor::full({64}, DType::f32, 0.5, meta));
    const StepReport report = dry_run(
        [&] {
          Variable x(Tensor::full({64}, DType::f32, 1, meta));
          if (shape == Layout::by_halves) {
            return toy_sum(halves(std::exchange(x, {}), w, blocks));
          }
          for (int i = 0; i < blocks; ++i) {
            x = shape == Layout::flat ? block(x, w) : checkpoint("b", [&] { return block(x, w); });
          }
          return toy_sum(std::move(x));
        },
        Policies());
    result = report.peak_bytes - base;
    if (replayed != nullptr) {
      *replayed = report.tape.replayed_records;
    }
  }
  return (result - kBytes) / kBytes;  // less w
}

TEST_F(Replays, RecursionByHalvesHoldsLogarithmicallyManyBlockInputs) {
  std::vector<std::int64_t> nested, one, flat;
  for (int n : {8, 64, 512, 4096}) {
    nested.push_back(peak(n, Layout::by_halves));
    one.push_back(peak(n, Layout::one_a_block));
    flat.push_back(peak(n, Layout::flat));
  }
  EXPECT_EQ(nested, (std::vector<std::int64_t>{9, 12, 15, 18}));
  EXPECT_EQ(one, (std::vector<std::int64_t>{13, 69, 517, 4101}));
  EXPECT_EQ(flat, (std::vector<std::int64_t>{34, 258, 2050, 16386}));
}

TEST_F(Replays, AHundredThousandRecordsDeepWithoutRecursion) {
  for (const char* policy : {"keep-all", "inputs-only"}) {
    Parameter w("w", vec({0.5f}));
    Tape tape;
    Tape::Scope scope(tape, Policies::named(policy));
    Variable x = w;
    for (int s = 0; s < 1000; ++s) {
      x = checkpoint("s", [&] {
        Variable y = x;
        for (int i = 0; i < 50; ++i) {
          y = toy_scale(toy_tanh(y), 1.0f);
        }
        return y;
      });
    }
    EXPECT_EQ(tape.report().records, 100'000);
    backward(toy_sum(std::move(x)));
    EXPECT_TRUE(w.has_gradient());
  }
}

TEST_F(Replays, SegmentsNestAThousandDeep) {
  Tape tape;
  Tape::Scope scope(tape);
  std::function<Variable(Variable, int)> deeper = [&](Variable x, int depth) {
    return checkpoint("d", [&] {
      Variable y = toy_tanh(x);
      return depth == 0 ? y : toy_tanh(deeper(y, depth - 1));
    });
  };
  backward(toy_sum(deeper(w_, 1000)));
  EXPECT_TRUE(w_.has_gradient());
}

}  // namespace
}  // namespace reprise::testing

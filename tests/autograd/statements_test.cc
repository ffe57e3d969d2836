// The eight statements of the design, each under its number.
#include <array>
#include <functional>
#include <optional>
#include <tuple>

#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

// Bitwise: NaN never compares equal here, and that is wanted.
void expect_same(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  EXPECT_EQ(a, b) << what;
}

// --- 1. The callable runs exactly once per forward -----------------------------------------------

class Statement1 : public TapeTest {
 public:
  Statement1() : weight_("w", vec({0.5f, -2.0f, 3.0f})) {}

  // Runs `model` once under inputs-only, and the same without a segment: equal gradients, `calls`
  // counted by the callable itself.
  void expect_once(const std::function<Variable(const Variable&)>& model) {
    calls_ = 0;
    weight_.zero_gradient();
    {
      Tape tape;
      Tape::Scope scope(tape);
      Variable loss = toy_sum(model(Variable(vec({1, 2, 3}))));
      EXPECT_EQ(calls_, 1);
      EXPECT_EQ(tape.report().segments, 1);
      backward(loss);
      EXPECT_EQ(calls_, 1) << "backward called it again";
      EXPECT_GT(tape.report().replayed_records, 0);
    }
    expect_same(numbers(weight_.gradient()), expected(), "the gradient of w");
  }
  Variable block(const Variable& x, float factor = 1) {
    ++calls_;
    return toy_tanh(toy_scale(toy_mul(x, weight_), factor));
  }
  std::vector<float> expected() {
    Parameter w("w", vec({0.5f, -2.0f, 3.0f}));
    Tape tape;
    Tape::Scope scope(tape);
    backward(toy_sum(toy_tanh(toy_scale(toy_mul(Variable(vec({1, 2, 3})), w), 1))));
    return numbers(w.gradient());
  }

  Parameter weight_;
  int calls_ = 0;
};

TEST_F(Statement1, LambdaRunsOncePerForward) {
  expect_once([&](const Variable& x) { return checkpoint("s", [&] { return block(x); }); });
}

TEST_F(Statement1, FunctionObjectRunsOncePerForward) {
  struct Block {
    Statement1* test;
    Variable operator()(const Variable& x) const { return test->block(x); }
  };
  expect_once([&](const Variable& x) { return checkpoint("s", Block{this}, x); });
}

TEST_F(Statement1, MoveOnlyFunctionObjectRunsOncePerForward) {
  struct Block {
    std::unique_ptr<Statement1*> test;
    Variable operator()(const Variable& x) && { return (*test)->block(x); }
  };
  expect_once([&](const Variable& x) {
    return checkpoint("s", Block{std::make_unique<Statement1*>(this)}, x);
  });
}

TEST_F(Statement1, MemberFunctionOfABoundObjectRunsOncePerForward) {
  expect_once(
      [&](const Variable& x) { return checkpoint("s", &Statement1::block, this, x, 1.0f); });
}

TEST_F(Statement1, BindRunsOncePerForward) {
  using std::placeholders::_1;
  expect_once([&](const Variable& x) {
    return checkpoint("s", std::bind(&Statement1::block, this, _1, 1.0f), x);
  });
}

TEST_F(Statement1, OptionStructRunsOncePerForward) {
  struct Options {
    float factor = 7;
    std::optional<int> enable;  // what "unexpected keyword argument" was about
  };
  expect_once([&](const Variable& x) {
    return checkpoint(
        "s", [&](const Variable& y, const Options& options) { return block(y, options.factor); }, x,
        Options{.factor = 1, .enable = 3});
  });
}

TEST_F(Statement1, TupleIsReturned) {
  expect_once([&](const Variable& x) {
    auto [y, count] = checkpoint("s", [&] { return std::tuple(block(x), 5); });
    EXPECT_EQ(count, 5);
    return y;
  });
}

TEST_F(Statement1, StructOfVariablesIsReturned) {
  struct Result {
    Variable hidden;
    std::vector<Variable> all;
    std::string note;
  };
  expect_once([&](const Variable& x) {
    Result result = checkpoint("s", [&] {
      Variable y = block(x);
      return Result{y, {y}, "text"};
    });
    EXPECT_EQ(result.note, "text");
    EXPECT_EQ(result.all.size(), 1u);
    return result.hidden;
  });
}

TEST_F(Statement1, ReferenceIsReturnedAsTheSameObject) {
  Variable stored;
  expect_once([&](const Variable& x) {
    Variable& y = checkpoint("s", [&]() -> Variable& { return stored = block(x); });
    EXPECT_EQ(&y, &stored);
    return std::exchange(y, {});  // a handle that lives on would pin it
  });
}

TEST_F(Statement1, NothingIsReturnedAndAValueEscapesBySideEffect) {
  expect_once([&](const Variable& x) {
    Variable leaked;
    checkpoint("s", [&] { leaked = block(x); });
    EXPECT_EQ(leaked.tensor().numel(), 3);
    return leaked;
  });
}

TEST_F(Statement1, ControlFlowMayDependOnData) {
  int branch_taken = 0;
  expect_once([&](const Variable& x) {
    return checkpoint("s", [&] {
      Variable y = block(x);
      // Only the recorded branch is ever replayed.
      if (++branch_taken > 1 || y.tensor().to_vector<float>()[0] < 0) {
        y = toy_scale(y, 100);
      }
      return y;
    });
  });
}

// --- 2. Gradients are bitwise equal under every policy -------------------------------------------

class Statement2 : public TapeTest {
 protected:
  struct Result {
    std::vector<float> first, second;
    std::vector<std::string> ready;
  };
  static Result step(const Policies& policies, bool segments, bool nested) {
    Parameter w("w", vec({0.5f, -2.0f, 3.0f, 0.1f})), v("v", vec({1.5f, 0.3f, -0.2f, 0.7f}));
    Generator generator{17, 0};
    Tape tape;
    Tape::Scope scope(tape, policies);
    auto span = [&](const char* name, auto f) {
      if (!segments) {
        return f();
      }
      return checkpoint(name, f);
    };
    Variable x(vec({1, 2, 3, 4}));
    for (int i = 0; i < 4; ++i) {
      x = span("a", [&] {
        Variable y = toy_tanh(toy_mul(x, w));
        auto inner = [&] { return toy_dropout(toy_mul(toy_square(y), v), 0.3f, generator); };
        Variable z = nested ? span("b", inner) : inner();
        return toy_add(x, std::move(z));
      });
    }
    Result result;
    BackwardOptions options;
    options.on_ready = [&](Parameter& p) { result.ready.push_back(p.name()); };
    backward(toy_sum(toy_tanh(x)), options);
    result.first = numbers(w.gradient());
    result.second = numbers(v.gradient());
    return result;
  }
};

TEST_F(Statement2, GradientsAreBitwiseEqualUnderEveryPolicyWithDropout) {
  for (bool nested : {false, true}) {
    const Result expected = step({}, false, nested);
    for (float g : expected.first) {
      EXPECT_NE(g, 0);
    }
    for (const auto& [name, policies] : policy_examples()) {
      const Result result = step(policies, true, nested);
      expect_same(result.first, expected.first, name.c_str());
      expect_same(result.second, expected.second, name.c_str());
      EXPECT_EQ(result.ready, expected.ready) << name;
    }
  }
}

TEST_F(Statement2, ThePolicyMayChangeEveryStep) {
  Parameter w("w", vec({0.5f, -2.0f}));
  std::vector<float> expected;
  Tape tape;
  for (const auto& [name, policies] : policy_examples()) {
    Tape::Scope scope(tape, policies);
    w.zero_gradient();
    Variable x(vec({1, 2}));
    for (const char* segment : {"a", "b1", "b2"}) {
      x = checkpoint(segment, [&] { return toy_tanh(toy_mul(toy_tanh(x), w)); });
    }
    backward(toy_sum(x));
    if (expected.empty()) {
      expected = numbers(w.gradient());
    }
    expect_same(numbers(w.gradient()), expected, name.c_str());
  }
}

TEST_F(Statement2, ThePolicyMayChangeWithinAStep) {
  Parameter w("w", vec({0.5f, -2.0f}));
  auto step = [&](const std::vector<Policies>& policies) {
    w.zero_gradient();
    Tape tape;
    Variable x(vec({1, 2}));
    for (const Policies& p : policies) {
      Tape::Scope scope(tape, p);
      x = checkpoint("a", [&] { return toy_tanh(toy_mul(toy_tanh(x), w)); });
    }
    Tape::Scope scope(tape);
    backward(toy_sum(x));
    return numbers(w.gradient());
  };
  const auto all = Policies::named("keep-all"), inputs = Policies::named("inputs-only");
  expect_same(step({all, inputs, all}), step({inputs, all, inputs}), "mixed");
}

// --- 3. Ready fires exactly once, in an order known in advance: see readiness_test.cc ------------

class Statement3 : public TapeTest {};

TEST_F(Statement3, ReadyFiresOnceInTheAnnouncedOrderWhateverTheSegments) {
  Parameter tied("tied", vec({0.5f})), unused("unused", vec({1}));
  Parameter* all[] = {&tied, &unused};
  for (const auto& [name, policies] : policy_examples()) {
    tied.zero_gradient();
    Tape tape;
    Tape::Scope scope(tape, policies);
    Variable x(vec({2}));
    for (int i = 0; i < 3; ++i) {
      x = checkpoint("a", [&] {
        return checkpoint("b", [&] { return toy_tanh(toy_mul(toy_mul(x, tied), tied)); });
      });
    }
    std::vector<std::string> announced, fired;
    int expected = 0;
    BackwardOptions options;
    options.parameters = all;
    options.on_plan = [&](const Plan& plan) {
      for (const Ready& r : plan.order) {
        announced.push_back(r.parameter->name());
        expected += r.expected;
      }
    };
    options.on_ready = [&](Parameter& p) { fired.push_back(p.name()); };
    backward(toy_sum(x), options);
    EXPECT_EQ(announced, (std::vector<std::string>{"unused", "tied"})) << name;
    EXPECT_EQ(fired, announced) << name;
    EXPECT_EQ(expected, 6) << name;
  }
}

// --- 4. A parameter changed between forward and replay is a named error --------------------------

class Statement4 : public TapeTest {};

TEST_F(Statement4, ParameterChangedBeforeAReplayIsANamedError) {
  Parameter w("layer.weight", vec({0.5f}));
  Tape tape;
  Tape::Scope scope(tape);
  Variable loss =
      toy_sum(checkpoint("block", [&] { return toy_tanh(toy_add(Variable(vec({2})), w)); }));
  w.write().zero();
  EXPECT_EQ(error_of([&] { backward(loss); }),
            "[backward] parameter layer.weight was changed between forward and backward: toy_add "
            "in segment block read version 0, it is 1 now");
  EXPECT_FALSE(w.has_gradient());
  EXPECT_FALSE(w.stale());
}

TEST_F(Statement4, ParameterChangedBeforeItsSavedValueIsReadIsANamedError) {
  Parameter w("w", vec({0.5f}));
  Tape tape;
  Tape::Scope scope(tape);
  Variable loss = toy_sum(toy_square(w));
  w.bind_value(vec({1}));
  EXPECT_EQ(error_of([&] { backward(loss); }),
            "[backward] parameter w was changed between forward and backward: toy_square outside "
            "of segments read version 0, it is 1 now");
}

TEST_F(Statement4, FrozenParametersAndViewsOfThemAreCheckedToo) {
  Parameter frozen("frozen", vec({0.5f, 1}), false), w("w", vec({1}));
  Tape tape;
  Tape::Scope scope(tape);
  Variable view = toy_slice(frozen, 0, 1);
  Variable loss = toy_sum(toy_mul(view, w));
  frozen.write();
  EXPECT_EQ(error_of([&] { backward(loss); }),
            "[backward] parameter frozen was changed between forward and backward: toy_mul outside "
            "of segments read version 0, it is 1 now");
}

TEST_F(Statement4, AChangeThatNoReplayAndNoBackwardReadsIsNoError) {
  Parameter w("w", vec({0.5f})), v("v", vec({3})), other("other", vec({2}));
  Tape tape;
  Tape::Scope scope(tape);
  Variable dead = checkpoint("dead", [&] { return toy_square(other); });
  Variable alive = checkpoint("alive", [&] {
    dead = toy_square(toy_add(other, other));
    return toy_square(toy_add(v, v));
  });
  const Variable losses[] = {toy_sum(toy_add(w, w)), toy_sum(alive)};  // add saves nothing
  w.write();
  other.write();
  backward(losses);
  EXPECT_EQ(numbers(w.gradient()), (std::vector<float>{2}));
  EXPECT_EQ(numbers(v.gradient()), (std::vector<float>{24}));
}

// --- 5. After backward the tape holds nothing ----------------------------------------------------

class Statement5 : public TapeTest {};

TEST_F(Statement5, NoActivationByteIsLeftAfterBackward) {
  Parameter w("w", vec({0.5f, 2}));
  for (const auto& [name, policies] : policy_examples()) {
    w.zero_gradient();
    const std::int64_t before = live();
    Tape tape;
    Tape::Scope scope(tape, policies);
    {
      Variable loss;
      {
        Variable x(vec({1, 2}));
        for (int i = 0; i < 3; ++i) {
          x = checkpoint("a", [&] { return toy_square(toy_tanh(toy_mul(x, w))); });
        }
        loss = toy_sum(x);
      }
      backward(loss);
      EXPECT_EQ(live(), before + 8 + 4) << name << ": the gradient and the loss that is held";
      EXPECT_EQ(live(MemoryKind::saved), 0) << name;
      EXPECT_EQ(loss.tensor().numel(), 1);
    }
    EXPECT_EQ(live(), before + 8) << name;
  }
}

TEST_F(Statement5, AValueThatAHandleKeepsStaysReadableAndIsStale) {
  Parameter w("w", vec({0.5f}));
  Tape tape;
  Tape::Scope scope(tape);
  Variable inner;
  Variable loss = toy_sum(checkpoint("s", [&] {
    inner = toy_mul(Variable(vec({4})), w);
    return toy_square(inner);
  }));
  backward(loss);
  EXPECT_EQ(numbers(inner), (std::vector<float>{2}));
  EXPECT_EQ(error_of([&] { toy_square(inner); }),
            "[toy_square] input 0 is of a tape that was reset (after backward): detach it");
  EXPECT_EQ(numbers(toy_square(detach(inner))), (std::vector<float>{4}));
}

// --- 6. A failed sweep: see failure_test.cc ------------------------------------------------------

class Statement6 : public TapeTest {};

TEST_F(Statement6, AFailedSweepLeavesEveryGradientUntouchedOrCompleteAndStale) {
  Parameter a("a", vec({0.5f})), b("b", vec({2}));
  Tape tape;
  Tape::Scope scope(tape);
  auto forward = [&] {
    return toy_sum(checkpoint("s", [&] { return toy_mul(toy_tanh(toy_mul(vec({1}), a)), b); }));
  };
  backward(forward());
  const auto before_a = numbers(a.gradient()), before_b = numbers(b.gradient());
  Variable loss = forward();
  ToyHook::call = [](std::string_view op, bool backward) {
    if (backward && op == "toy_tanh") {
      throw std::runtime_error("disk");
    }
  };
  EXPECT_THROW(backward(loss), std::runtime_error);
  ToyHook::call = nullptr;
  EXPECT_TRUE(a.stale());
  EXPECT_TRUE(b.stale());
  EXPECT_EQ(error_of([&] { a.gradient(); }),
            "[gradient] the gradient of a is stale after a failed backward: zero it first");
  EXPECT_EQ(error_of([&] { backward(forward()); }),
            "[backward] the gradient of b is stale after a failed backward: zero it first");
  tape.reset();
  a.zero_gradient();
  b.zero_gradient();
  backward(forward());
  expect_same(numbers(a.gradient()), before_a, "a");
  expect_same(numbers(b.gradient()), before_b, "b");
}

// --- 7. Predicted and measured peak agree --------------------------------------------------------

class Statement7 : public TapeTest {};

TEST_F(Statement7, PredictedAndMeasuredPeakAreEqualToTheByte) {
  for (const auto& [name, policies] : policy_examples()) {
    auto measure = [&](Device device) {
      const std::int64_t base = allocator(device).report().live_bytes;
      Parameter w("w", Tensor::full({64}, DType::f32, 0.5, device));
      Generator generator{5, 0};
      StepReport report = measure_step(
          [&] {
            Variable x(Tensor::full({64}, DType::f32, 1, device));
            for (int i = 0; i < 6; ++i) {
              x = checkpoint(i % 2 ? "a" : "b", [&] {
                return toy_add(x,
                               toy_dropout(toy_tanh(toy_square(toy_mul(x, w))), 0.1f, generator));
              });
            }
            return toy_sum(std::move(x));
          },
          policies, device);
      report.peak_bytes -= base;
      return report;
    };
    const StepReport predicted = measure(meta), measured = measure(cpu);
    EXPECT_EQ(predicted.peak_bytes, measured.peak_bytes) << name;
    EXPECT_EQ(predicted.replay_flops, measured.replay_flops) << name;
    EXPECT_EQ(predicted.tape.dropped_bytes, measured.tape.dropped_bytes) << name;
    EXPECT_EQ(predicted.tape.replayed_records, measured.tape.replayed_records) << name;
    EXPECT_GT(measured.peak_bytes, 64 * 4 * 3);
  }
}

TEST_F(Statement7, KeepingInputsOnlyLowersThePeakAndReplays) {
  auto measure = [&](const char* policy) {
    Parameter w("w", Tensor::full({64}, DType::f32, 0.5, meta));
    return dry_run(
        [&] {
          Variable x(Tensor::full({64}, DType::f32, 1, meta));
          for (int i = 0; i < 8; ++i) {
            x = checkpoint("a", [&] { return toy_tanh(toy_square(toy_tanh(toy_mul(x, w)))); });
          }
          return toy_sum(std::move(x));
        },
        Policies::named(policy));
  };
  const StepReport all = measure("keep-all"), inputs = measure("inputs-only");
  EXPECT_EQ(all.tape.replayed_records, 0);
  EXPECT_EQ(all.replay_flops, 0);
  EXPECT_EQ(inputs.tape.replayed_records, 8 * 4);
  EXPECT_LT(inputs.peak_bytes, all.peak_bytes);
  EXPECT_GT(inputs.tape.dropped_bytes, all.tape.dropped_bytes);
}

// --- 8. A foreign kernel is an op that declares inputs, outputs, saved set and cost --------------

class Statement8 : public TapeTest {};

// What a user writes: 1 / x, by whatever code.
class Reciprocal final : public Op {
 public:
  std::string_view name() const override { return "reciprocal"; }
  void forward(Forward& run) const override {
    const Tensor y = run.output(0, run.input(0).shape(), DType::f32);
    for (std::int64_t i = 0; i < y.numel(); ++i) {
      y.data<float>()[i] = 1 / run.input(0).data<float>()[i];
    }
  }
  Saved saved(Mask) const override { return {.inputs = 0, .outputs = 1}; }
  void backward(Backward& run) const override {
    const Target dx = run.into(0);
    for (std::int64_t i = 0; i < dx.tensor.numel(); ++i) {
      const float y = run.output(0).data<float>()[i];
      const float g = -y * y * run.gradient(0).data<float>()[i];
      dx.tensor.data<float>()[i] = dx.accumulate ? dx.tensor.data<float>()[i] + g : g;
    }
  }
  Cost cost(const Call& call) const override {
    return {call.input(0).numel(), 2 * call.input(0).bytes()};
  }
};

TEST_F(Statement8, AForeignKernelIsWrappedAsAnOpAndReplayed) {
  Parameter w("w", vec({2, 4}));
  Tape tape;
  Tape::Scope scope(tape);
  backward(toy_sum(
      checkpoint("s", [&] { return apply(std::make_unique<Reciprocal>(), {toy_scale(w, 1)}); })));
  EXPECT_EQ(numbers(w.gradient()), (std::vector<float>{-0.25f, -0.0625f}));
  EXPECT_EQ(tape.report().replayed_records, 2);
  EXPECT_EQ(tape.report().forward_flops, 2 + 2 + 2);
}

}  // namespace
}  // namespace reprise::testing

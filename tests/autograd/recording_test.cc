// What is recorded: no_grad, detach, frozen prefixes, several losses, chosen inputs, two tapes,
// policies by name; and every error of the tape, by its text.
#include <optional>
#include <stdexcept>

#include "autograd/norm.h"
#include "autograd/reduce.h"
#include "autograd/tape_state.h"
#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

class Recording : public TapeTest {
 protected:
  Tape tape_;
  std::optional<Tape::Scope> scope_{std::in_place, tape_};
  Parameter w_{"w", vec({0.5f, 2})}, v_{"v", vec({3, -1})};
};

TEST_F(Recording, AFrozenPrefixRecordsNothing) {
  Parameter frozen("frozen", vec({1, 2}), false);
  Variable x = toy_tanh(toy_mul(Variable(vec({1, 2})), frozen));
  EXPECT_EQ(tape_.report().records, 0);
  x = checkpoint("frozen", [&] { return toy_square(toy_mul(x, frozen)); });
  EXPECT_TRUE(tape_.state().records().empty()) << "the segment was truncated";
  EXPECT_TRUE(tape_.state().segments().empty());
  EXPECT_FALSE(x.needs_gradient());
  backward(toy_sum(toy_mul(x, w_)));
  EXPECT_EQ(numbers(w_.gradient()), numbers(x));
}

TEST_F(Recording, NoGradRecordsNothingOutsideAndIsReplayedInside) {
  Variable x = no_grad([&] { return toy_square(w_); });
  EXPECT_EQ(tape_.report().records, 0);
  EXPECT_FALSE(x.needs_gradient());
  Variable loss = toy_sum(checkpoint("s", [&] {
    Variable mask = no_grad([&] { return toy_tanh(toy_square(x)); });
    return toy_mul(mask, w_);
  }));
  CallCount count;
  backward(loss);
  EXPECT_EQ(count.forwards(), 2);
  EXPECT_EQ(count.backwards("toy_square"), 0);
}

TEST_F(Recording, DetachEndsHistory) {
  Variable x = toy_square(w_);
  Variable y = detach(x);
  EXPECT_FALSE(y.needs_gradient());
  backward(toy_sum(toy_mul(y, x)));
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{0.25f * 1, 4 * 4}));
}

TEST_F(Recording, GradientsOfLeavesAndOfInteriorValues) {
  Variable leaf = Variable::leaf(vec({2, 3}));
  Variable middle = checkpoint("s", [&] { return toy_square(leaf); });
  Variable other = Variable::leaf(vec({1, 1}));
  Variable loss = toy_sum(toy_mul(middle, w_));
  const Variable wanted[] = {leaf, middle, other};
  const std::vector<Tensor> gradients = grad({&loss, 1}, wanted);
  EXPECT_EQ(numbers(gradients[0]), (std::vector<float>{2 * 2 * 0.5f, 2 * 3 * 2}));
  EXPECT_EQ(numbers(gradients[1]), (std::vector<float>{0.5f, 2}));
  EXPECT_FALSE(gradients[2].defined());
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{4, 9}));
}

TEST_F(Recording, ALeafThatIsItselfALossKeepsNothingOfASweep) {
  const Variable x = Variable::leaf(vec({3}));
  for (bool fails : {false, true, false}) {
    BackwardOptions options;
    Parameter* all[] = {&w_};
    options.parameters = all;
    if (fails) {
      options.on_ready = [](Parameter&) { throw std::runtime_error("no"); };
      EXPECT_THROW(grad({&x, 1}, {&x, 1}, options), std::runtime_error);
      w_.zero_gradient();
      continue;
    }
    EXPECT_EQ(numbers(grad({&x, 1}, {&x, 1}, options)[0]), (std::vector<float>{1}));
    EXPECT_EQ(live(MemoryKind::gradients), 0);
  }
  BackwardOptions keep;
  keep.keep = true;
  EXPECT_EQ(numbers(grad({&x, 1}, {&x, 1}, keep)[0]), (std::vector<float>{1}));
  EXPECT_EQ(numbers(grad({&x, 1}, {&x, 1})[0]), (std::vector<float>{1}));
  EXPECT_EQ(numbers(toy_square(x)), (std::vector<float>{9})) << "it is not stale";
}

TEST_F(Recording, ABf16ParameterMayBeAnActivationWhenItsGradientIsF32) {
  const std::vector<bfloat16> values = {to_bfloat16(1), to_bfloat16(-2), to_bfloat16(0.5f)};
  Parameter p("p", Tensor::from(values, {3})), q("q", Tensor::from(values, {3}));
  p.set_grad_dtype(DType::f32);
  for (int sweep = 1; sweep <= 2; ++sweep) {
    q.zero_gradient();
    const Variable weight(Tensor::from(values, {3}));
    for (const Parameter* each : {&p, &q}) {
      backward(sum(rms_norm(*each, weight, 1e-5)));  // its kernel writes what x is of
    }
    EXPECT_EQ(p.gradient().dtype(), DType::f32);
    std::vector<float> expected;
    for (const bfloat16 g : q.gradient().to_vector<bfloat16>()) {
      expected.push_back(to_float(g) * static_cast<float>(sweep));
      EXPECT_NE(expected.back(), 0);
    }
    EXPECT_EQ(numbers(p.gradient()), expected);
  }
}

TEST_F(Recording, ScaleIsTheUpstreamGradientOfEachLoss) {
  const Variable losses[] = {toy_sum(w_), toy_sum(toy_scale(w_, 10))};
  BackwardOptions options;
  options.scale = {2, 0.5};
  backward(losses, options);
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{7, 7}));
}

TEST_F(Recording, OneLossGivenTwiceCountsTwice) {
  Variable loss = toy_sum(toy_square(w_));
  const Variable losses[] = {loss, loss};
  backward(losses);
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{2, 8}));
}

TEST_F(Recording, KeepAllowsTheSameSweepAgain) {
  Variable loss = toy_sum(checkpoint("s", [&] { return toy_square(toy_tanh(w_)); }));
  BackwardOptions keep;
  keep.keep = true;
  backward(loss, keep);
  const auto once = numbers(w_.gradient());
  w_.zero_gradient();
  backward(loss, keep);
  EXPECT_EQ(numbers(w_.gradient()), once);
  backward(loss);
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{2 * once[0], 2 * once[1]}));
}

TEST_F(Recording, AThrowingCallableClosesItsSegment) {
  Variable leaked;
  EXPECT_THROW(checkpoint("outer",
                          [&] {
                            checkpoint("inner", [&] {
                              leaked = toy_square(w_);
                              throw std::runtime_error("no");
                            });
                          }),
               std::runtime_error);
  EXPECT_FALSE(tape_.state().segment_open());
  backward(toy_sum(leaked));
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{1, 4}));
}

TEST_F(Recording, AConstantMayServeManySteps) {
  Variable constant(vec({3, 4}));
  for (int step = 0; step < 4; ++step) {
    w_.zero_gradient();
    Variable mine = constant;
    if (step == 3) {
      constant = Variable();
    }
    Variable loss;
    for (int before = 0; before <= step; ++before) {  // other marks every time
      toy_sum(checkpoint("dead", [&] { return toy_tanh(toy_square(v_)); }));
    }
    loss =
        toy_sum(checkpoint("s", [&] { return toy_square(toy_mul(std::exchange(mine, {}), w_)); }));
    backward(loss);
    EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{9, 64})) << step;
  }
}

TEST_F(Recording, NamedValuesAreKeptByTheirPolicy) {
  auto replayed = [&](const Policies& policies) {
    w_.zero_gradient();
    Tape::Scope scope(tape_, policies);
    backward(toy_sum(checkpoint("s", [&] {
      Variable y = named(toy_tanh(toy_square(w_)), "hidden");
      return toy_square(y);
    })));
    return tape_.report().replayed_records;
  };
  EXPECT_EQ(replayed({}), 2);
  EXPECT_EQ(replayed(Policies().set("s", keep_named({"hidden"}))), 0);
  EXPECT_EQ(replayed(Policies().set("s", keep_named({"other"}))), 2);
  EXPECT_EQ(replayed(Policies().set("s", keep_ops({"toy_square"}))), 1);
  EXPECT_EQ(replayed(Policies().set("t", keep_all())), 2);
  EXPECT_EQ(replayed(Policies().set("*", keep_all()).set("s", keep_inputs())), 0) << "first wins";
}

// The buffer under the view is kept, also by an outer segment that knows only the view's name.
TEST_F(Recording, ANamedViewIsKeptWithItsBuffer) {
  auto replayed = [&](const Policies& policies, bool nested) {
    w_.zero_gradient();
    Tape::Scope scope(tape_, policies);
    auto block = [&] {
      Variable y = named(toy_tanh(toy_square(w_)), "whole");
      y = toy_square(named(toy_slice(y, 0, 1), "part"));
      return toy_square(y);
    };
    backward(toy_sum(
        checkpoint("outer", [&] { return nested ? checkpoint("inner", block) : block(); })));
    return tape_.report().replayed_records;
  };
  for (bool nested : {false, true}) {
    // square, tanh, square; the last square's output is not needed
    EXPECT_EQ(replayed({}, nested), 3) << nested;
    EXPECT_EQ(replayed(Policies().set("*", keep_named({"part"})), nested), 1) << nested;
    EXPECT_EQ(replayed(Policies().set("*", keep_named({"whole"})), nested), 1) << nested;
    EXPECT_EQ(replayed(Policies().set("*", keep_named({"other"})), nested), 3) << nested;
  }
}

TEST_F(Recording, PatternsMatchAnyRunOfCharacters) {
  const Policies policies = Policies().set("layers.*.mlp", keep_all()).set("*head", keep_all());
  auto kept = [&](std::string_view name) {
    return policies.find(name)({"op", "", 0, {}, 0}) == Keep::Saved;
  };
  EXPECT_TRUE(kept("layers.0.mlp"));
  EXPECT_TRUE(kept("layers..mlp"));
  EXPECT_TRUE(kept("lm_head"));
  EXPECT_FALSE(kept("layers.0.mlp.x"));
  EXPECT_FALSE(kept("layers.0.attention"));
  EXPECT_FALSE(kept(""));
}

TEST_F(Recording, TwoTapesMayReadOneParameterInTurn) {
  Tape other;
  Variable mine = toy_sum(toy_square(w_));
  {
    Tape::Scope scope(other);
    backward(toy_sum(toy_scale(w_, 3)));
  }
  backward(mine);
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{3 + 1, 3 + 4}));
}

TEST_F(Recording, AParameterAtTheAddressOfADestroyedOneIsAnotherParameter) {
  std::optional<Parameter> p(std::in_place, "old", vec({1, 2}));
  Variable first = toy_square(*p);
  const Parameter* address = &*p;
  p.emplace("new", vec({3, 4, 5}));
  ASSERT_EQ(&*p, address);
  ASSERT_EQ(p->version(), 0u);
  Variable loss = toy_sum(toy_square(*p));
  BackwardOptions options;
  std::vector<std::string> read;
  options.on_last_read = [&](Parameter& parameter) { read.push_back(parameter.name()); };
  backward(loss, options);
  EXPECT_EQ(numbers(p->gradient()), (std::vector<float>{6, 8, 10}));
  EXPECT_EQ(read, (std::vector<std::string>{"new"}));
}

// --- Errors --------------------------------------------------------------------------------------

class TapeErrors : public Recording {};

TEST_F(TapeErrors, OfInputs) {
  Variable x = toy_square(w_);
  Tape other;
  {
    Tape::Scope scope(other);
    EXPECT_EQ(error_of([&] {
                toy_add(Variable(vec({1, 2})), x);
              }),
              "[toy_add] input 1 is on another tape than the current one: detach it");
    EXPECT_NO_THROW(toy_square(detach(x)));
  }
  EXPECT_EQ(error_of([&] { toy_add(x, vec({1, 2, 3})); }), "[toy_add] b must be [2], got [3]");
  scope_.reset();
  EXPECT_EQ(error_of([&] { toy_square(x); }),
            "[toy_square] an input belongs to a tape that is not current here: detach it");
  tape_.reset();
  scope_.emplace(tape_);
  EXPECT_EQ(error_of([&] { toy_square(x); }),
            "[toy_square] input 0 is of a tape that was reset (after backward): detach it");
  EXPECT_EQ(error_of([&] { static_cast<void>(Variable().tensor()); }),
            "[tensor] the Variable is absent");
  EXPECT_EQ(error_of([&] { static_cast<void>(Variable().shape()); }),
            "[shape] the Variable is absent");
  EXPECT_EQ(error_of([&] { static_cast<void>(Variable().dtype()); }),
            "[dtype] the Variable is absent");
  EXPECT_EQ(error_of([&] { static_cast<void>(Variable().device()); }),
            "[device] the Variable is absent");
  EXPECT_EQ(error_of([&] { detach(Variable()); }), "[detach] the Variable is absent");
  EXPECT_EQ(error_of([&] { Variable::leaf(Tensor()); }), "[leaf] the tensor is undefined");
  EXPECT_EQ(error_of([&] { Variable::leaf(Tensor::zeros({2}, DType::i64)); }),
            "[leaf] must be of a floating dtype, as its gradient is, got i64");
}

TEST_F(TapeErrors, OfADestroyedParameter) {
  auto p = std::make_unique<Parameter>("gone", vec({1, 2}));
  Variable handle(*p);
  Variable view = toy_slice(handle, 0, 1);
  const Variable losses[] = {
      toy_sum(toy_square(handle)), toy_sum(toy_add(handle, w_)),
      toy_sum(checkpoint("s", [&] { return toy_square(toy_add(w_, detach(handle))); }))};
  p.reset();
  for (const Variable& loss : losses) {
    EXPECT_EQ(error_of([&] { backward(loss); }),
              "[backward] parameter gone was destroyed between forward and backward");
  }
  EXPECT_EQ(error_of([&] {
              grad(losses, {&handle, 1});
            }),
            "[backward] parameter gone was destroyed between forward and backward");
  for (const Variable& x : {handle, view}) {
    EXPECT_EQ(error_of([&] { toy_square(x); }),
              "[toy_square] input 0 is parameter gone, which was destroyed");
    EXPECT_EQ(error_of([&] { static_cast<void>(x.tensor()); }),
              "[tensor] parameter gone was destroyed");
  }
  EXPECT_NE(explain(tape_).find("gone "), std::string::npos);
  tape_.reset();
  for (const Variable& x : {handle, view}) {
    EXPECT_EQ(error_of([&] { static_cast<void>(x.tensor()); }),
              "[tensor] parameter gone was destroyed");
  }
  EXPECT_FALSE(w_.has_gradient());
}

TEST_F(TapeErrors, OfAViewThatOutlivesATruncatedSegment) {
  Variable base = toy_square(w_);
  Variable view;
  checkpoint("frozen", [&] { view = no_grad([&] { return toy_slice(base, 0, 1); }); });
  Tape other;
  {
    Tape::Scope scope(other);
    EXPECT_EQ(error_of([&] { toy_square(view); }),
              "[toy_square] input 0 is on another tape than the current one: detach it");
  }
  tape_.reset();
  EXPECT_EQ(error_of([&] { toy_square(view); }),
            "[toy_square] input 0 is of a tape that was reset (after backward): detach it");
}

// Two outputs are declared, the second is forgotten; in a replay when `calls` says so.
class Forgetful final : public Op {
 public:
  explicit Forgetful(int& calls) : calls_(calls) {}
  std::string_view name() const override { return "forgetful"; }
  std::size_t outputs() const override { return 2; }
  void forward(Forward& run) const override {
    run.output(0, run.input(0).shape(), DType::f32).zero();
    if (calls_-- > 0) {
      run.output(1, run.input(0).shape(), DType::f32).zero();
    }
  }
  Saved saved(Mask) const override { return {.inputs = 0, .outputs = 3}; }
  void backward(Backward& run) const override { run.into(0).tensor.zero(); }
  Cost cost(const Call&) const override { return {}; }

 private:
  int& calls_;
};

TEST_F(TapeErrors, OfAnOpThatMakesNotAllOfItsOutputs) {
  int calls = 0;
  auto call = [&] { return apply(std::make_unique<Forgetful>(calls), {toy_square(w_)}); };
  const char* text = "[forgetful] forward made no output 1 of 2";
  EXPECT_EQ(error_of(call), text);
  EXPECT_EQ(tape_.report().records, 1) << "the square";
  EXPECT_EQ(error_of([&] { checkpoint("s", call); }), text);
  EXPECT_EQ(error_of([&] { no_grad(call); }), text);
  calls = 1;
  Variable loss = toy_sum(checkpoint("s", call));
  EXPECT_EQ(error_of([&] { backward(loss); }), text);
  w_.zero_gradient();
  scope_.reset();
  EXPECT_EQ(error_of(call), text);
}

TEST_F(TapeErrors, OfBackwardsArguments) {
  Variable loss = toy_sum(toy_square(w_));
  EXPECT_EQ(error_of([&] { backward(std::span<const Variable>()); }),
            "[backward] at least one loss is needed");
  EXPECT_EQ(error_of([&] { backward(Variable()); }), "[backward] loss 0 is absent");
  EXPECT_EQ(error_of([&] { backward(toy_square(w_)); }),
            "[backward] loss 0 must be a scalar, got shape [2]");
  EXPECT_EQ(error_of([&] { backward(toy_sum(Variable(vec({1})))); }),
            "[backward] loss 0 does not need a gradient: nothing trainable leads to it");
  EXPECT_EQ(error_of([&] {
              BackwardOptions options;
              options.scale = {1, 2};
              backward(loss, options);
            }),
            "[backward] scale must have one factor a loss = 1, got 2");
  const Variable constant[] = {Variable(vec({1}))};
  EXPECT_EQ(error_of([&] {
              grad({&loss, 1}, constant);
            }),
            "[backward] value 0 does not need a gradient");
  const Variable parameter[] = {Variable(w_)};
  EXPECT_EQ(error_of([&] {
              grad({&loss, 1}, parameter);
            }),
            "[backward] value 0 is parameter w: call backward() and read its gradient()");
  const Variable absent[] = {Variable()};
  EXPECT_EQ(error_of([&] { grad({&loss, 1}, absent); }), "[backward] value 0 is absent");
  Tape other;
  {
    Tape::Scope scope(other);
    EXPECT_EQ(error_of([&] { backward(loss); }), "[backward] loss 0 is on another tape");
  }
  EXPECT_EQ(error_of([&] { checkpoint("s", [&] { backward(loss); }); }),
            "[backward] a segment is open: backward belongs outside of checkpoint()");
  EXPECT_FALSE(w_.has_gradient());
  backward(loss);
  EXPECT_EQ(error_of([&] { backward(loss); }),
            "[backward] loss 0 is of a tape that was released: backward ran already without keep");
  scope_.reset();
  EXPECT_EQ(error_of([&] { backward(loss); }),
            "[backward] no tape is current: make a Tape::Scope around forward and backward");
}

TEST_F(TapeErrors, OfCallbacks) {
  auto inside = [&](const std::function<void()>& f) {
    std::string text;
    w_.zero_gradient();
    Variable loss = toy_sum(toy_square(w_));
    BackwardOptions options;
    options.on_ready = [&](Parameter&) { text = error_of(f); };
    backward(loss, options);
    return text;
  };
  Variable x(vec({1}));
  EXPECT_EQ(inside([&] { toy_square(x); }),
            "[toy_square] an op cannot run during a sweep (from a callback of backward)");
  EXPECT_EQ(inside([&] { checkpoint("s", [] {}); }),
            "[checkpoint] segment s cannot be opened during a sweep");
  EXPECT_EQ(inside([&] { backward(x); }),
            "[backward] a sweep of this tape is under way: backward inside a callback of backward");
  EXPECT_EQ(inside([&] { tape_.reset(); }), "[reset] a sweep of this tape is under way");
  EXPECT_EQ(inside([&] {
              Tape other;
              Tape::Scope scope(other);
              backward(toy_sum(toy_mul(v_, w_)));
            }),
            "[backward] parameter w is in another sweep");
  EXPECT_FALSE(v_.has_gradient());
  // The claim on v was given up.
  Tape other;
  Tape::Scope scope(other);
  backward(toy_sum(v_));
}

TEST_F(TapeErrors, OfParameters) {
  EXPECT_EQ(error_of([&] { w_.gradient(); }), "[gradient] w has no gradient");
  EXPECT_EQ(error_of([&] { w_.bind_value(vec({1})); }),
            "[bind_value] w must be f32 [2], got f32 [1]");
  EXPECT_EQ(error_of([&] { w_.set_grad_dtype(DType::bf16); }),
            "[set_grad_dtype] gradient of w must be f32 or f32, got bf16");
  EXPECT_EQ(error_of([&] { w_.bind_gradient(vec({1})); }),
            "[bind_gradient] storage for w must be contiguous f32 [2], got f32 [1]");
  w_.bind_gradient(vec({0, 0}));
  EXPECT_EQ(error_of([&] { w_.set_grad_dtype(DType::f32); }),
            "[set_grad_dtype] w has a gradient or a bound storage already");
  EXPECT_EQ(error_of([&] { Policies().set("layers.*", Policy()); }),
            "[policy] the policy for segments \"layers.*\" is empty");
  EXPECT_EQ(error_of([&] { keep_all() | Policy(); }), "[policy] one side of | is empty");
  EXPECT_EQ(error_of([&] { Policies::named("keep-some"); }),
            "[policy] must be one of keep-all, keep-products, inputs-only, nested, or one of them "
            "with +offload, got \"keep-some\"");
}

}  // namespace
}  // namespace reprise::testing

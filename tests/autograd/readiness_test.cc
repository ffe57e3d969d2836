// When a parameter's gradient is complete, and when its data is not read any more: both exact and
// known before the sweep.
#include <limits>

#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

class Readiness : public TapeTest {
 protected:
  // "w x 3" for w with three contributions, in the announced order; checks that on_ready follows
  // it, each parameter once.
  std::vector<std::string> sweep(std::span<const Variable> losses,
                                 std::vector<Parameter*> parameters = {}, bool keep = false) {
    std::vector<std::string> announced, order, fired;
    BackwardOptions options;
    options.keep = keep;
    options.parameters = parameters;
    options.on_plan = [&](const Plan& plan) {
      for (const Ready& r : plan.order) {
        announced.push_back(fmt::format("{} x {}", r.parameter->name(), r.expected));
        order.push_back(r.parameter->name());
      }
      for (Parameter* p : plan.unreached) {
        unreached_.push_back(p->name());
      }
    };
    options.on_ready = [&](Parameter& p) { fired.push_back(p.name()); };
    backward(losses, options);
    EXPECT_EQ(fired, order);
    return announced;
  }
  std::vector<std::string> sweep(const Variable& loss, std::vector<Parameter*> parameters = {}) {
    return sweep({&loss, 1}, std::move(parameters));
  }
  using Names = std::vector<std::string>;

  Tape tape_;
  Tape::Scope scope_{tape_};
  Parameter w_{"w", vec({0.5f})}, v_{"v", vec({2})}, frozen_{"frozen", vec({3}), false};
  Names unreached_;
};

TEST_F(Readiness, TiedWeightsAreOneParameterWithTwoContributions) {
  Variable x = toy_tanh(toy_mul(Variable(vec({1})), w_));
  EXPECT_EQ(sweep(toy_sum(toy_mul(toy_mul(x, v_), w_))), (Names{"v x 1", "w x 2"}));
}

TEST_F(Readiness, AWeightInThreeNestedSegments) {
  auto block = [&](Variable x) { return toy_tanh(toy_mul(x, w_)); };
  Variable y = checkpoint("a", [&] {
    Variable x = block(vec({1}));
    return checkpoint("b", [&] {
      Variable z = block(x);
      return toy_mul(checkpoint("c", [&] { return block(z); }), v_);
    });
  });
  EXPECT_EQ(sweep(toy_sum(y)), (Names{"v x 1", "w x 3"}));
}

TEST_F(Readiness, TheSameLayerTwice) {
  auto layer = [&](Variable x) {
    return checkpoint("layer", [&] { return toy_tanh(toy_add(toy_mul(x, w_), v_)); });
  };
  EXPECT_EQ(sweep(toy_sum(layer(layer(vec({1}))))), (Names{"v x 2", "w x 2"}));
}

TEST_F(Readiness, OneParameterAtTwoInputsOfARecordIsReadyAtTheLast) {
  EXPECT_EQ(sweep(toy_sum(toy_mul_add(w_, v_, w_))), (Names{"v x 1", "w x 2"}));
}

TEST_F(Readiness, FrozenParametersAreNotAnnounced) {
  EXPECT_EQ(sweep(toy_sum(toy_mul(toy_mul(w_, frozen_), v_)), {&w_, &v_, &frozen_}),
            (Names{"v x 1", "w x 1"}));
  EXPECT_FALSE(frozen_.has_gradient());
}

TEST_F(Readiness, UnreachedParametersComeFirstAndAreNamed) {
  Parameter unused("unused", vec({1}));
  Variable dead = checkpoint("dead", [&] { return toy_square(v_); });
  EXPECT_EQ(sweep(toy_sum(toy_square(w_)), {&w_, &v_, &unused}),
            (Names{"v x 0", "unused x 0", "w x 1"}));
  EXPECT_EQ(unreached_, (Names{"v", "unused"}));
  EXPECT_FALSE(v_.has_gradient());
}

TEST_F(Readiness, AParameterGivenTwiceIsAnnouncedOnce) {
  Parameter unused("unused", vec({1}));
  EXPECT_EQ(sweep(toy_sum(toy_square(w_)), {&unused, &w_, &unused, &w_}),
            (Names{"unused x 0", "w x 1"}));
  EXPECT_EQ(unreached_, (Names{"unused"}));
}

TEST_F(Readiness, ANullParameterIsANamedError) {
  EXPECT_EQ(error_of([&] {
              sweep(toy_sum(toy_square(w_)), {&w_, nullptr});
            }),
            "[backward] parameter 1 of the options is null");
  EXPECT_FALSE(w_.has_gradient());
}

TEST_F(Readiness, ReachAllMakesAnUnreachedParameterANamedError) {
  Parameter unused("unused", vec({1}));
  Parameter* all[] = {&w_, &v_, &frozen_, &unused};
  int plans = 0;
  BackwardOptions options;
  options.parameters = all;
  options.reach_all = true;
  options.on_plan = [&](const Plan&) { ++plans; };
  const Variable loss = toy_sum(toy_mul(w_, frozen_));
  EXPECT_EQ(error_of([&] { backward(loss, options); }),
            "[backward] no path leads from the losses to v, unused");
  EXPECT_EQ(plans, 0);
  EXPECT_FALSE(w_.has_gradient());
  options.parameters = std::span(all).first(1);
  backward(loss, options);
  EXPECT_EQ(plans, 1);
  EXPECT_TRUE(w_.has_gradient());
}

TEST_F(Readiness, TwoLossesCountTogether) {
  Variable h = toy_mul(w_, v_);
  const Variable losses[] = {toy_sum(toy_mul(h, w_)), toy_sum(h)};
  EXPECT_EQ(sweep(losses), (Names{"w x 2", "v x 1"}));
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{2 * 0.5f * 2 + 2}));
}

TEST_F(Readiness, ParametersThatAreLossesComeInTheLossesOrder) {
  Parameter unused("unused", vec({1}));
  Variable used = toy_sum(toy_square(w_));
  for (bool reverse : {false, true}) {
    std::vector<Variable> losses = {Variable(w_), Variable(v_)};
    if (reverse) {
      std::swap(losses[0], losses[1]);
    }
    EXPECT_EQ(sweep(losses, {&unused}), reverse ? (Names{"unused x 0", "v x 1", "w x 1"})
                                                : (Names{"unused x 0", "w x 1", "v x 1"}));
  }
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{2}));
}

TEST_F(Readiness, EveryMicroBatchHasAPlanOfItsOwn) {
  for (int i = 1; i <= 3; ++i) {
    EXPECT_EQ(sweep(toy_sum(checkpoint("s", [&] { return toy_mul(w_, v_); })), {&w_, &v_}),
              (Names{"w x 1", "v x 1"}));
    EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{2.0f * static_cast<float>(i)}));
  }
}

TEST_F(Readiness, KeepingTheTapeFiresPerSweep) {
  Variable h = toy_mul(w_, v_);
  Variable one = toy_sum(h), two = toy_sum(toy_square(h));
  EXPECT_EQ(sweep({&one, 1}, {}, true), (Names{"w x 1", "v x 1"}));
  EXPECT_EQ(sweep({&two, 1}), (Names{"w x 1", "v x 1"}));
  EXPECT_EQ(numbers(w_.gradient()), (std::vector<float>{2 + 2 * 1 * 2}));
}

TEST_F(Readiness, AViewOfAParameterAddsOnce) {
  Parameter p("p", vec({1, 2}));
  Variable whole(p);
  Variable half = toy_slice(whole, 0, 1);
  EXPECT_EQ(sweep(toy_sum(toy_mul(toy_mul(half, half), toy_slice(whole, 1, 2)))), (Names{"p x 2"}));
  EXPECT_EQ(numbers(p.gradient()), (std::vector<float>{4, 1}));
}

// The records are numbered from 0; last_read is the lowest one that still reads the data.
TEST_F(Readiness, LastReadIsExact) {
  Parameter added("added", vec({1})), detached("detached", vec({4}));
  Variable x = toy_mul(w_, v_);  // 0: saves both
  x = toy_add(x, added);         // 1: reads no data again
  x = checkpoint("s", [&] {
    Variable y = toy_add(x, toy_square(detach(Variable(detached))));  // 2 detach 3 square 4 add
    return toy_tanh(toy_mul(y, frozen_));                             // 5, 6
  });
  Variable loss = toy_sum(x);  // 7
  x = Variable();
  std::map<std::string, std::int64_t> last_read;
  std::vector<std::string> fired;
  BackwardOptions options;
  Parameter* all[] = {&added};
  options.parameters = all;
  options.on_plan = [&](const Plan& plan) {
    for (const Ready& r : plan.order) {
      last_read[r.parameter->name()] = r.last_read;
    }
  };
  options.on_last_read = [&](Parameter& p) {
    fired.push_back(p.name());
    p.write().copy_from(vec({std::numeric_limits<float>::quiet_NaN()}));  // now it may change
  };
  backward(loss, options);
  EXPECT_EQ(last_read, (std::map<std::string, std::int64_t>{{"added", -1}, {"v", 0}, {"w", 0}}));
  EXPECT_EQ(fired, (std::vector<std::string>{"added", "frozen", "detached", "w", "v"}));
  EXPECT_EQ(numbers(added.gradient()).size(), 1u);
  EXPECT_EQ(numbers(w_.gradient())[0], numbers(w_.gradient())[0]) << "no NaN";
}

}  // namespace
}  // namespace reprise::testing

// Rows of docs/conformance.md: what else the peer's data-parallel tests assert.
#include <algorithm>
#include <map>
#include <string>

#include <gtest/gtest.h>

#include "distributed/local_world.h"
#include "nn/optimizer/adamw.h"
#include "tests/distributed/conformance/net.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::CommunicatorError;
using distributed::Mean;
using distributed::Reducer;

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

Variable once(Net& net, Variable x, int) {
  return net.segment(Net::block, net.l2, net.segment(Net::block, net.l1, std::move(x)));
}

TEST(BehaviourOnRanks, ControlFlowTheSameOnEveryRank) {
  expect_conformance([](Net& net, Variable x, int iteration) {
    return net.segment(Net::block, iteration < 2 ? net.l1 : net.l3, std::move(x));
  });
}

TEST(BehaviourOnRanks, ControlFlowDifferentOnEveryRank) {
  expect_conformance([](Net& net, Variable x, int iteration) {
    return net.segment(Net::block, (net.rank + iteration) % 3 == 0 ? net.l3 : net.l1, std::move(x));
  });
}

struct Outputs {
  Variable used, ignored;
};

TEST(BehaviourOnRanks, NestedOutputsOfWhichSomeAreUnused) {
  expect_conformance([](Net& net, Variable x, int) {
    const Outputs outputs = net.segment([&] {
      Outputs made;
      made.used = Net::block(net.l1, x);
      made.ignored = Net::block(net.l2, x);
      return made;
    });
    return outputs.used;
  });
}

TEST(BehaviourOnRanks, AnIgnoredOutputOfUsedParameters) {
  expect_conformance([](Net& net, Variable x, int) {
    x = net.segment(Net::block, net.l1, std::move(x));
    (void)net.segment(Net::block, net.l1, x);
    return net.segment(Net::block, net.l2, std::move(x));
  });
}

// One parameter under two modules, of which one is unused.
TEST(BehaviourOnRanks, SharedParametersOfAnUnusedModule) {
  expect_conformance([](Net& net, Variable x, int) {
    (void)silu(linear(x, net.l1.weight, net.l3.bias));
    return net.segment(Net::block, net.l1, std::move(x));
  });
}

TEST(BehaviourOnRanks, GradientsThatNobodyMakesStayAbsent) {
  on_ranks([](Communicator& ranks) {
    for (const Values& gradients : train(ranks, once, true, {}, {})) {
      EXPECT_TRUE(gradients[4].empty() && gradients[5].empty());
      EXPECT_FALSE(gradients[0].empty() || gradients[2].empty());
    }
  });
}

// Used by some rank: all have it. Used by none: untouched, bit for bit.
TEST(BehaviourOnRanks, GloballyUnusedStaysUntouchedLocallyUnusedGetsTheMean) {
  on_ranks([](Communicator& ranks) {
    Net net, alone;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    {
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      Variable x = net.segment(Net::block, net.l1, rows_of(ranks.rank(), 0));
      reducer.backward(mean_square(net.segment(Net::block, net.l3, std::move(x))));
    }
    const auto before = net.l3.weight.gradient().to_vector<float>();
    auto loss = [](Net& of, int rank) {
      Variable x = of.segment(Net::block, of.l1, rows_of(rank, 1));
      return mean_square(rank == 1 ? of.segment(Net::block, of.l2, std::move(x)) : std::move(x));
    };
    net.l1.weight.zero_gradient();
    {
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      reducer.backward(loss(net, ranks.rank()));
    }
    EXPECT_EQ(net.l3.weight.gradient().to_vector<float>(), before);
    {
      const Tape::Scope scope(tape);
      backward(loss(alone, 1));
    }
    const auto got = net.l2.weight.gradient().to_vector<float>();
    const auto expected = alone.l2.weight.gradient().to_vector<float>();
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i], expected[i] / static_cast<float>(ranks.size()));
    }
  });
}

TEST(BehaviourOnRanks, ParametersThatMustBeReachedAreNamed) {
  on_ranks([](Communicator& ranks) {
    Net net;
    const auto world = distributed::world_of_one();
    Reducer reducer(*world, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape);
    BackwardOptions options;
    options.reach_all = true;
    const Variable loss = mean_square(Net::block(net.l1, rows_of(ranks.rank(), 0)));
    EXPECT_EQ(error_of([&] { reducer.backward(loss, options); }),
              "[backward] no path leads from the losses to l2.weight, l2.bias, l3.weight, l3.bias");
  });
}

// The peer's buckets cannot be rebuilt with unused parameters, and it must finish a reduction
// before the next forward: here neither is a state that can be wrong.
TEST(BehaviourOnRanks, AForwardWithoutBackwardLeavesNothingBehind) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    for (int i = 0; i < 3; ++i) {
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      net.zero();
      (void)once(net, rows_of(ranks.rank(), i), i);
      tape.reset();
      reducer.backward(mean_square(once(net, rows_of(ranks.rank(), i), i)));
    }
    EXPECT_EQ(reducer.steps(), 3);
    EXPECT_EQ(error_of([&] { reducer.finish(); }),
              "[reducer] finish() belongs after a backward with the options of attach()");
  });
}

// A module that is used outside of the forward is one more contribution.
TEST(BehaviourOnRanks, AModuleUsedOutsideOfTheForward) {
  expect_conformance([](Net& net, Variable x, int i) {
    x = once(net, std::move(x), i);
    return add(x, Net::block(net.l2, x));
  });
}

TEST(BehaviourOnRanks, AccumulationWithoutCommunication) {
  expect_conformance(once, {.micro_batches = 2});
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape);
    const Variable loss = mean_square(once(net, rows_of(ranks.rank(), 0), 0));
    reducer.accumulate(loss);
    Net alone;  // still this rank's own
    Tape other;
    const Tape::Scope inner(other);
    backward(mean_square(once(alone, rows_of(ranks.rank(), 0), 0)));
    EXPECT_EQ(net.gradients(), alone.gradients());
    reducer.backward(mean_square(once(net, rows_of(ranks.rank(), 1), 0)));
    const Tensor root = net.l1.weight.gradient().clone();
    ranks.broadcast(root, 0, {"compare"}).wait();
    EXPECT_EQ(root.to_vector<float>(), net.l1.weight.gradient().to_vector<float>());
  });
}

TEST(BehaviourOnRanks, GradientsOfSeveralStepsAddUpWhenTheyAreNotZeroed) {
  on_ranks([](Communicator& ranks) {
    Values sum;
    Net net, zeroed;
    Reducer reducer(ranks, net.parameters), other(ranks, zeroed.parameters);
    for (int i = 0; i < 3; ++i) {
      Tape tape;
      const Tape::Scope scope(tape);
      reducer.backward(mean_square(once(net, rows_of(ranks.rank(), i), i)));
      zeroed.zero();
      other.backward(mean_square(once(zeroed, rows_of(ranks.rank(), i), i)));
      const Values mine = zeroed.gradients();
      sum.resize(mine.size());
      for (std::size_t p = 0; p < mine.size(); ++p) {
        sum[p].resize(mine[p].size());
        for (std::size_t k = 0; k < mine[p].size(); ++k) {
          sum[p][k] += mine[p][k];
        }
      }
    }
    expect_close({net.gradients()}, {sum});
  });
}

TEST(BehaviourOnRanks, SeveralOutputsSeveralBackwards) {
  on_ranks([](Communicator& ranks) {
    Net together, apart;
    Reducer first(ranks, together.parameters), second(ranks, apart.parameters);
    auto losses = [&](Net& net) {
      const Variable x = net.segment(Net::block, net.l1, rows_of(ranks.rank(), 0));
      return std::pair(mean_square(Net::block(net.l2, x)), mean_square(Net::block(net.l3, x)));
    };
    Tape tape;
    {
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      const auto [a, b] = losses(together);
      const Variable both[] = {a, b};
      first.backward(both);
    }
    {
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      const auto [a, b] = losses(apart);
      BackwardOptions keep;
      keep.keep = true;
      second.accumulate(a, keep);
      second.backward(b);
    }
    expect_close({apart.gradients()}, {together.gradients()});
  });
}

TEST(BehaviourOnRanks, SeveralForwardsBeforeOneBackward) {
  expect_conformance([](Net& net, Variable x, int i) {
    Variable y = once(net, x, i);
    for (int k = 0; k < 3; ++k) {
      y = add(std::move(y), once(net, x, i));
    }
    return y;
  });
}

TEST(BehaviourOnRanks, ATensorMadeInTheForward) {
  expect_conformance([](Net& net, Variable x, int i) {
    x = net.segment(
        [&](Variable y) {
          return add(Net::block(net.l1, y), Variable(Tensor::full(y.shape(), DType::f32, 0.5)));
        },
        std::move(x));
    return once(net, std::move(x), i);
  });
}

TEST(BehaviourOnRanks, AnOutputThatNeedsNoGradient) {
  expect_conformance([](Net& net, Variable x, int i) {
    const Variable mask = no_grad([&] { return Net::block(net.l3, x); });
    return mul(once(net, std::move(x), i), mask);
  });
}

// Without a tape there are no gradients and no collectives.
TEST(BehaviourOnRanks, EvaluationBetweenSteps) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    for (int i = 0; i < 2; ++i) {
      if (ranks.rank() == 0) {
        (void)once(net, rows_of(0, 9), i);
      }
      Tape tape;
      const Tape::Scope scope(tape);
      net.zero();
      reducer.backward(mean_square(once(net, rows_of(ranks.rank(), i), i)));
    }
    EXPECT_EQ(reducer.steps(), 2);
  });
}

TEST(BehaviourOnRanks, SettingsCannotChangeInAStep) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape);
    BackwardOptions options;
    reducer.attach(options);
    EXPECT_EQ(error_of([&] { reducer.update_early({}); }),
              "[reducer] an early update cannot be changed in a step");
    const Variable loss = mean_square(once(net, rows_of(ranks.rank(), 0), 0));
    backward(loss, options);
    reducer.finish();
  });
}

// A module frozen on all ranks in the middle of a run, and thawed again.
TEST(BehaviourOnRanks, WhatIsTrainableMayChange) {
  on_ranks([](Communicator& ranks) {
    std::vector<Values> results[2];
    for (const bool segments : {false, true}) {
      Net net;
      net.segments = segments;
      Reducer reducer(ranks, net.parameters);
      for (int i = 0; i < 6; ++i) {
        net.zero();
        net.l2.weight.set_trainable(i / 2 != 1);
        Tape tape;
        const Tape::Scope scope(tape, Policies::named("inputs-only"));
        reducer.backward(mean_square(once(net, rows_of(ranks.rank(), i), i)));
        EXPECT_EQ(net.l2.weight.has_gradient(), i / 2 != 1);
        results[segments ? 1 : 0].push_back(net.gradients());
      }
    }
    EXPECT_TRUE(same_bits(results[0], results[1]));
  });
}

TEST(BehaviourOnRanks, Bf16CompressionIsCloseToNone) {
  on_ranks([](Communicator& ranks) {
    const auto plain = train(ranks, once, true, {}, {});
    distributed::ReducerOptions options;
    options.compress = true;
    const auto packed = train(ranks, once, true, {}, {.options = options});
    EXPECT_TRUE(same_bits(train(ranks, once, false, {1, 1}, {.options = options}), packed));
    for (std::size_t p = 0; p < 4; ++p) {
      for (std::size_t i = 0; i < plain[0][p].size(); ++i) {
        EXPECT_NEAR(packed[0][p][i], plain[0][p][i], 1e-4 + 0.02 * std::abs(plain[0][p][i]));
      }
    }
    EXPECT_FALSE(same_bits(plain, packed));
  });
}

TEST(BehaviourOnRanks, TheOptimizerInBackwardGivesTheBitsOfTheOptimizerBehind) {
  on_ranks([](Communicator& ranks) {
    std::vector<std::vector<float>> values[2];
    for (const bool early : {false, true}) {
      Net net;
      Reducer reducer(ranks, net.parameters, {{1, 1}});
      nn::AdamW optimizer(net.parameters, {.weight_decay = 0.1});
      if (early) {
        reducer.update_early([&](std::span<Parameter* const> p) { optimizer.step_some(p, 1e-2); });
      }
      for (int i = 0; i < 4; ++i) {
        optimizer.zero_gradients();
        Tape tape;
        const Tape::Scope scope(tape, Policies::named("inputs-only"));
        Variable x = once(net, rows_of(ranks.rank(), i), i);
        reducer.backward(mean_square(once(net, std::move(x), i)));
        if (!early) {
          optimizer.step(1e-2);
        }
      }
      for (const Parameter* p : net.parameters) {
        values[early ? 1 : 0].push_back(p->value().to_vector<float>());
      }
    }
    EXPECT_EQ(values[0], values[1]);
  });
}

TEST(BehaviourOnRanks, OneRankStopsBeforeTheOthersAndModelsStayTheSame) {
  for (const bool live : {true, false}) {
    on_ranks([&](Communicator& ranks) {
      Net net;
      Reducer reducer(ranks, net.parameters, {.divide_by_live = live});
      const int steps = 2 + 2 * ranks.rank();
      Tape tape;
      for (int i = 0;; ++i) {
        net.zero();
        if (i < steps) {
          const Tape::Scope scope(tape, Policies::named("inputs-only"));
          reducer.backward(mean_square(once(net, rows_of(ranks.rank(), i), i)));
        } else if (!reducer.join()) {
          break;
        }
        net.update();
      }
      EXPECT_EQ(reducer.steps(), 2 * ranks.size());
      for (const Parameter* p : net.parameters) {
        const Tensor root = p->value().clone();
        ranks.broadcast(root, 0, {"compare"}).wait();
        EXPECT_EQ(root.to_vector<float>(), p->value().to_vector<float>());
      }
    });
  }
}

// The last live rank's gradient, divided by one or by all.
TEST(BehaviourOnRanks, TheDivisionOfUnevenInputs) {
  for (const bool live : {true, false}) {
    on_ranks([&](Communicator& ranks) {
      Net net, alone;
      Reducer reducer(ranks, net.parameters, {.divide_by_live = live});
      const int last = ranks.size() - 1;
      if (ranks.rank() == last) {
        Tape tape;
        const Tape::Scope scope(tape);
        reducer.backward(mean_square(once(net, rows_of(last, 0), 0)));
      } else {
        EXPECT_TRUE(reducer.join());
      }
      EXPECT_FALSE(reducer.join());
      Tape tape;
      const Tape::Scope scope(tape);
      backward(mean_square(once(alone, rows_of(last, 0), 0)));
      const auto by = live ? 1.0f : static_cast<float>(ranks.size());
      const auto got = net.l1.weight.gradient().to_vector<float>();
      const auto expected = alone.l1.weight.gradient().to_vector<float>();
      for (std::size_t i = 0; i < got.size(); ++i) {
        EXPECT_EQ(got[i], expected[i] / by);
      }
    });
  }
}

// A rank that has run out and does not join: the others end with an error that names it. (Here the
// collective is another; a rank that leaves altogether is the faults' part.)
TEST(BehaviourOnRanks, WithoutJoinUnevenInputsAreAnErrorOnEveryRank) {
  const auto body = [](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape);
    reducer.backward(mean_square(once(net, rows_of(ranks.rank(), 0), 0)));
    const std::string error = error_of([&] {
      if (ranks.rank() == 0) {
        net.zero();
        reducer.backward(mean_square(once(net, rows_of(0, 1), 1)));
      } else {
        ranks.barrier({"end of the epoch"}).wait();
      }
    });
    EXPECT_NE(error.find("ranks disagree at collective"), std::string::npos) << error;
    EXPECT_NE(error.find("rank 0 has \"state before a step\", rank 1 has \"end of the epoch\""),
              std::string::npos)
        << error;
  };
  // The communicator is of no use afterwards, so that it is one of this test's own.
  EXPECT_THROW(distributed::run_ranks(2, body), CommunicatorError);
}

TEST(BehaviourOnRanks, HigherOrderGradientsAreANamedError) {
  Net net;
  Tape tape;
  const Tape::Scope scope(tape);
  const Variable x = Variable::leaf(rows_of(0, 0));
  const Variable loss = mean_square(Net::block(net.l1, x));
  const std::vector<Tensor> gradients = grad({&loss, 1}, {&x, 1});
  EXPECT_EQ(error_of([&] { backward(mean_square(Variable(gradients[0]))); }),
            "[backward] loss 0 does not need a gradient: nothing trainable leads to it");
}

}  // namespace
}  // namespace reprise::testing

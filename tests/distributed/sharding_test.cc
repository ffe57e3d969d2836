// Sharded training is unsharded training, bit by bit, at every stage, and gathers nothing twice.
#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/elementwise.h"
#include "core/philox.h"
#include "distributed/local_world.h"
#include "nn/optimizer/adamw.h"
#include "nn/optimizer/clip.h"
#include "tests/autograd/tape_fixture.h"
#include "tests/distributed/sharded_training.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::CommunicatorError;
using distributed::ForwardReads;
using distributed::GatherEvent;
using distributed::run_ranks;
using distributed::Sharding;
using distributed::ShardUnit;

TEST(Sharding, EveryStageHasTheBitsOfAnUnshardedRun) {
  for (const int size : {1, 2, 3, 4}) {
    SCOPED_TRACE(size);
    expect_every_stage_equal(size, {.config = glm4()});
  }
}

TEST(Sharding, UnderEveryPolicyWithTiedWeights) {
  for (const std::string& policy : Policies::names()) {
    SCOPED_TRACE(policy);
    expect_every_stage_equal(2, {.config = tied_llama(), .policy = policy});
  }
}

TEST(Sharding, WithAFrozenBase) {
  for (const char* policy : {"inputs-only", "keep-all"}) {
    expect_every_stage_equal(2, {.config = glm4(), .policy = policy, .lora_rank = 2});
  }
}

TEST(Sharding, WithMicroBatches) {
  expect_every_stage_equal(3, {.config = tied_llama(), .micro_batches = 3});
}

TEST(Sharding, OfBf16WithMastersAndBothGradientTypes) {
  for (const DType gradients : {DType::bf16, DType::f32}) {
    expect_every_stage_equal(
        2,
        {.config = glm4(), .dtype = DType::bf16, .grad_dtype = gradients, .master_weights = true});
  }
}

// The whole forward in one more segment, and a callable that wraps it: what broke where sharding
// looks at modules.
TEST(Sharding, OverAWrappedForward) {
  ShardedRun run{.config = glm4()};
  run.loss = [](nn::Model& model, const nn::Batch& batch) {
    const auto wrapped = [&](const nn::Batch& in) { return model.loss(in); };
    return checkpoint("wrapped", wrapped, batch);
  };
  expect_every_stage_equal(2, run);
}

// Two segments read the same weights, in two forwards over one model.
TEST(Sharding, OfAModelThatRunsTwiceInAForward) {
  ShardedRun run{.config = tied_llama()};
  run.loss = [](nn::Model& model, const nn::Batch& batch) {
    const Variable first = model.loss(batch);
    return add(first, model.loss(sharded_batch(9, 9, 9, batch.ids.device())));
  };
  for (const std::string& policy : Policies::names()) {
    run.policy = policy;
    expect_every_stage_equal(2, run);
  }
}

// One rank leaves blocks out; some parameters are used by nobody.
class Branches {
 public:
  explicit Branches(int count) {
    for (int i = 0; i < count; ++i) {
      parameters_.push_back(
          std::make_unique<Parameter>("p" + std::to_string(i), vec({1, 0.5f, -1, 2 + float(i)})));
      list.push_back(parameters_.back().get());
    }
  }
  Variable loss(int rank, bool branch) {
    Variable x = vec({1, 2, 3, 4 + float(rank)});
    for (std::size_t i = 0; i < 2; ++i) {
      x = checkpoint("block", [&] { return toy_tanh(toy_mul(x, *list[i])); });
    }
    if (branch) {
      x = checkpoint("branch", [&] { return toy_mul(x, *list[2]); });
    }
    return toy_sum(toy_square(x));
  }
  ForwardReads reads() {
    return distributed::record_reads(list, [&] { (void)loss(0, true); });
  }
  std::vector<Parameter*> list;

 private:
  std::vector<std::unique_ptr<Parameter>> parameters_;
};

TEST(Sharding, RanksThatUseDifferentParameters) {
  for (int stage : {1, 2, 3}) {
    for (const int brancher : {0, 1, 2, -1}) {
      run_ranks(3, [&](Communicator& ranks) {
        Branches plain(4), cut(4);
        distributed::Reducer reducer(ranks, plain.list);
        Sharding sharding(ranks, cut.list, cut.reads(), {.stage = stage});
        nn::AdamW whole(plain.list), parts(sharding.shards());
        for (int step = 0; step < 3; ++step) {
          Tape tape;
          const Tape::Scope scope(tape);
          const bool branch = ranks.rank() == brancher && step != 1;
          whole.zero_gradients();
          sharding.zero_gradients();
          reducer.backward(plain.loss(ranks.rank(), branch));
          sharding.backward(cut.loss(ranks.rank(), branch));
          EXPECT_EQ(sharding.global_norm(), nn::global_norm(plain.list));
          whole.step(0.1);
          parts.step(0.1);
          sharding.updated();
          for (std::size_t i = 0; i < plain.list.size(); ++i) {
            EXPECT_EQ(numbers(sharding.gathered(*cut.list[i])), numbers(plain.list[i]->value()))
                << "stage " << stage << ", step " << step << ", parameter " << i;
          }
        }
      });
    }
  }
}

// Ranks go through blocks in orders of their own, leave some out, or run some twice: the counts of
// gathers say what it costs.
struct Turns {
  std::vector<std::vector<std::size_t>> of_rank;  // blocks of a forward
};

Variable loss_of_turns(const std::vector<Parameter*>& list, const std::vector<std::size_t>& turns,
                       float data) {
  Variable x = vec({1, 2, 3, data});
  for (const std::size_t i : turns) {
    x = checkpoint("block", [&] { return toy_tanh(toy_mul(x, *list[i])); });
  }
  return toy_sum(toy_square(x));
}

TEST(Sharding, GathersOfRanksWithBranchesOfTheirOwn) {
  const std::vector<Turns> cases{
      {{{0, 1, 2}, {0, 1, 2}}},        // the same everywhere
      {{{0, 1, 2}, {0, 2}}},           // one leaves a block out
      {{{0, 1}, {2, 3}}},              // nothing in common
      {{{0, 1, 2, 3}, {3, 2, 1, 0}}},  // the other way round
      {{{0, 1, 0, 1}, {0, 1, 2, 0}}},  // some twice
      {{{0, 3}, {0, 1, 2, 3}}},
  };
  for (const Turns& turns : cases) {
    run_ranks(2, [&](Communicator& ranks) {
      Branches plain(4), cut(4);
      const auto& mine = turns.of_rank[static_cast<std::size_t>(ranks.rank())];
      const auto reads = distributed::record_reads(cut.list, [&] {
        (void)loss_of_turns(cut.list, {0, 1, 2, 3}, 1);
      });
      distributed::Reducer reducer(ranks, plain.list);
      Sharding sharding(ranks, cut.list, reads, {.stage = 3});
      ASSERT_EQ(sharding.units().size(), 4u);
      nn::AdamW whole(plain.list), parts(sharding.shards());
      for (int step = 0; step < 4; ++step) {
        Tape tape;
        const Tape::Scope scope(tape, Policies::named("inputs-only"));
        whole.zero_gradients();
        sharding.zero_gradients();
        const auto data = static_cast<float>(step + 3 * ranks.rank());
        reducer.backward(loss_of_turns(plain.list, mine, data));
        sharding.clear_gathers();
        sharding.backward(loss_of_turns(cut.list, mine, data));
        std::vector<std::pair<int, int>> counts(4);
        for (const GatherEvent& event : sharding.gathers()) {
          ++(event.sweep ? counts[event.unit].second : counts[event.unit].first);
        }
        for (const auto& [in_forward, in_sweep] : counts) {
          // A block that comes back where the forward before had not: once more, the first time.
          EXPECT_LE(in_forward, step == 0 ? 2 : 1) << "step " << step;
          EXPECT_LE(in_sweep, 1) << "step " << step;
        }
        whole.step(0.1);
        parts.step(0.1);
        sharding.updated();
        for (std::size_t i = 0; i < plain.list.size(); ++i) {
          EXPECT_EQ(numbers(sharding.gathered(*cut.list[i])), numbers(plain.list[i]->value()))
              << "step " << step << ", parameter " << i;
        }
      }
    });
  }
}

// Forwards without a sweep of their own, on all ranks; one that only some end is an error on all.
TEST(Sharding, RanksThatGoOnDifferentlyAfterAForward) {
  const std::string text = error_of([] {
    run_ranks(2, [](Communicator& ranks) {
      Branches cut(4);
      Sharding sharding(ranks, cut.list, cut.reads(), {.stage = 3});
      Tape tape;
      const Tape::Scope scope(tape);
      for (int i = 0; i < 2; ++i) {  // an evaluation, of which one rank needs more
        (void)cut.loss(ranks.rank(), ranks.rank() == 1);
        sharding.end_forward();
        tape.reset();
      }
      const Variable loss = cut.loss(ranks.rank(), true);
      ranks.rank() == 0 ? sharding.end_forward() : sharding.backward(loss);
    });
  });
  EXPECT_NE(text.find("ranks disagree after a forward: some end it, others go on with a backward"),
            std::string::npos)
      << text;
}

// How often each unit is gathered in a step: forwards, sweeps.
using Counts = std::vector<std::pair<int, int>>;
Counts counts_of(const Sharding& sharding) {
  Counts counts(sharding.units().size());
  for (const GatherEvent& event : sharding.gathers()) {
    ++(event.sweep ? counts[event.unit].second : counts[event.unit].first);
  }
  return counts;
}

TEST(Sharding, NothingIsGatheredTwiceInAForwardNorInASweep) {
  for (const std::string& config : {glm4(), tied_llama()}) {
    for (const std::string& policy : Policies::names()) {
      for (const std::int64_t lora_rank : {0, 2}) {
        ShardedRun run{.config = config, .stage = 3, .policy = policy, .lora_rank = lora_rank};
        run.look = [&](Sharding& sharding) {
          const Counts counts = counts_of(sharding);
          std::int64_t forward = 0, sweep = 0;
          for (const auto& [in_forward, in_sweep] : counts) {
            EXPECT_LE(in_forward, 1) << policy;
            EXPECT_LE(in_sweep, 1) << policy;
            forward += in_forward;
            sweep += in_sweep;
          }
          // Every unit is read in a forward. The last is there still when the sweep begins; what
          // only an embedding reads is not needed in it.
          const auto units = std::ssize(counts);
          EXPECT_EQ(forward, units) << policy;
          EXPECT_GT(sweep, 0) << policy;
          EXPECT_LT(sweep, units) << policy;
          // All but the first of a forward are sent for ahead.
          EXPECT_EQ(std::ranges::count(sharding.gathers(), false, &GatherEvent::ahead), 1)
              << policy;
          sharding.clear_gathers();
          for (const Parameter* p : sharding.parameters()) {
            EXPECT_FALSE(p->value().has_storage()) << p->name();
          }
        };
        (void)train_on(2, run);
      }
    }
  }
}

// A replay's gather serves the backward of its segment: one sweep gathers a block once although
// its replay and its backward read it.
TEST(Sharding, AReplaySharesTheGatherOfItsBackward) {
  run_ranks(2, [](Communicator& ranks) {
    Branches cut(4);
    Sharding sharding(ranks, cut.list, cut.reads(), {.stage = 3});
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("inputs-only"));
    const Variable loss = cut.loss(0, true);
    // In order of the forward, each ahead of its segment.
    std::vector<std::size_t> order;
    for (const GatherEvent& event : sharding.gathers()) {
      EXPECT_FALSE(event.sweep);
      order.push_back(event.unit);
    }
    EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 2}));
    sharding.clear_gathers();
    sharding.backward(loss);
    order.clear();
    for (const GatherEvent& event : sharding.gathers()) {
      EXPECT_TRUE(event.sweep);
      order.push_back(event.unit);
    }
    EXPECT_EQ(order, (std::vector<std::size_t>{1, 0}));  // 2 was there from the forward
    EXPECT_GT(tape.report().replayed_records, 0);
  });
}

TEST(Sharding, ABaseThatIsFrozenHasNoGradientAnywhere) {
  for (const int stage : {1, 2, 3}) {
    ShardedRun run{.config = glm4(), .stage = stage, .lora_rank = 2};
    run.look = [&](Sharding& sharding) {
      std::size_t adapters = 0;
      for (const Parameter* p : sharding.parameters()) {
        adapters += p->trainable();
        EXPECT_TRUE(p->trainable() || !p->has_gradient()) << p->name();
      }
      EXPECT_GT(adapters, 0u);
      for (const std::size_t unit : sharding.scattered()) {
        EXPECT_TRUE(sharding.units()[unit].trainable);
      }
      EXPECT_EQ(sharding.scattered().empty(), stage == 1);
      for (const Parameter* shard : sharding.shards()) {
        EXPECT_NE(shard->name().find("lora"), std::string::npos);
      }
    };
    (void)train_on(2, run);
  }
}

// Parameters of many chunks, cut in the middle of some.
TEST(Sharding, TheNormHasTheBitsOfTheWholeOne) {
  for (const int size : {2, 3, 5}) {
    run_ranks(size, [&](Communicator& ranks) {
      std::vector<std::unique_ptr<Parameter>> owned;
      std::vector<Parameter*> whole, cut;
      for (const bool sharded : {false, true}) {
        for (const std::int64_t n : {40000, 17, 1024, 70001, 5000, 1023}) {
          std::vector<float> values;
          for (std::int64_t i = 0; i < n; ++i) {
            values.push_back(
                uniform(philox(static_cast<std::uint64_t>(n), static_cast<std::uint64_t>(i))[0]) -
                0.3f);
          }
          owned.push_back(std::make_unique<Parameter>("p" + std::to_string(n), vec(values)));
          (sharded ? cut : whole).push_back(owned.back().get());
        }
      }
      const auto loss = [](const std::vector<Parameter*>& parameters) {
        return checkpoint("all", [&] {
          Variable sum = toy_sum(toy_square(*parameters[0]));
          for (std::size_t i = 1; i < parameters.size(); ++i) {
            sum = toy_add(sum, toy_sum(toy_square(*parameters[i])));
          }
          return sum;
        });
      };
      Sharding sharding(ranks, cut, distributed::record_reads(cut, [&] { (void)loss(cut); }),
                        {.stage = 3});
      EXPECT_EQ(sharding.units().size(), 1u);
      distributed::Reducer reducer(ranks, whole);
      Tape tape;
      const Tape::Scope scope(tape);
      reducer.backward(loss(whole));
      sharding.backward(loss(cut));
      EXPECT_EQ(sharding.global_norm(), nn::global_norm(whole));
    });
  }
}

TEST(Sharding, MistakesOfTheCaller) {
  run_ranks(1, [](Communicator& ranks) {
    Branches cut(4);
    const ForwardReads reads = cut.reads();
    EXPECT_EQ(error_of([&] { Sharding(ranks, cut.list, reads, {.stage = 4}); }),
              "[sharding] stage must be 1, 2 or 3, got 4");
    std::vector<Parameter*> twice = cut.list;
    twice.push_back(cut.list[0]);
    EXPECT_EQ(error_of([&] { Sharding(ranks, twice, reads); }),
              "[sharding] parameter p0 is in the list twice");
    EXPECT_EQ(error_of([&] { Sharding(ranks, {cut.list[0]}, reads); }),
              "[sharding] the reads name parameter 1 of 1");
    cut.list[3]->set_trainable(false);
    Sharding sharding(ranks, cut.list, reads, {.stage = 3});
    EXPECT_EQ(error_of([&] { Sharding(ranks, cut.list, reads); }),
              "[sharding] parameter p0 is sharded already");
    EXPECT_EQ(error_of([&] { (void)cut.reads(); }),
              "[record_reads] parameter p0 is sharded already");
    EXPECT_EQ(error_of([&] { sharding.finish(); }),
              "[sharding] finish() belongs after a backward with the options of attach()");
    Tape tape;
    const Tape::Scope scope(tape);
    sharding.backward(cut.loss(0, false));
    EXPECT_EQ(error_of([&] {
                BackwardOptions options;
                sharding.attach(options);
                backward(cut.loss(0, false), options);
              }),
              "[sharding] the gradients of step 1 are there still: zero_gradients() first");
    tape.reset();
    sharding.zero_gradients();
    cut.list[3]->set_trainable(true);
    EXPECT_EQ(error_of([&] {
                BackwardOptions options;
                sharding.attach(options);
                backward(toy_sum(toy_mul(cut.loss(0, false), *cut.list[3])), options);
              }),
              "[sharding] the losses reach parameter p3, which was not trainable, or not in the "
              "list, when the sharding was made");
    tape.reset();
    sharding.end_forward();
    // A tensor of a value that is elsewhere has no elements.
    EXPECT_THROW((void)cut.list[0]->value().to_vector<float>(), Error);
  });
}

TEST(Sharding, RanksThatDiffer) {
  const std::string text = error_of([] {
    run_ranks(3, [](Communicator& ranks) {
      Branches cut(4);
      Sharding sharding(ranks, cut.list, cut.reads(), {.stage = ranks.rank() == 1 ? 2 : 3});
    });
  });
  EXPECT_NE(text.find("ranks disagree about the stage: rank 1 has 2, the other 2 have 3"),
            std::string::npos)
      << text;
}

}  // namespace
}  // namespace reprise::testing

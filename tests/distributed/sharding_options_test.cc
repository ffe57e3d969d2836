// What a reducer can be asked for, asked of sharding: the bits of the unsharded run with the same
// options, at every stage.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/allocator.h"
#include "distributed/local_world.h"
#include "nn/optimizer/adamw.h"
#include "tests/autograd/tape_fixture.h"
#include "tests/distributed/sharded_training.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::GatherEvent;
using distributed::Mean;
using distributed::run_ranks;
using distributed::Sharding;

TEST(ShardingOptions, TheMeanOverTokens) {
  ShardedRun run{.config = glm4(), .micro_batches = 2};
  const ShardedResult by_ranks = train_on(3, run)[0];
  run.reduction.mean = Mean::tokens;
  const ShardedResult by_tokens = expect_every_stage_equal(3, run)[0];
  EXPECT_NE(by_ranks.norms, by_tokens.norms);
}

TEST(ShardingOptions, TokensThatNobodyCounted) {
  for (const int stage : {1, 2, 3}) {
    const std::string text = error_of([&] {
      run_ranks(1, [&](Communicator& ranks) {
        Parameter p("p", vec({1, 2}));
        Sharding sharding(ranks, {&p}, {}, {.stage = stage, .reduction = {.mean = Mean::tokens}});
        EXPECT_THROW(sharding.add_tokens(-1), Error);
        Tape tape;
        const Tape::Scope scope(tape);
        sharding.backward(toy_sum(toy_square(p)));
      });
    });
    EXPECT_NE(text.find("no tokens were counted since the last reduction: call add_tokens()"),
              std::string::npos)
        << text;
  }
}

TEST(ShardingOptions, Bf16Compression) {
  for (const int size : {2, 3}) {
    ShardedRun run{.config = tied_llama()};
    const ShardedResult exact = train_on(size, run)[0];
    run.reduction.compress = true;
    EXPECT_FALSE(expect_every_stage_equal(size, run)[0] == exact);
  }
}

// Every number of ranks that divides them gives the same values: with one, two or three partial
// sums on a rank.
TEST(ShardingOptions, FixedShardsOfTheBatch) {
  for (const int shards : {4, 12}) {
    ShardedRun run{.config = glm4(), .steps = 2};
    run.reduction.shards = shards;
    const ShardedResult one = expect_every_stage_equal(1, run)[0];
    for (const int size : {2, 4}) {
      const ShardedResult more = expect_every_stage_equal(size, run)[0];
      EXPECT_EQ(one.norms, more.norms) << size;
      EXPECT_TRUE(one.values == more.values) << size;
    }
  }
}

TEST(ShardingOptions, MistakesWithShards) {
  const auto with = [](distributed::ReducerOptions options, DType grad_dtype = DType::f32) {
    return error_of([&] {
      run_ranks(1, [&](Communicator& ranks) {
        Parameter p("p", Tensor::zeros({4}, grad_dtype));
        Sharding sharding(ranks, {&p}, {}, {.stage = 2, .reduction = options});
        Tape tape;
        const Tape::Scope scope(tape);
        if (options.shards == 2) {
          sharding.backward(toy_sum(toy_square(p)));
        } else {
          (void)sharding.join();
        }
      });
    });
  };
  EXPECT_EQ(with({.compress = true, .shards = 1}),
            "[reducer] with shards gradients cannot be compressed: bits would depend on the ranks");
  EXPECT_EQ(with({.shards = 1}, DType::bf16),
            "[sharding] the gradient of p must be f32 to be added over shards, got bf16");
  EXPECT_EQ(
      with({.shards = 2}),
      "[sharding] a rank has 2 of 2 shards: accumulate() for all but the last, backward() for "
      "that; this is backward() for shard 1");
  EXPECT_EQ(with({.shards = 1}), "[sharding] with shards every rank has data in every step");
}

// Ranks run out of data one after the other; all keep the same model.
TEST(ShardingOptions, UnevenInputs) {
  for (const bool by_live : {true, false}) {
    for (const int micro_batches : {1, 2}) {
      ShardedRun run{.config = tied_llama(), .steps = 5, .micro_batches = micro_batches};
      run.reduction.divide_by_live = by_live;
      run.data_of = {4, 2, 3};
      const std::vector<ShardedResult> plain = expect_every_stage_equal(3, run);
      EXPECT_EQ(plain[0].losses.size(), 4u);  // in the fifth nobody had any
      EXPECT_TRUE(plain[0].values == plain[1].values);
    }
  }
}

TEST(ShardingOptions, UpdatesAsGradientsArrive) {
  for (const char* policy : {"inputs-only", "nested", "keep-all"}) {
    ShardedRun run{.config = tied_llama(), .policy = policy, .micro_batches = 2};
    run.early = true;
    expect_every_stage_equal(2, run);
  }
  ShardedRun run{.config = glm4(), .steps = 4};
  run.early = true;
  run.data_of = {3, 2};
  expect_every_stage_equal(2, run);
}

// The first of a sweep's gradients are used while it runs; values that a replay will read are not.
TEST(ShardingOptions, EarlyUpdatesRunDuringTheSweep) {
  for (const int stage : {1, 2, 3}) {
    run_ranks(2, [&](Communicator& ranks) {
      std::vector<std::unique_ptr<Parameter>> owned;
      std::vector<Parameter*> list;
      for (int i = 0; i < 6; ++i) {
        owned.push_back(std::make_unique<Parameter>("p" + std::to_string(i), vec({1, 2, 3, 4})));
        list.push_back(owned.back().get());
      }
      const auto loss = [&] {
        Variable x = vec({0.1f, 0.2f, 0.3f, 0.4f});
        for (Parameter* p : list) {
          x = checkpoint("block", [&] { return toy_tanh(toy_mul(x, *p)); });
        }
        return toy_sum(x);
      };
      distributed::ReducerOptions reduction;
      reduction.buckets = {1, 1};
      Sharding sharding(ranks, list, distributed::record_reads(list, [&] { (void)loss(); }),
                        {.stage = stage, .reduction = reduction});
      EXPECT_EQ(sharding.units().size(), list.size());
      std::vector<std::string> events;
      sharding.update_early([&](std::span<Parameter* const> parts) {
        for (Parameter* part : parts) {
          EXPECT_TRUE(part->has_gradient());
          events.push_back(part->name());
        }
      });
      Tape tape;
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      BackwardOptions options;
      options.on_ready = [&](Parameter& p) {
        ranks.barrier({"the gradients before have arrived"}).wait();
        if (p.name() == "p0") {
          events.push_back("end");
        }
      };
      sharding.backward(loss(), options);
      const auto end = std::ranges::find(events, "end");
      EXPECT_EQ(std::ranges::count(events.begin(), end, "p0"), 0);
      if (ranks.rank() == 0) {  // which has a slice of each
        EXPECT_NE(end, events.begin()) << "stage " << stage;
        EXPECT_EQ(std::ranges::count(events, "p0"), 1);
      }
      EXPECT_EQ(std::set<std::string>(events.begin(), events.end()).size(), events.size());
      EXPECT_EQ(error_of([&] { (void)sharding.global_norm(); }),
                "[sharding] with an early update the gradients are used before their norm is "
                "known: clip by it, or update early");
    });
  }
}

TEST(ShardingOptions, RanksWithOtherOptions) {
  const std::string text = error_of([] {
    run_ranks(3, [](Communicator& ranks) {
      Parameter p("p", vec({1, 2}));
      Sharding sharding(ranks, {&p}, {},
                        {.stage = 3, .reduction = {.compress = ranks.rank() == 2}});
    });
  });
  EXPECT_NE(text.find("ranks disagree about the compression: rank 2 has 1, the other 2 have 0"),
            std::string::npos)
      << text;
}

// Values that an outer replay has gathered may go and come again: fewer are there at a time.
TEST(ShardingOptions, GatheringAgainUnderNestedSegments) {
  ShardedRun run{.stage = 3, .policy = "nested", .steps = 2};
  run.config = R"({"model_type": "llama", "hidden_size": 32, "intermediate_size": 72,
    "num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": false})";
  std::vector<ShardedResult> results;
  std::vector<int> most_gathers;
  std::vector<std::int64_t> peaks;
  for (const std::size_t again : {0, 2}) {
    run.gather_again = again;
    int most = 0;
    run.look = [&](Sharding& sharding) {
      std::multiset<std::size_t> in_sweep;
      for (const GatherEvent& event : sharding.gathers()) {
        if (event.sweep) {
          in_sweep.insert(event.unit);
          most = std::max(most, static_cast<int>(in_sweep.count(event.unit)));
        }
      }
      sharding.clear_gathers();
    };
    const auto parameters = static_cast<std::size_t>(MemoryKind::parameters);
    allocator(cpu).reset_peak();
    results.push_back(train_on(1, run)[0]);
    peaks.push_back(allocator(cpu).report().peak[parameters]);
    most_gathers.push_back(most);
    run.look = {};
    EXPECT_TRUE(train_on(2, run) == train_on(2, {.config = run.config, .steps = 2}));
  }
  EXPECT_TRUE(results[0] == results[1]);
  EXPECT_EQ(most_gathers[0], 1);
  // A block's values come for the replays of the segments around it, of which there are as many as
  // halvings.
  EXPECT_GT(most_gathers[1], 1);
  EXPECT_LE(most_gathers[1], 6);
  // Shards, which with one rank are all values, and at most three blocks, not half of them.
  EXPECT_GT(peaks[0], peaks[1] + peaks[1] / 8);
}

}  // namespace
}  // namespace reprise::testing

// Random data-parallel runs: models, segments, sharing, frozen sets, branches by rank, bucket
// sizes, accumulation, uneven data, compression, shards and numbers of ranks are drawn. On every
// rank and in every step gradients and updated values must be those of one process without a
// reducer, bit for bit.
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "distributed/local_world.h"
#include "tests/distributed/rank_program.h"

namespace reprise::testing {
namespace {

int count_of_programs() {
  const char* asked = std::getenv("REPRISE_PROGRAMS");  // fewer under a sanitizer
  return asked == nullptr ? 600 : std::max(60, std::atoi(asked) / 10);
}

std::vector<std::vector<StepResult>> run(const RankProgram& program) {
  std::vector<std::vector<StepResult>> results(static_cast<std::size_t>(program.ranks));
  distributed::run_ranks(program.ranks, [&](distributed::Communicator& ranks) {
    results[static_cast<std::size_t>(ranks.rank())] = run_rank(program, ranks);
  });
  return results;
}

// Every rank gets what one process does, which becomes `expected`.
void run_as_one_process(const RankProgram& program, std::vector<StepResult>& expected) {
  expected = expected_of(program);
  std::vector<std::vector<StepResult>> results;
  ASSERT_NO_THROW(results = run(program));
  for (const std::vector<StepResult>& rank : results) {
    ASSERT_EQ(difference(rank, expected), "");
  }
}

TEST(RandomRanks, EveryRankHasTheGradientsOfOneProcess) {
  int uneven = 0, sharded = 0, early = 0, branches = 0, tokens = 0, carried = 0, thawed = 0,
      compressed = 0;
  std::vector<int> by_ranks(5);
  for (int i = 1; i <= count_of_programs(); ++i) {
    const RankProgram program = draw_program(static_cast<std::uint64_t>(i));
    if (program.steps == 0) {
      continue;
    }
    SCOPED_TRACE(program.text());
    std::vector<StepResult> expected;
    ASSERT_NO_FATAL_FAILURE(run_as_one_process(program, expected));
    const Values full = full_batch(program);
    compressed += program.options.compress;
    for (std::size_t p = 0; p < full.size() && !program.options.compress; ++p) {
      for (std::size_t k = 0; k < full[p].size(); ++k) {
        ASSERT_NEAR(expected[0].gradients[p][k], full[p][k], 5e-5 + 1.3e-6 * std::abs(full[p][k]));
      }
    }
    ++by_ranks[static_cast<std::size_t>(program.ranks)];
    uneven += program.live(program.steps - 1) < program.ranks;
    sharded += program.options.shards > 0;
    early += program.early;
    tokens += program.options.mean == distributed::Mean::tokens;
    carried += !program.zero;
    thawed += program.thaw_step >= 0 && program.thaw_step < program.steps;
    for (const RankBlock& block : program.blocks) {
      for (const Use& use : block.uses) {
        branches += use.branch > 1;
      }
    }
  }
  // What is drawn is there.
  const int enough = count_of_programs() / 30;
  for (int ranks = 1; ranks <= 4; ++ranks) {
    EXPECT_GT(by_ranks[static_cast<std::size_t>(ranks)], 5 * enough) << ranks;
  }
  for (const int count : {uneven, sharded, early, tokens, carried, thawed, branches, compressed}) {
    EXPECT_GT(count, enough);
  }
}

// Each stage of sharding, with what the reducer has: branches by rank, other numbers of
// micro-batches, data that runs out, means by tokens, shards of the batch, early updates.
TEST(RandomRanks, ShardedRunsHaveTheBitsOfOneProcess) {
  std::vector<int> by_stage(4), uneven(4), sharded_batches(4), early(4), tokens(4);
  for (int i = 1; i <= count_of_programs(); ++i) {
    const int stage = 1 + i % 3;
    const RankProgram program = sharded(draw_program(static_cast<std::uint64_t>(i) + 20000), stage,
                                        i % 4 == 0 ? 1 + static_cast<std::size_t>(i) % 3 : 0);
    if (program.steps == 0) {
      continue;
    }
    SCOPED_TRACE(program.text());
    std::vector<StepResult> expected;
    ASSERT_NO_FATAL_FAILURE(run_as_one_process(program, expected));
    const auto s = static_cast<std::size_t>(stage);
    ++by_stage[s];
    uneven[s] += program.live(program.steps - 1) < program.ranks;
    sharded_batches[s] += program.options.shards > 0;
    early[s] += program.early;
    tokens[s] += program.options.mean == distributed::Mean::tokens;
  }
  for (std::size_t stage = 1; stage <= 3; ++stage) {
    for (const auto* counts : {&by_stage, &uneven, &sharded_batches, &early, &tokens}) {
      EXPECT_GE((*counts)[stage], count_of_programs() / 100);
    }
  }
}

// The same shards on other numbers of ranks: the same bits.
TEST(RandomRanks, ShardsGiveOneResultForEveryNumberOfRanks) {
  int compared = 0;
  for (const int shards : {4, 6, 8, 12}) {
    for (std::uint64_t seed = 5000; seed < 5000 + 6; ++seed) {
      RankProgram program = draw_program(seed);
      program.options.shards = shards;
      program.options.compress = false;
      program.zero = true;
      program.steps = 2;
      std::vector<StepResult> first;
      for (const int ranks : {1, 2, 3, 4}) {
        if (shards % ranks != 0) {
          continue;
        }
        program.ranks = ranks;
        program.micro_batches.assign(static_cast<std::size_t>(ranks),
                                     std::vector<int>(2, shards / ranks));
        const std::vector<std::vector<StepResult>> results = run(program);
        first = first.empty() ? results[0] : first;
        for (const std::vector<StepResult>& rank : results) {
          ASSERT_EQ(difference(rank, first), "") << program.text();
        }
        ++compared;
      }
    }
  }
  EXPECT_EQ(compared, 6 * (3 + 3 + 3 + 4));
}

}  // namespace
}  // namespace reprise::testing

// Sharded training is unsharded training, bit by bit, at every stage, and gathers nothing twice.
#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "distributed/local_world.h"
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

std::vector<ShardedResult> train_on(int size, const ShardedRun& run) {
  std::vector<ShardedResult> results(static_cast<std::size_t>(size));
  run_ranks(size, [&](Communicator& ranks) {
    results[static_cast<std::size_t>(ranks.rank())] = train(ranks, run);
  });
  return results;
}

void expect_every_stage_equal(int size, ShardedRun run) {
  run.stage = 0;
  const std::vector<ShardedResult> plain = train_on(size, run);
  EXPECT_NE(plain[0].losses.front(), plain[0].losses.back());
  for (int stage = 1; stage <= 3; ++stage) {
    run.stage = stage;
    const std::vector<ShardedResult> sharded = train_on(size, run);
    for (int r = 0; r < size; ++r) {
      const auto i = static_cast<std::size_t>(r);
      EXPECT_EQ(sharded[i].losses, plain[i].losses) << "stage " << stage << ", rank " << r;
      EXPECT_EQ(sharded[i].norms, plain[i].norms) << "stage " << stage << ", rank " << r;
      EXPECT_TRUE(sharded[i] == plain[i]) << "stage " << stage << ", rank " << r;
    }
  }
}

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

}  // namespace
}  // namespace reprise::testing

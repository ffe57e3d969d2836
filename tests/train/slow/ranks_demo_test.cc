// `reprise --ranks 2 demo`, as the script calls the program once everything is built.
#include <regex>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "tests/nn/files.h"
#include "tests/train/process.h"

namespace reprise::train {
namespace {

using testing::Folder;
using testing::Outcome;
using testing::run_program;

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++n;
  }
  return n;
}

TEST(RanksDemo, TwoRanksLearnAndTheirPoliciesAgree) {
  const Outcome outcome = run_program("--ranks 2 demo --seconds 10");
  ASSERT_EQ(outcome.code, 0) << outcome.text;
  testing::expect_demo_output(outcome.text, 10);
  // One of them prints.
  EXPECT_EQ(count(outcome.text, "2 ranks of "), 1) << outcome.text;
  EXPECT_EQ(count(outcome.text, "Validation loss after:"), 1);
  EXPECT_EQ(count(outcome.text, "The same step under each policy, 2 ranks x 4 x 128 tokens:"), 1);
  EXPECT_EQ(count(outcome.text, "All gradients are bitwise equal under every policy."), 1);
  std::set<std::string> digests;
  int rows = 0;
  const std::regex row("(keep-all|keep-products|inputs-only|nested) .* ([0-9a-f]{32})\n");
  for (std::sregex_iterator it(outcome.text.begin(), outcome.text.end(), row), none; it != none;
       ++it, ++rows) {
    digests.insert((*it)[2]);
  }
  EXPECT_EQ(rows, 4);
  EXPECT_EQ(digests.size(), 1u);
}

TEST(RanksDemo, TheGradientsOfAStepAreThoseOfEveryPolicy) {
  const Folder folder;
  for (const std::string policy : {"keep-all", "nested"}) {
    const Outcome outcome = run_program("--ranks 2 demo --quiet --policy " + policy +
                                        " --gradients-out " + folder.at(policy));
    ASSERT_EQ(outcome.code, 0) << outcome.text;
  }
  EXPECT_GT(std::filesystem::file_size(folder.at("nested")), std::uintmax_t{30} << 20);
  EXPECT_TRUE(testing::contents(folder.at("nested")) == testing::contents(folder.at("keep-all")));
}

// A batch cut into shards: the same bits on 1, 2 and 4 ranks.
TEST(RanksDemo, ShardsGiveTheSameGradientsOnEveryNumberOfRanks) {
  const Folder folder;
  for (const std::string ranks : {"1", "2", "4"}) {
    const Outcome outcome = run_program("--ranks " + ranks + " demo --quiet --shards 4 " +
                                        "--gradients-out " + folder.at(ranks));
    ASSERT_EQ(outcome.code, 0) << outcome.text;
  }
  EXPECT_TRUE(testing::contents(folder.at("1")) == testing::contents(folder.at("2")));
  EXPECT_TRUE(testing::contents(folder.at("1")) == testing::contents(folder.at("4")));
  const Outcome outcome = run_program("--ranks 2 demo --shards 3");
  EXPECT_NE(outcome.code, 0);
  EXPECT_NE(
      outcome.text.find("--shards must divide the batch of 8 and be a multiple of the 2 ranks, "
                        "got 3"),
      std::string::npos)
      << outcome.text;
}

// Sharding in stages: the gradients of the unsharded job.
TEST(RanksDemo, EveryStageOfShardingHasTheGradientsOfNone) {
  const Folder folder;
  for (const std::string stage : {"0", "2", "3"}) {
    const Outcome outcome = run_program("--ranks 2 demo --quiet --stage " + stage +
                                        " --gradients-out " + folder.at(stage));
    ASSERT_EQ(outcome.code, 0) << outcome.text;
  }
  for (const char* stage : {"2", "3"}) {
    EXPECT_TRUE(testing::contents(folder.at("0")) == testing::contents(folder.at(stage))) << stage;
  }
  const Outcome outcome = run_program("--ranks 2 demo --stage 2 --shards 4");
  EXPECT_NE(outcome.code, 0);
  EXPECT_NE(outcome.text.find("--shards and --stage are for one of them at a time"),
            std::string::npos)
      << outcome.text;
}

// Values that are cut: samples, validation and the table take all ranks.
TEST(RanksDemo, StageThreeLearnsAndItsPoliciesAgree) {
  const Outcome outcome = run_program("--ranks 2 demo --stage 3 --quiet --seconds 0.1");
  ASSERT_EQ(outcome.code, 0) << outcome.text;
  EXPECT_EQ(count(outcome.text, "2 ranks of "), 1) << outcome.text;
  EXPECT_EQ(count(outcome.text, "sharding stage 3"), 1);
  EXPECT_EQ(count(outcome.text, "Sampled text"), 2);
  EXPECT_EQ(count(outcome.text, "All gradients are bitwise equal under every policy."), 1);
}

TEST(RanksDemo, ALossThatIsNotFiniteEndsEveryRank) {
  const Outcome outcome = run_program("--ranks 2 demo --quiet --seconds 60 --learning-rate 1e60");
  EXPECT_EQ(outcome.code, 86) << outcome.text;  // the watchdog's: a rank failed
  EXPECT_NE(outcome.text.find("the loss is nan at step 2; first op with a non-finite output: "
                              "[embedding]"),
            std::string::npos)
      << outcome.text;
  EXPECT_EQ(count(outcome.text, "------"), 0) << outcome.text;  // no banner of the launcher
}

}  // namespace
}  // namespace reprise::train

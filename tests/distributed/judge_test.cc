// Rules of the watchdog, on a clock of the test's own.
#include "distributed/judge.h"

#include <string>

#include <gtest/gtest.h>

namespace reprise::distributed {
namespace {

using std::chrono::milliseconds;

// Three ranks; a limit of 6 s, a silence of 3 s.
class JudgeTest : public ::testing::Test {
 protected:
  JudgeTest() {
    judge.places = {"host a, pid 10", "host a, pid 11", "host b, pid 12"};
    for (int r = 0; r < 3; ++r) {
      states[r].rank = r;
      states[r].step = 4;
      states[r].phase = Phase::backward;
    }
  }

  // All but `silent` are heard twice a second, and compute unless they wait or are in `still`.
  void pass(double seconds, int silent = -1, int still = -1) {
    for (double t = 0; t < seconds; t += 0.5) {
      now += milliseconds(500);
      for (RankState& s : states) {
        if (s.rank != still && s.waiting == 0) {
          ++s.ticks;
        }
        if (s.rank != silent) {
          judge.hear(s, now);
        }
      }
      for (const std::string& warning : judge.warnings(now)) {
        warnings.push_back(warning);
      }
    }
  }

  void wait_in(int rank, std::uint64_t collective) {
    states[rank].waiting = 1;
    states[rank].launched = states[rank].joined = collective;
    states[rank].completed = collective - 1;
    std::string("all_reduce of 8 f32 (gradients, bucket 1)").copy(states[rank].what, 90);
    states[rank].bytes = 32;
  }

  std::string text() const {
    const auto verdict = judge.verdict(now);
    return verdict ? verdict->text : std::string();
  }
  std::vector<int> culprits() const { return judge.verdict(now)->culprits; }

  Clock::time_point now = Clock::time_point{} + std::chrono::hours(1);
  Judge judge{3, {milliseconds(6000), milliseconds(3000)}, now};
  RankState states[3];
  std::vector<std::string> warnings;
};

TEST_F(JudgeTest, NothingIsWrong) {
  pass(60);
  EXPECT_EQ(text(), "");
  EXPECT_TRUE(warnings.empty());
}

TEST_F(JudgeTest, AnEndWithoutGoodbye) {
  pass(1);
  judge.lose(1, now);
  EXPECT_EQ(text(), "rank 1 (host a, pid 11) ended without finishing, in backward of step 4");
  EXPECT_EQ(culprits(), std::vector<int>{1});
}

// Both limits are equal, and the counter stood still a little earlier than the beats.
TEST_F(JudgeTest, SilenceIsNotCalledStandstill) {
  judge = Judge(3, {milliseconds(3000), milliseconds(3000)}, now);
  pass(1);
  pass(0.5, -1, /*still=*/1);
  while (text().empty() && now < Clock::time_point{} + std::chrono::hours(2)) {
    pass(0.5, /*silent=*/1);
  }
  EXPECT_EQ(text(), "rank 1 does not answer for 3.5 s, last in backward of step 4");
}

TEST_F(JudgeTest, WhoMayWaitForACoreIsGivenTwiceTheTime) {
  char state = 'S';
  judge.process_state = [&](int) { return state; };
  pass(1);
  pass(5, /*silent=*/0);
  EXPECT_EQ(text(), "");
  EXPECT_FALSE(judge.verdict_on(0, now, milliseconds(0)));
  state = 'T';
  EXPECT_NE(text().find("does not answer for 5.0 s"), std::string::npos);
  EXPECT_TRUE(judge.verdict_on(0, now, milliseconds(0)));
  state = 'R';
  pass(1.5, /*silent=*/0);
  EXPECT_NE(text().find("does not answer for 6.5 s"), std::string::npos);
  EXPECT_TRUE(judge.verdict_on(0, now, milliseconds(0)));
}

TEST_F(JudgeTest, AnEndAfterGoodbyeIsNone) {
  pass(1);
  judge.leave(1);
  judge.lose(1, now);
  pass(20, 1);
  EXPECT_EQ(text(), "");
  EXPECT_FALSE(judge.all_left_but(0));
  judge.leave(2);
  EXPECT_TRUE(judge.all_left_but(0));
}

TEST_F(JudgeTest, Silence) {
  judge.process_state = [](int rank) { return rank == 2 ? 'T' : 'S'; };
  pass(3, 2);
  EXPECT_EQ(text(), "");
  pass(0.5, 2);
  EXPECT_EQ(text(),
            "rank 2 (host b, pid 12) does not answer for 3.5 s, last in start; its process is "
            "stopped (state T)");
  EXPECT_EQ(culprits(), std::vector<int>{2});
}

TEST_F(JudgeTest, SilenceOfTheJudgeItselfIsNotTheOthers) {
  pass(1);
  now += std::chrono::hours(2);
  judge.rest(now);
  EXPECT_EQ(text(), "");
  pass(30);
  EXPECT_EQ(text(), "");
}

TEST_F(JudgeTest, NoProgress) {
  wait_in(0, 7);
  wait_in(2, 7);
  states[1].joined = states[1].completed = 6;
  pass(6.5, -1, 1);
  EXPECT_EQ(text(), "");  // the first beat counted
  pass(0.5, -1, 1);
  EXPECT_EQ(text(),
            "rank 1 (host a, pid 11) makes no progress for 6.5 s in backward of step 4; its last "
            "collective is 6");
}

TEST_F(JudgeTest, SlowIsWarnedOfOncePerCollective) {
  pass(1);
  wait_in(0, 7);
  states[1].joined = states[1].completed = 6;
  wait_in(2, 7);
  pass(60);
  EXPECT_EQ(text(), "");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0],
            "rank 1 (host a, pid 11) is slow: rank 0 waits 2.5 s for it in collective 7 "
            "(all_reduce of 8 f32 (gradients, bucket 1), 32 bytes); it is in backward of step 4");
  wait_in(0, 8);
  wait_in(2, 8);
  states[1].joined = states[1].completed = 7;
  pass(60);
  EXPECT_EQ(warnings.size(), 2u);
}

TEST_F(JudgeTest, AllWaitInOneCollective) {
  for (int r = 0; r < 3; ++r) {
    wait_in(r, 7);
  }
  pass(6.5);
  EXPECT_EQ(text(), "");
  pass(0.5);
  EXPECT_EQ(text(),
            "collective 7 (all_reduce of 8 f32 (gradients, bucket 1), 32 bytes) does not complete "
            "within 6.0 s, though every rank has joined it");
}

TEST_F(JudgeTest, AMessageThatMovesIsNoStandstill) {
  for (int r = 0; r < 3; ++r) {
    wait_in(r, 7);
  }
  for (int i = 0; i < 20; ++i) {
    pass(3);
    ++states[1].transfers;
  }
  EXPECT_EQ(text(), "");
}

TEST_F(JudgeTest, AllWaitAndOneIsBehind) {
  wait_in(0, 7);
  wait_in(1, 6);
  wait_in(2, 7);
  pass(7);
  EXPECT_EQ(culprits(), std::vector<int>{1});
  EXPECT_NE(text().find("rank 1 (host a, pid 11) in collective 6 ("), std::string::npos) << text();
}

TEST_F(JudgeTest, AFailureThatIsKnown) {
  pass(1);
  judge.fail(2, Failure::own, "device lost", now);
  judge.lose(1, now);  // a consequence
  EXPECT_EQ(text(), "rank 2 (host b, pid 12) failed in backward of step 4: device lost");
  judge.fail(0, Failure::shared, "ranks disagree", now);
  EXPECT_EQ(text(), "ranks disagree");
  EXPECT_TRUE(culprits().empty());
}

TEST_F(JudgeTest, ASuspicionWaitsForABetterExplanation) {
  pass(1);
  judge.fail(2, Failure::suspected, "MPI_Test: error", now);
  EXPECT_EQ(text(), "");
  pass(1);
  EXPECT_EQ(text(), "");
  pass(1);
  EXPECT_EQ(text(), "rank 2 (host b, pid 12) reports: MPI_Test: error");
  judge.lose(1, now);
  EXPECT_EQ(culprits(), std::vector<int>{1});
}

TEST_F(JudgeTest, OfRankZeroByTheOthers) {
  pass(1);
  EXPECT_FALSE(judge.verdict_on(0, now, milliseconds(0)));
  pass(3.5, 0);
  EXPECT_EQ(judge.verdict_on(0, now, milliseconds(0))->culprits, std::vector<int>{0});
  EXPECT_FALSE(judge.verdict_on(0, now, milliseconds(1000)));
  judge.lose(0, now);
  EXPECT_EQ(judge.verdict_on(0, now, milliseconds(0))->text,
            "rank 0 (host a, pid 10) ended without finishing");
  judge.leave(0);
  EXPECT_FALSE(judge.verdict_on(0, now, milliseconds(0)));
}

TEST_F(JudgeTest, TheTableShowsEveryRank) {
  wait_in(0, 7);
  pass(1);
  judge.lose(2, now);
  EXPECT_EQ(judge.table(now, {2}),
            "  rank 0: backward of step 4, waits in collective 7 (all_reduce of 8 f32 (gradients, "
            "bucket 1), 32 bytes); 6 of 7 collectives complete; heard 0.0 s ago\n"
            "  rank 1: backward of step 4; 0 of 0 collectives complete; heard 0.0 s ago\n"
            "  rank 2: backward of step 4; 0 of 0 collectives complete; gone\n");
  const Judge many(100, {}, now);
  EXPECT_NE(many.table(now, {99}).find("  rank 99: "), std::string::npos);
  EXPECT_NE(many.table(now, {99}).find("  and 83 ranks more\n"), std::string::npos);
}

}  // namespace
}  // namespace reprise::distributed

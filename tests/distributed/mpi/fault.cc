// Jobs in which something goes wrong: each ends in time, with an exit code that is not 0 and a
// message that names what and who, and leaves no process behind.
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

namespace reprise::testing {
namespace {

using Clock = std::chrono::steady_clock;

struct Ended {
  std::string text;
  int code = -1;  // 128 + n for signal n
  double seconds = 0;
  std::vector<int> left;
};

std::vector<int> processes_with(const std::string& word) {
  std::vector<int> result;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    std::ifstream file(entry.path() / "cmdline");
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    if (text.find(word) != std::string::npos) {
      result.push_back(std::stoi(entry.path().filename().string()));
    }
  }
  return result;
}

// Runs a command with a mark at its end; after a line `signal_after`, sends it the signal.
Ended run(std::vector<std::string> words, const std::string& signal_after = {}, int signal = 0) {
  static int jobs = 0;
  const std::string mark = "job-" + std::to_string(getpid()) + "-" + std::to_string(++jobs);
  words.push_back(mark);
  std::array<int, 2> pipes{};
  if (pipe(pipes.data()) != 0) {
    return {};
  }
  const auto begin = Clock::now();
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(pipes[1], 1);
    dup2(pipes[1], 2);
    close(pipes[0]);
    close(pipes[1]);
    std::vector<char*> arguments;
    for (std::string& word : words) {
      arguments.push_back(word.data());
    }
    arguments.push_back(nullptr);
    execv(arguments[0], arguments.data());
    _exit(127);
  }
  close(pipes[1]);
  fcntl(pipes[0], F_SETFL, O_NONBLOCK);
  Ended ended;
  int status = 0;
  bool sent = false;
  while (true) {
    std::array<char, 4096> buffer{};
    for (ssize_t n = 0; (n = read(pipes[0], buffer.data(), buffer.size())) > 0;) {
      ended.text.append(buffer.data(), static_cast<std::size_t>(n));
    }
    if (waitpid(pid, &status, WNOHANG) == pid) {
      break;
    }
    if (!sent && signal != 0 && ended.text.find(signal_after) != std::string::npos) {
      sent = true;
      kill(pid, signal);
    }
    if (Clock::now() - begin > std::chrono::seconds(90)) {
      ended.text += "\n(the test's own limit)";
      kill(pid, SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  ended.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  ended.code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  const auto end = Clock::now() + std::chrono::milliseconds(signal == SIGKILL ? 3000 : 500);
  while (!(ended.left = processes_with(mark)).empty() && Clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  std::array<char, 4096> buffer{};
  for (ssize_t n = 0; (n = read(pipes[0], buffer.data(), buffer.size())) > 0;) {
    ended.text.append(buffer.data(), static_cast<std::size_t>(n));
  }
  close(pipes[0]);
  for (const int left : ended.left) {
    kill(left, SIGKILL);
  }
  return ended;
}

Ended job(int ranks, const std::string& fault, int culprit) {
  return run({REPRISE_MPIEXEC, "-n", std::to_string(ranks), REPRISE_FAULTY, fault,
              std::to_string(culprit)});
}

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++n;
  }
  return n;
}

TEST(Faults, NoneEndsWell) {
  const Ended ended = job(3, "none", 0);
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

struct Case {
  const char* fault;
  std::vector<std::string> three;  // any of these, with culprit 1 of 3
  std::vector<std::string> two;    // with culprit 1 of 2
};

void check(const Case& c) {
  for (const int ranks : {2, 3}) {
    const Ended ended = job(ranks, c.fault, 1);
    std::printf("%-18s %d ranks: exit code %d after %.1f s\n", c.fault, ranks, ended.code,
                ended.seconds);
    SCOPED_TRACE(std::string(c.fault) + " on " + std::to_string(ranks) + " ranks, " +
                 std::to_string(ended.seconds) + " s:\n" + ended.text);
    EXPECT_NE(ended.code, 0);
    EXPECT_LT(ended.seconds, 60);  // the limit is 3 s; starting takes its time on a busy machine
    EXPECT_TRUE(ended.left.empty());
    bool named = false;
    for (const std::string& message : ranks == 3 ? c.three : c.two) {
      named = named || ended.text.find(message) != std::string::npos;
    }
    EXPECT_TRUE(named);
    EXPECT_EQ(count(ended.text, "rank 2 failed") + count(ended.text, "rank 0 failed"), 0);
  }
}

TEST(Faults, AnotherParameterList) {
  check({"list",
         {"ranks disagree at making the reducer: number of parameters: rank 1 has 16, the other 2 "
          "have 15"},
         {"number of parameters: rank 0 has 15, rank 1 has 16"}});
}

TEST(Faults, AnotherShape) {
  check({"shape",
         {"parameter 15: rank 1 has last f32 [5], the other 2 have last f32 [4]"},
         {"parameter 15: rank 0 has last f32 [4], rank 1 has last f32 [5]"}});
}

TEST(Faults, AnotherSetting) {
  check({"setting",
         {"bucket bytes: rank 1 has 4096, the other 2 have 2048"},
         {"bucket bytes: rank 0 has 2048, rank 1 has 4096"}});
}

TEST(Faults, FrozenOnOneRankInTheMiddle) {
  check({"frozen",
         {"ranks disagree at step 2: parameter 4: rank 1 has block.0.bias f32 [96] frozen, the "
          "other 2 have block.0.bias f32 [96]"},
         {"rank 1 has block.0.bias f32 [96] frozen"}});
}

TEST(Faults, AStepSkipped) {
  check({"skip",
         {"step: rank 1 has 2, the other 2 have 3", "purpose: rank 1 has \"payload\""},
         {"rank 1 has \"payload\"", "step: rank 0 has 3, rank 1 has 2"}});
}

TEST(Faults, AnotherOrder) {
  check({"order",
         {"purpose: rank 1 has \"something else\", the other 2 have \"state before a step\""},
         {"purpose: rank 0 has \"state before a step\", rank 1 has \"something else\""}});
}

TEST(Faults, AnotherCount) {
  check({"count",
         {"count: rank 1 has 500000, the other 2 have 1000000"},
         {"count: rank 0 has 1000000, rank 1 has 500000"}});
}

TEST(Faults, AnotherDType) {
  check({"dtype", {"dtype: rank 1 has i32, the other 2 have f32"}, {"rank 1 has i32"}});
}

TEST(Faults, AnotherReduction) {
  check({"reduction", {"reduction: rank 1 has max, the other 2 have sum"}, {"rank 1 has max"}});
}

TEST(Faults, OneLeavesEarly) {
  check({"leave",
         {"purpose: rank 1 has \"end of the job\", the other 2 have \"payload\""},
         {"rank 1 has \"end of the job\""}});
}

TEST(Faults, Throwing) {
  const std::string lost = "exception in backward: device lost";
  check({"throw-in-backward", {"rank 1 ends: device lost", lost}, {"device lost"}});
  check({"throw-in-replay", {"rank 1 ends: device lost", lost}, {"device lost"}});
  check({"throw-outside",
         {"rank 1 ends: the data loader gave up"},
         {"rank 1 ends: the data loader gave up"}});
}

TEST(Faults, Silent) {
  for (const char* fault : {"silent", "stop"}) {
    check({fault, {"rank 1 did not join collective"}, {"rank 1 did not join collective"}});
  }
}

// The launcher sees these and may end the others before they can speak: its own words name the rank
// and how it ended.
TEST(Faults, Dead) {
  const std::string rank = "process rank 1 with PID";
  const std::string code = ",1]\n  Exit code:    3\n";
  check({"kill", {rank}, {rank}});
  check({"exit0", {rank}, {rank}});
  check({"exit3", {code}, {code}});
}

TEST(Supervise, StartsRanks) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "none", "0"});
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_EQ(count(ended.text, "rank 0 of 2"), 1) << ended.text;
  EXPECT_EQ(count(ended.text, "rank 1 of 2"), 1) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

TEST(Supervise, HandsOnTheExitCode) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "exit3", "1"});
  EXPECT_EQ(ended.code, 3) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

TEST(Supervise, SaysThatARankWasKilledAndNoMore) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "kill", "1"});
  EXPECT_EQ(ended.code, 128 + SIGKILL) << ended.text;
  EXPECT_EQ(count(ended.text, "reprise: a rank was ended by signal 9 (Killed)\n"), 1) << ended.text;
  EXPECT_EQ(count(ended.text, "------"), 0) << ended.text;
}

TEST(Supervise, SignalsEndEverything) {
  for (const int signal : {SIGINT, SIGTERM}) {
    for (const char* fault : {"silent", "stop"}) {
      const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", fault, "1"}, "rank 1 of 2", signal);
      EXPECT_EQ(ended.code, 128 + signal) << ended.text;
      EXPECT_LT(ended.seconds, 40);
      EXPECT_TRUE(ended.left.empty());
    }
  }
}

TEST(Supervise, KilledLeavesNothing) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "silent", "1"}, "rank 1 of 2", SIGKILL);
  EXPECT_EQ(ended.code, 128 + SIGKILL) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

TEST(Supervise, NestedIsAnError) {
  const Ended ended =
      run({REPRISE_MPIEXEC, "-n", "2", REPRISE_FAULTY, "--ranks", "2", "none", "0"});
  EXPECT_EQ(ended.code, 2) << ended.text;
  EXPECT_NE(ended.text.find("--ranks 2 inside a launch"), std::string::npos) << ended.text;
}

}  // namespace
}  // namespace reprise::testing

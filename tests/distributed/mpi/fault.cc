// Jobs in which something goes wrong: each ends in time, with an exit code that is not 0 and a
// message that names what and who, and leaves no process behind.
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "distributed/communicator.h"

namespace reprise::testing {
namespace {

using Clock = std::chrono::steady_clock;

struct Ended {
  std::string text;
  int code = -1;  // 128 + n for signal n
  double seconds = 0;
  std::vector<int> left;
  int pid = 0;
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

// Runs a command with a mark at its end; after a line `signal_after`, calls `before` with its pid
// and sends it the signal.
Ended run(std::vector<std::string> words, const std::string& signal_after = {}, int signal = 0,
          const std::function<void(int)>& before = {}) {
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
  ended.pid = pid;
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
      if (before) {
        before(pid);
      }
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
  const auto end = Clock::now() + std::chrono::milliseconds(signal == SIGKILL ? 8000 : 1000);
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

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++n;
  }
  return n;
}

TEST(Faults, NoneEndsWell) {
  const Ended ended = run({REPRISE_MPIEXEC, "-n", "3", REPRISE_FAULTY, "none", "0"});
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

bool mpich() {
  return distributed::mpi_library().find("MPICH") != std::string::npos;
}

// Ranks that a line of ours says something bad of.
std::vector<int> blamed(const std::string& text) {
  const std::string mark = "reprise: rank ";
  std::vector<int> result;
  for (std::size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + 1)) {
    result.push_back(std::stoi(text.substr(at + mark.size())));
  }
  return result;
}

struct Case {
  const char* fault;
  std::vector<std::string> words;  // any of these is said
  int culprit = 1;
  bool by_launcher = true;  // --ranks, else mpirun
};

// Of a job of --ranks, whatever mpirun makes of it.
int expected_code(const std::string& fault) {
  return fault.starts_with("kill@")                        ? 128 + SIGKILL
         : fault.starts_with("exit3@")                     ? 3
         : fault.starts_with("exit0@")                     ? 1
         : fault.ends_with("@start") || fault == "version" ? 1
                                                           : 86;
}

void check(int ranks, const Case& c) {
  std::vector<std::string> words{REPRISE_FAULTY, "--ranks", std::to_string(ranks)};
  if (!c.by_launcher) {
    words = {REPRISE_MPIEXEC, "-n", std::to_string(ranks), REPRISE_FAULTY};
  }
  words.insert(words.end(), {c.fault, std::to_string(c.culprit)});
  const Ended ended = run(words);
  std::printf("%-18s rank %d of %d: exit code %d after %.1f s\n", c.fault, c.culprit, ranks,
              ended.code, ended.seconds);
  SCOPED_TRACE(std::string(c.fault) + " in rank " + std::to_string(c.culprit) + " of " +
               std::to_string(ranks) + ", " + std::to_string(ended.seconds) + " s:\n" + ended.text);
  EXPECT_NE(ended.code, 0);
  if (c.by_launcher) {
    EXPECT_EQ(ended.code, expected_code(c.fault));
  }
  EXPECT_LT(ended.seconds, 33);  // the limit is 3 s
  EXPECT_TRUE(ended.left.empty());
  bool named = false;
  for (const std::string& message : c.words) {
    named = named || ended.text.find(message) != std::string::npos;
  }
  EXPECT_TRUE(named);
  for (const int rank : blamed(ended.text)) {
    EXPECT_EQ(rank, c.culprit);
  }
}

// On two ranks there is no majority: both values are named.
void check(const char* fault, const std::string& three, const std::string& two) {
  check(3, {fault, {three}, 1, false});
  check(2, {fault, {two}, 1, false});
}

TEST(Faults, AnotherParameterList) {
  check("list",
        "ranks disagree at making the reducer: number of parameters: rank 1 has 16, the other 2 "
        "have 15",
        "number of parameters: rank 0 has 15, rank 1 has 16");
}

TEST(Faults, AnotherShape) {
  check(3, {"shape", {"parameter 15: rank 1 has last f32 [5], the other 2 have last f32 [4]"}});
}

TEST(Faults, AnotherBucketSize) {
  check(3, {"setting", {"bucket bytes: rank 1 has 4096, the other 2 have 2048"}});
}

TEST(Faults, FrozenOnOneRankInTheMiddle) {
  check(3, {"frozen",
            {"ranks disagree at step 2: parameter 4: rank 1 has block.0.bias f32 [96] frozen, the "
             "other 2 have block.0.bias f32 [96]"}});
}

TEST(Faults, AnotherConfig) {
  check(3, {"config",
            {"ranks disagree at the start of the run: rank 1 has config width 128, the other 2 "
             "have config width 96"}});
}

TEST(Faults, AnotherSeed) {
  check("seed", "rank 1 has seed 8, the other 2 have seed 7",
        "rank 0 has seed 7, rank 1 has seed 8");
}

TEST(Faults, AnotherDataLength) {
  check(3,
        {"data", {"rank 1 has length of the data 999, the other 2 have length of the data 1000"}});
}

TEST(Faults, AnotherLibraryVersion) {
  check(3, {"version",
            {"ranks disagree at the start: library: rank 1 has version Reprise 9.9.9, the other 2 "
             "have version Reprise "}});
}

TEST(Faults, AStepSkipped) {
  check(3, {"skip", {"purpose: rank 1 has \"payload\", the other 2 have \"state before a step\""}});
}

TEST(Faults, AnotherOrder) {
  check("order", "purpose: rank 1 has \"something else\", the other 2 have \"state before a step\"",
        "purpose: rank 0 has \"state before a step\", rank 1 has \"something else\"");
}

TEST(Faults, AnotherCount) {
  check("count", "count: rank 1 has 500000, the other 2 have 1000000",
        "count: rank 0 has 1000000, rank 1 has 500000");
}

TEST(Faults, AnotherDType) {
  check(3, {"dtype", {"dtype: rank 1 has i32, the other 2 have f32"}});
}

TEST(Faults, AnotherReduction) {
  check(3, {"reduction", {"reduction: rank 1 has max, the other 2 have sum"}});
}

TEST(Faults, OneLeavesEarly) {
  check(3, {"leave", {"purpose: rank 1 has \"end of the job\", the other 2 have \"payload\""}});
}

TEST(Faults, Throwing) {
  auto failed = [](const char* where) {
    return std::string(" failed in ") + where + " of step 3: ";
  };
  check(3, {"throw@forward", {failed("forward") + "device lost"}});
  check(2, {"throw@backward", {failed("backward") + "exception in backward: device lost"}, 0});
  check(3, {"throw@replay", {failed("replay") + "exception in backward: device lost"}, 2});
  check(2, {"throw@optimizer", {failed("optimizer") + "device lost"}, 1, false});
  check(3, {"throw@save", {failed("saving") + "device lost"}, 0, false});
  check(3, {"throwfile", {failed("saving") + "the disk is full"}});
  check(2, {"status", {": the disk is full"}});
  // Without run_rank: the text comes from the process that catches it.
  check(2, {"throw-through", {"rank 1 ends: device lost"}});
}

TEST(Faults, Stopped) {
  const std::string text = "; its process is stopped (state T)";
  check(3, {"stop@forward", {text}});
  check(3, {"stop@backward", {text}, 0, false});  // rank 1 says it
  check(2, {"stop@end", {text}, 1});
}

// No rank is left that could judge: the processes beside them do.
TEST(Faults, AllStopped) {
  const Ended ended =
      run({REPRISE_FAULTY, "--ranks", "3", "--watchdog", "3", "allstop@forward", "1"});
  std::printf("allstop: exit code %d after %.1f s\n", ended.code, ended.seconds);
  EXPECT_EQ(ended.code, 128 + SIGKILL) << ended.text;
  EXPECT_LT(ended.seconds, 33);
  EXPECT_TRUE(ended.left.empty());
  EXPECT_NE(ended.text.find("is stopped (state T), and so is every rank that could end the job"),
            std::string::npos)
      << ended.text;
}

TEST(Faults, WithoutProgress) {
  check(2, {"loop@backward", {" s in backward of step 3; "}});
  check(3, {"silent@save", {" s in saving of step 3; "}, 0});
}

TEST(Faults, BeforeTheStart) {
  check(2, {"stop@start", {"MPI did not start within 8.0 s: rank 1"}});
  // MPICH's mpirun waits for the others then.
  check(2, {"exit3@start", {"rank 1 ended with exit code 3 before it connected"}});
}

// mpirun sees these as well, and may end the others before they can speak: then the launcher says
// it.
TEST(Faults, Dead) {
  const std::string text = " ended without finishing";
  for (int i = 0; i < 3; ++i) {
    check(3, {"kill@forward", {text}, i});
  }
  check(2, {"kill@backward", {text}});
  check(2, {"exit0@forward", {text}, 0});
  check(3, {"exit0@optimizer", {text}, 2});
  check(2, {"exit3@forward", {text}});
  check(2, {"exit3@end", {text}, 0});
  // MPICH's mpirun alone takes a rank that left with 0 for the end of the job: ours does not.
  check(3, {"exit0@end", {text}});
}

TEST(Faults, SlowIsOnlyAWarning) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "3", "slow@forward", "1"});
  SCOPED_TRACE(ended.text);
  EXPECT_EQ(ended.code, 0);
  EXPECT_GT(ended.seconds, 4.4);  // more than the limit
  // Others may be slow for a moment as well, where there are too few cores.
  EXPECT_EQ(count(ended.text, "; it is in forward of step 3\n"), 1);
  const std::size_t end = ended.text.find("; it is in forward of step 3\n");
  const std::string line = ended.text.substr(0, end).substr(ended.text.rfind('\n', end) + 1);
  EXPECT_TRUE(line.starts_with("reprise: warning: rank 1 (")) << line;
  EXPECT_NE(line.find(") is slow: rank "), std::string::npos) << line;
  EXPECT_TRUE(blamed(ended.text).empty());
  EXPECT_TRUE(ended.left.empty());
}

// NCCL's ranks, over a stand-in that notices nothing: the same watchdog.
TEST(NcclFaults, AreNamedAndEndTheJob) {
  struct Row {
    int ranks, culprit;
    const char *fault, *words;
  };
  for (const Row& row :
       {Row{3, 1, "kill", "reprise: rank 1 (host "}, Row{3, 0, "exit0", " ended without finishing"},
        Row{3, 1, "stop", "; its process is stopped (state T)"},
        Row{2, 0, "stop", "; its process is stopped (state T)"},
        Row{2, 1, "silent", " s in forward of step 3; its last collective is 2"},
        Row{3, 2, "throw", " failed in forward of step 3: device lost"},
        Row{3, 1, "count", "count: rank 1 has 50, the other 2 have 100"},
        Row{3, 1, "version", "library: rank 1 has version Reprise 9.9.9"}}) {
    const Ended ended = run(
        {REPRISE_NCCL_FAULTY, std::to_string(row.ranks), row.fault, std::to_string(row.culprit)});
    std::printf("nccl %-13s rank %d of %d: exit code %d after %.1f s\n", row.fault, row.culprit,
                row.ranks, ended.code, ended.seconds);
    SCOPED_TRACE(std::string(row.fault) + ":\n" + ended.text);
    EXPECT_EQ(ended.code, row.fault == std::string("version") ? 1 : 86);
    EXPECT_LT(ended.seconds, 33);
    EXPECT_TRUE(ended.left.empty());
    EXPECT_NE(ended.text.find(row.words), std::string::npos);
    for (const int rank : blamed(ended.text)) {
      EXPECT_EQ(rank, row.culprit);
    }
  }
  const Ended ended = run({REPRISE_NCCL_FAULTY, "3", "none", "0"});
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_EQ(ended.text, "");
}

// Longer than the limit, twice.
TEST(Faults, ASlowFileIsNoFault) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "slowfile", "1"});
  SCOPED_TRACE(ended.text);
  EXPECT_EQ(ended.code, 0);
  EXPECT_GT(ended.seconds, 8.8);
  EXPECT_NE(ended.text.find(") is slow: rank 0 waits "), std::string::npos);
  EXPECT_NE(ended.text.find("; it is in saving of step 3\n"), std::string::npos);
  EXPECT_TRUE(blamed(ended.text).empty());
}

TEST(Faults, TheProgramWithAnotherSeed) {
  const Ended ended = run({REPRISE_MPIEXEC, "-n", "1", REPRISE_PROGRAM, "demo", "--seed", "1",
                           "--text", REPRISE_TEXT, ":", "-n", "1", REPRISE_PROGRAM, "demo",
                           "--seed", "2", "--text", REPRISE_TEXT, "--gradients-out"});
  if (mpich()) {  // its mpirun may take the code of a rank that it ended itself
    EXPECT_NE(ended.code, 0) << ended.text;
  } else {
    EXPECT_EQ(ended.code, 86) << ended.text;
  }
  EXPECT_NE(ended.text.find("rank 0 has seed 1, rank 1 has seed 2"), std::string::npos)
      << ended.text;
}

TEST(Supervise, StartsRanks) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "none", "0"});
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_EQ(count(ended.text, "rank 0 of 2"), 1) << ended.text;
  EXPECT_EQ(count(ended.text, "rank 1 of 2"), 1) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

// Before there is a watchdog: later the first to end gives the code, the culprit or a witness.
TEST(Supervise, HandsOnTheExitCode) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "exit3@start", "1"});
  EXPECT_EQ(ended.code, 3) << ended.text;
  EXPECT_TRUE(ended.left.empty());
}

TEST(Supervise, SaysThatARankWasKilledAndNoMore) {
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "kill@start", "1"});
  EXPECT_EQ(ended.code, 128 + SIGKILL) << ended.text;
  EXPECT_EQ(count(ended.text, "reprise: rank 1 ended by signal 9 (Killed) before it connected\n"),
            1)
      << ended.text;
  EXPECT_EQ(count(ended.text, "------"), 0) << ended.text;
}

TEST(Supervise, SignalsEndEverything) {
  for (const int signal : {SIGINT, SIGTERM}) {
    for (const char* fault : {"silent@forward", "stop@forward"}) {
      const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", fault, "1"}, "rank 1 of 2", signal);
      EXPECT_EQ(ended.code, 128 + signal) << ended.text;
      EXPECT_LT(ended.seconds, 40);
      EXPECT_TRUE(ended.left.empty());
    }
  }
}

int run_folders_of(int pid) {
  int n = 0;
  for (const char* place : {"/dev/shm", "/tmp"}) {
    for (const auto& entry : std::filesystem::directory_iterator(place)) {
      const std::string name = entry.path().filename().string();
      n += name.starts_with("reprise-") &&
           name.find("-" + std::to_string(pid) + "-") != std::string::npos;
    }
  }
  return n;
}

TEST(Supervise, KilledLeavesNothing) {
  const Ended ended =
      run({REPRISE_FAULTY, "--ranks", "2", "silent@forward", "1"}, "rank 1 of 2", SIGKILL);
  EXPECT_EQ(ended.code, 128 + SIGKILL) << ended.text;
  EXPECT_TRUE(ended.left.empty());
  // But its folder, which the next one takes away, with its own.
  EXPECT_EQ(run_folders_of(ended.pid), 1);
  const Ended next = run({REPRISE_FAULTY, "--ranks", "2", "none", "0"});
  EXPECT_EQ(next.code, 0) << next.text;
  EXPECT_EQ(run_folders_of(ended.pid), 0);
  EXPECT_EQ(run_folders_of(next.pid), 0);
}

// Ranks end although mpirun, which is stopped, tells them nothing.
TEST(Supervise, RanksWhoseLauncherIsGoneEnd) {
  const auto stop_mpirun = [](int pid) {
    int stopped = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      std::ifstream file(entry.path() / "status");
      const std::string text((std::istreambuf_iterator<char>(file)), {});
      if (text.find("\nPPid:\t" + std::to_string(pid) + "\n") != std::string::npos) {
        kill(std::stoi(entry.path().filename().string()), SIGSTOP);
        ++stopped;
      }
    }
    EXPECT_EQ(stopped, 1);
  };
  const Ended ended = run({REPRISE_FAULTY, "--ranks", "2", "long@forward", "1"}, "rank 1 of 2",
                          SIGKILL, stop_mpirun);
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

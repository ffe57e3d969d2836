// Watchdogs of several ranks in one process, over real connections. What kills processes is tested
// with processes (mpi/fault.cc).
#include "distributed/watchdog.h"

#include <barrier>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "distributed/run_folder.h"

namespace reprise::distributed {
namespace {

using std::chrono::milliseconds;

// An all-gather between threads.
class Gathering {
 public:
  explicit Gathering(int size) : parts_(static_cast<std::size_t>(size)), here_(size) {}
  std::string operator()(int rank, std::string_view mine) {
    parts_[static_cast<std::size_t>(rank)] = mine;
    here_.arrive_and_wait();
    std::string all;
    for (const std::string& part : parts_) {
      all += part;
    }
    return all;
  }

 private:
  std::vector<std::string> parts_;
  std::barrier<> here_;
};

struct Rank {
  Progress progress;
  std::unique_ptr<Watchdog> dog;
  absl::Status status;
  std::promise<std::string> ended;
  std::future<std::string> end = ended.get_future();
};

struct World {
  explicit World(int size, milliseconds limit = milliseconds(20'000)) : ranks(size) {
    Gathering gathering(size);
    std::vector<std::thread> threads;
    for (int r = 0; r < size; ++r) {
      threads.emplace_back([&, r] {
        Rank& rank = ranks[static_cast<std::size_t>(r)];
        WatchdogOptions options;
        options.limits = {limit, std::min(limit, milliseconds(10'000))};
        options.version = "1";
        options.signals = options.reap_parent = false;
        options.progress = &rank.progress;
        options.end = [&rank](const std::string& why) { rank.ended.set_value(why); };
        auto dog = Watchdog::start(r, size, options,
                                   [&](std::string_view mine) { return gathering(r, mine); });
        rank.status = dog.status();
        if (dog.ok()) {
          rank.dog = *std::move(dog);
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  std::vector<Rank> ranks;
};

std::string verdict_of(Rank& rank) {
  return rank.end.wait_for(std::chrono::seconds(30)) == std::future_status::ready ? rank.end.get()
                                                                                  : "no verdict";
}

TEST(Watchdog, EndsWell) {
  for (const int size : {2, 3, 5}) {
    World world(size);
    std::vector<std::thread> threads;
    for (Rank& rank : world.ranks) {
      ASSERT_TRUE(rank.status.ok()) << rank.status;
      threads.emplace_back([&rank] {
        for (int i = 0; i < 100; ++i) {
          rank.dog->launched();
          rank.dog->join("barrier", 8);
          rank.dog->moved();
          rank.dog->complete();
        }
        rank.dog->goodbye();
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (Rank& rank : world.ranks) {
      EXPECT_EQ(rank.dog->verdict(), "");
    }
  }
}

TEST(Watchdog, ARankThatEndsIsNamedToAll) {
  for (const int culprit : {0, 1, 3}) {
    World world(4);
    world.ranks[static_cast<std::size_t>(culprit)].dog.reset();  // without goodbye
    for (int r = 0; r < 4; ++r) {
      if (r != culprit) {
        const std::string text = verdict_of(world.ranks[static_cast<std::size_t>(r)]);
        EXPECT_NE(text.find("rank " + std::to_string(culprit) + " (host "), std::string::npos)
            << text;
        EXPECT_NE(text.find("ended without finishing"), std::string::npos) << text;
      }
    }
  }
}

TEST(Watchdog, AFailureIsToldToAll) {
  World world(3);
  Rank& culprit = world.ranks[2];
  culprit.progress.enter(Phase::optimizer);
  culprit.progress.begin_step(5);
  culprit.dog->fail(Failure::own, "out of memory");
  for (Rank& rank : world.ranks) {
    const std::string text = verdict_of(rank);
    EXPECT_NE(text.find(") failed in optimizer of step 5: out of memory"), std::string::npos)
        << text;
  }
}

TEST(Watchdog, ARankWithoutProgressIsNamed) {
  World world(3, milliseconds(1500));
  for (const int r : {0, 2}) {
    Rank& rank = world.ranks[static_cast<std::size_t>(r)];
    rank.progress.begin_wait();
    rank.dog->join("all_reduce", 400);
  }
  for (Rank& rank : world.ranks) {
    const std::string text = verdict_of(rank);
    EXPECT_EQ(text.rfind("rank 1 (host ", 0), 0u) << text;
    EXPECT_NE(text.find("makes no progress for 1."), std::string::npos) << text;
  }
}

TEST(Watchdog, OtherVersionsAreRefused) {
  constexpr int kSize = 3;
  Gathering gathering(kSize);
  std::vector<std::thread> threads;
  std::vector<absl::Status> statuses(kSize);
  for (int r = 0; r < kSize; ++r) {
    threads.emplace_back([&, r] {
      WatchdogOptions options;
      options.signals = options.reap_parent = false;
      options.version = r == 2 ? "2" : "1";
      statuses[static_cast<std::size_t>(r)] =
          Watchdog::start(r, kSize, options, [&](std::string_view mine) {
            return gathering(r, mine);
          }).status();
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.message(),
              "[watchdog] ranks disagree at the start: library: rank 2 has version 2, the other 2 "
              "have version 1");
  }
}

// Somebody who finds the port gets nothing, and does not disturb.
TEST(ControlPlane, StrangersAreTurnedAway) {
  auto chief = ControlPlane::open(0, 2), other = ControlPlane::open(1, 2);
  ASSERT_TRUE(chief.ok() && other.ok());
  const int stranger = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>((*chief)->card().port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(connect(stranger, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  Message hello;
  hello.kind = Message::Kind::hello;
  hello.token = (*chief)->card().token + 1;
  hello.state.rank = 1;
  ASSERT_EQ(write(stranger, &hello, sizeof hello), static_cast<ssize_t>(sizeof hello));
  const std::vector<Card> cards{(*chief)->card(), (*other)->card()};
  const auto deadline = Clock::now() + std::chrono::seconds(20);
  absl::Status one;
  std::thread thread([&] { one = (*other)->connect(cards, deadline); });
  const absl::Status two = (*chief)->connect(cards, deadline);
  thread.join();
  EXPECT_TRUE(one.ok()) << one;
  EXPECT_TRUE(two.ok()) << two;
  char byte = 0;
  EXPECT_LE(read(stranger, &byte, 1), 0);
  close(stranger);
  Message beat;
  beat.state.ticks = 77;
  (*other)->send(beat);
  std::vector<ControlPlane::Event> events;
  while (events.empty() && Clock::now() < deadline) {
    events = (*chief)->receive(milliseconds(100), {});
  }
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].rank, 1);
  EXPECT_EQ(events[0].message.state.ticks, 77u);
}

TEST(ControlPlane, SaysWhoIsMissing) {
  auto chief = ControlPlane::open(0, 3), last = ControlPlane::open(2, 3);
  ASSERT_TRUE(chief.ok() && last.ok());
  std::vector<Card> cards(3);
  cards[0] = (*chief)->card();
  cards[1] = cards[0];
  cards[1].port = 1;  // nobody listens
  const auto deadline = Clock::now() + milliseconds(300);
  EXPECT_NE((*chief)->connect(cards, deadline).message().find("was not reached by rank 1 on "),
            std::string_view::npos);
  EXPECT_NE((*last)->connect(cards, deadline).message().find("rank 2 cannot reach rank 1 on "),
            std::string_view::npos);
}

class RunFolderTest : public ::testing::Test {
 protected:
  RunFolderTest() {
    EXPECT_NE(mkdtemp(folder.data()), nullptr);
    zero = RunFile::open(folder, 0, "host a, pid 1");
    one = RunFile::open(folder, 1, "host a, pid 2");
  }
  ~RunFolderTest() override { std::filesystem::remove_all(folder); }
  static int exited(int code) { return code << 8; }

  std::string folder = ::testing::TempDir() + "reprise-run-XXXXXX";
  std::unique_ptr<RunFile> zero, one;
};

TEST_F(RunFolderTest, SaysWhoDidNotFinish) {
  EXPECT_EQ(explain_run(folder + "/absent", 2).text, "rank 0, 1 ended before it connected");
  EXPECT_EQ(RunFile::open(folder + "/absent", 0, ""), nullptr);
  ASSERT_TRUE(zero && one);
  EXPECT_EQ(explain_run(folder, 2).text, "rank 0, 1 ended while MPI started");
  zero->write(RunFile::End::signalled);
  one->write(RunFile::End::running);
  RankState state;
  state.step = 3;
  state.phase = Phase::optimizer;
  one->write(state);
  EXPECT_EQ(explain_run(folder, 2).text,
            "rank 1 (host a, pid 2) ended without finishing, last in optimizer of step 3, 0 of 0 "
            "collectives complete");
  EXPECT_FALSE(explain_run(folder, 2).code);
  zero->write(RunFile::End::told);
  EXPECT_EQ(explain_run(folder, 2).text, "");
  EXPECT_EQ(explain_run(folder, 2).code, kEndedByWatchdog);
  std::ofstream(folder + "/rank.1") << "short";
  EXPECT_EQ(explain_run(folder, 2).text, "");
}

// The launcher has killed rank 0 because rank 1 was gone.
TEST_F(RunFolderTest, TheFirstToEndIsToBlame) {
  zero->write(RunFile::End::running);
  one->write(RunFile::End::running);
  write_end(folder, {1, 2, exited(3), 0, 0});
  write_end(folder, {0, 1, SIGKILL, 0, 0});
  EXPECT_EQ(explain_run(folder, 2).text,
            "rank 1 (host a, pid 2) ended without finishing, with exit code 3, last in start of "
            "step 0, 0 of 0 collectives complete");
  EXPECT_EQ(explain_run(folder, 2).code, 3);
  // The other way round, rank 0 after a signal of the launcher's: still rank 1.
  write_end(folder, {0, 1, SIGTERM, 1, 0});
  write_end(folder, {1, 2, exited(0), 0, 0});
  EXPECT_EQ(explain_run(folder, 2).code, 1);
  EXPECT_FALSE(explain_run(folder, 2).finished);
}

// The others have named it; how it ended only its parent knows.
TEST_F(RunFolderTest, AVerdictIsNotSaidAgain) {
  one->write(RunFile::End::running);
  zero->write(RunFile::End::told);
  write_end(folder, {0, 1, exited(kEndedByWatchdog), 0, 0});
  write_end(folder, {1, 2, SIGSEGV, 0, 0});
  EXPECT_EQ(explain_run(folder, 2).text,
            "rank 1 (host a, pid 2) ended by signal 11 (Segmentation fault)");
  EXPECT_EQ(explain_run(folder, 2).code, 128 + SIGSEGV);
  mark_killed(folder, 1);  // it was stopped, and rank 0 ended it after the verdict
  EXPECT_EQ(explain_run(folder, 2).text, "");
  EXPECT_EQ(explain_run(folder, 2).code, kEndedByWatchdog);
}

TEST_F(RunFolderTest, WhatARankSaidLast) {
  zero->write(RunFile::End::running);
  one->write(RunFile::End::failed, "the disk is full");
  write_end(folder, {1, 2, exited(kEndedByWatchdog), 0, 0});
  write_end(folder, {0, 1, SIGKILL, 1, 0});
  EXPECT_EQ(explain_run(folder, 2).text,
            "rank 1 (host a, pid 2) failed in start of step 0: the disk is full");
  EXPECT_EQ(explain_run(folder, 2).code, kEndedByWatchdog);
}

TEST_F(RunFolderTest, AllFinished) {
  for (RunFile* file : {zero.get(), one.get()}) {
    file->write(RunFile::End::finished);
  }
  EXPECT_TRUE(explain_run(folder, 2).finished);
  write_end(folder, {0, 1, exited(0), 0, 0});
  EXPECT_TRUE(explain_run(folder, 2).finished);
  write_end(folder, {1, 2, exited(1), 0, 0});
  EXPECT_FALSE(explain_run(folder, 2).finished);
  EXPECT_EQ(explain_run(folder, 2).code, 1);
}

TEST_F(RunFolderTest, ThoseOfDeadLaunchersAreSwept) {
  std::string path;
  {
    const RunFolder mine;
    path = mine.path();
    const std::string name = path.substr(path.rfind('/') + 1);
    const std::string space = name.substr(0, name.find('-', 8));  // "reprise-4026531836"
    const std::string self = space + "-" + std::to_string(getpid()) + "-";
    for (const std::string& entry :
         {name, self + "1-abcdef", space + "-999999999-5-abcdef", std::string("reprise-abcdef"),
          std::string("reprise-1-999999999-5-abcdef"), std::string("others")}) {
      std::filesystem::create_directory(folder + "/" + entry);
    }
    std::ofstream(folder + "/" + self + "1-abcdef/rank.0") << "x";
    std::filesystem::create_symlink("/tmp", folder + "/" + space + "-999999999-6-abcdef");
    // Of this pid with another start, and of a pid that is not there; not of another space of pids,
    // not what has another form, not a link.
    EXPECT_EQ(sweep_run_folders(folder), 2);
    EXPECT_TRUE(std::filesystem::exists(folder + "/" + name));
    EXPECT_TRUE(std::filesystem::exists(folder + "/reprise-abcdef"));
    EXPECT_FALSE(std::filesystem::exists(folder + "/" + self + "1-abcdef"));
    EXPECT_EQ(sweep_run_folders(folder), 0);
    EXPECT_TRUE(std::filesystem::exists(path));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

}  // namespace
}  // namespace reprise::distributed

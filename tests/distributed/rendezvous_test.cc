#include "distributed/rendezvous.h"

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <unistd.h>

namespace reprise::distributed {
namespace {

using Bytes = std::array<std::byte, 16>;

class Rendezvous : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              ("rendezvous-" + std::to_string(getpid()) + "-" +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  static Bytes bytes_of(int value) {
    Bytes bytes;
    bytes.fill(static_cast<std::byte>(value));
    return bytes;
  }

  absl::Status meet(int rank, int size, Bytes& bytes, int limit_ms = 20'000) const {
    return rendezvous({folder_.string(), rank, size, std::chrono::milliseconds(limit_ms)}, bytes);
  }

  // Ranks come in this order, with a pause in between; all get rank 0's bytes.
  void expect_meeting(const std::vector<int>& order, int value) const {
    std::vector<std::thread> threads;
    std::vector<Bytes> bytes(order.size());
    std::vector<absl::Status> results(order.size());
    for (const int rank : order) {
      const auto at = static_cast<std::size_t>(rank);
      bytes[at] = bytes_of(rank == 0 ? value : 99);
      threads.emplace_back(
          [&, rank, at] { results[at] = meet(rank, static_cast<int>(order.size()), bytes[at]); });
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (std::size_t rank = 0; rank < order.size(); ++rank) {
      EXPECT_TRUE(results[rank].ok()) << results[rank];
      EXPECT_EQ(bytes[rank], bytes_of(value)) << "rank " << rank;
    }
    EXPECT_TRUE(std::filesystem::is_empty(folder_));
  }

  void put(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  std::string get(const std::string& name) const {
    std::ifstream file(folder_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  void wait_for(const std::string& name) const {
    while (get(name).empty()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  std::filesystem::path folder_;
};

TEST_F(Rendezvous, InAnyOrderAndAgain) {
  expect_meeting({0}, 5);
  expect_meeting({0, 1, 2}, 6);
  expect_meeting({2, 0, 1}, 7);
  expect_meeting({1, 2, 0}, 8);
}

// A job that ended in the middle leaves files of every kind.
TEST_F(Rendezvous, WhatAnEarlierJobLeftIsNotTaken) {
  Bytes mine = bytes_of(1), theirs{};
  std::thread late([&] { EXPECT_TRUE(meet(1, 2, theirs).ok()); });
  wait_for("join.1");
  const std::string join = get("join.1");
  std::string answer;
  std::thread first([&] { EXPECT_TRUE(meet(0, 2, mine).ok()); });
  late.join();
  first.join();
  put("join.1", join);
  put("join.2", "torn");
  // An answer to that file, of an identifier that nobody listens to any more.
  answer = std::string(join.substr(0, 8)) + std::string(8, '\0') + join.substr(8, 8) +
           std::string(16, '\7');
  put("answer", answer);
  std::thread rank0([&] {
    mine = bytes_of(4);
    EXPECT_TRUE(meet(0, 2, mine).ok());
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // it answers the old file
  EXPECT_TRUE(meet(1, 2, theirs).ok());
  rank0.join();
  EXPECT_EQ(theirs, bytes_of(4));
}

TEST_F(Rendezvous, NamesWhoIsMissing) {
  Bytes a{}, b{};
  absl::Status early;
  std::thread other([&] { early = meet(1, 4, b, 800); });
  wait_for("join.1");
  const absl::Status status = meet(0, 4, a, 200);
  other.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_NE(status.message().find("rank 2, 3 did not come to the rendezvous of 4 ranks within 0.2 "
                                  "s of rank 0"),
            std::string::npos)
      << status;
  EXPECT_NE(early.message().find("rank 0 did not come"), std::string::npos) << early;
}

TEST_F(Rendezvous, NamesWhoWasStartedWithAnotherSize) {
  Bytes a{}, b{};
  std::thread other([&] { EXPECT_FALSE(meet(1, 3, b, 800).ok()); });
  wait_for("join.1");
  const absl::Status status = meet(0, 2, a, 200);
  other.join();
  EXPECT_NE(status.message().find("rank 1 (it was started as one of 3 ranks) did not come"),
            std::string::npos)
      << status;
}

TEST_F(Rendezvous, AFolderThatCannotBe) {
  std::ofstream(folder_) << "a file";
  Bytes a{};
  const absl::Status status = meet(0, 2, a, 100);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find(folder_.string()), std::string::npos);
}

TEST_F(Rendezvous, OfAllHandsEverybodysBytesToEverybody) {
  for (int round = 0; round < 3; ++round) {
    std::vector<std::thread> threads;
    std::vector<std::string> all(4);
    std::vector<absl::Status> results(4);
    for (const int rank : {2, 0, 3, 1}) {
      const auto at = static_cast<std::size_t>(rank);
      threads.emplace_back([&, rank, at] {
        results[at] =
            rendezvous_of_all({folder_.string(), rank, 4, std::chrono::milliseconds(20'000)},
                              std::string(5, static_cast<char>('a' + rank)), all[at]);
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (std::size_t rank = 0; rank < 4; ++rank) {
      EXPECT_TRUE(results[rank].ok()) << results[rank];
      EXPECT_EQ(all[rank], "aaaaabbbbbcccccddddd") << rank;
    }
    EXPECT_TRUE(std::filesystem::is_empty(folder_));
  }
  std::string alone;
  EXPECT_TRUE(
      rendezvous_of_all({folder_.string(), 0, 1, std::chrono::milliseconds(1)}, "x", alone).ok());
  EXPECT_EQ(alone, "x");
}

}  // namespace
}  // namespace reprise::distributed

// The shim finds what is planted, whatever the order of threads and blocks, and nothing else.
#include "tests/simt/simt.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "tests/simt/faults.h"

namespace simt {
namespace {

// A tensor at an odd place, with nothing around it that kernels may touch.
class Buffer {
 public:
  Buffer(std::string name, bool defined) : memory_(kElements + 64) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    begin_ = memory_.data() + (64 - address % 64) / sizeof(float) + 16;
    std::iota(begin_, begin_ + kElements, 0.0f);
    add_memory(begin_, kElements * sizeof(float), std::move(name), defined);
  }
  ~Buffer() { remove_memory(begin_); }
  Buffer(const Buffer&) = delete;
  float* begin() const { return begin_; }

 private:
  std::vector<float> memory_;
  float* begin_;
};

std::string run_planted(const Planted& planted, std::vector<float>* values = nullptr) {
  const Buffer in("in", true), out("out", planted.name != std::string("tensor_unwritten"));
  std::fill_n(out.begin(), kElements, 0.0f);
  try {
    planted.start(out.begin(), in.begin());
  } catch (const Fault& fault) {
    return fault.kind + "\n" + fault.what();
  }
  if (values != nullptr) {
    values->assign(out.begin(), out.begin() + kElements);
  }
  return "";
}

const Planted& named(const std::string& name) {
  static const std::vector<Planted> all = planted_faults();
  return *std::ranges::find(all, name, &Planted::name);
}

class PlantedFaults : public ::testing::TestWithParam<Planted> {
 protected:
  void TearDown() override { options() = {}; }
};

TEST_P(PlantedFaults, AreFoundInEveryOrder) {
  const std::string expected = GetParam().kind;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    for (unsigned seed = 1; seed <= (order == Order::shuffled ? 3u : 1u); ++seed) {
      options().order = order;
      options().seed = seed;
      const std::string found = run_planted(GetParam());
      EXPECT_EQ(found.substr(0, found.find('\n')), expected) << found;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, PlantedFaults, ::testing::ValuesIn(planted_faults()),
                         [](const ::testing::TestParamInfo<Planted>& row) {
                           return std::string(row.param.name) + "_" + std::to_string(row.index);
                         });

TEST(Correct, KernelsGiveTheSameValuesInEveryOrder) {
  for (const Planted& planted : planted_faults()) {
    if (*planted.kind != '\0') {
      continue;
    }
    std::vector<float> first, other;
    EXPECT_EQ(run_planted(planted, &first), "");
    for (const Order order : {Order::descending, Order::shuffled}) {
      options().order = order;
      EXPECT_EQ(run_planted(planted, &other), "");
      EXPECT_EQ(first, other) << planted.name;  // sums of small whole numbers: exact in any order
    }
    options() = {};
  }
}

TEST(Correct, VotesAndShufflesGiveWhatCudaGives) {
  std::vector<float> right;
  ASSERT_EQ(run_planted(named("votes"), &right), "");
  EXPECT_EQ(std::count(right.begin(), right.begin() + 64, 1.0f), 64);
}

TEST(Correct, BlockSumAddsAllThreads) {
  std::vector<float> sums;
  ASSERT_EQ(run_planted(named("sum_of_a_block"), &sums), "");
  // in[i] = i: the sum over 64 threads of in[t], in[t + 1] and in[t + 2].
  EXPECT_EQ(std::count(sums.begin(), sums.end(), 3 * (63 * 64 / 2) + 64.0f * (0 + 1 + 2)),
            kElements);
}

// 2^31 + 64 elements: addresses, of which the corners' blocks make a few real.
TEST(Corners, FindAnIndexThatIsTooNarrow) {
  constexpr std::size_t kBlocks = (std::size_t{1} << 25) + 1, kBytes = kBlocks * 64 * sizeof(float);
  void* const out = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(out, MAP_FAILED);
  const Buffer in("in", true);
  options().corners = true;
  add_memory(out, kBytes, "out", false);
  auto* const elements = static_cast<float*>(out);
  EXPECT_NO_THROW(start_wide(elements, in.begin(), kBlocks - 1));
  EXPECT_EQ(elements[64 * (kBlocks - 1) - 1], 63);  // the last block of that grid has run,
  EXPECT_EQ(elements[64], 0);                       // the second one has not
  try {
    start_wide(elements, in.begin(), kBlocks);
    ADD_FAILURE() << "nothing was found";
  } catch (const Fault& fault) {
    EXPECT_EQ(fault.kind, "out of bounds") << fault.what();
  }
  remove_memory(out);
  options() = {};
  munmap(out, kBytes);
}

TEST(Memory, WhatALibraryIsGivenLiesInOneTensor) {
  const Buffer in("in", true);
  EXPECT_NO_THROW(expect_memory(in.begin(), kElements * sizeof(float), "A"));
  EXPECT_THROW(expect_memory(in.begin() + 1, kElements * sizeof(float), "A"), Fault);
}

TEST(Reports, NameBothSidesOfARace) {
  const std::string text = run_planted(named("no_barrier_after_write"));
  EXPECT_NE(text.find("[planted] race: block (0,0,0) thread ("), std::string::npos) << text;
  EXPECT_NE(text.find("4 bytes at shared s+"), std::string::npos) << text;
  const auto first = text.find("tests/simt/faults.cu:");
  EXPECT_NE(first, std::string::npos) << text;
  EXPECT_NE(text.find("tests/simt/faults.cu:", first + 1), std::string::npos) << text;
}

TEST(Reports, NameTheTensorAndItsSize) {
  const std::string text = run_planted(named("one_past_the_tensor"));
  EXPECT_NE(text.find("reads 4 bytes at in+1024 (it has 1024 bytes) at tests/simt/faults.cu:"),
            std::string::npos)
      << text;
}

TEST(Reports, SayWhoWaitsWhere) {
  const std::string text = run_planted(named("return_before_a_barrier"));
  EXPECT_NE(text.find("50 threads wait at the barrier tests/simt/faults.cu:"), std::string::npos)
      << text;
  EXPECT_NE(text.find("14 threads have returned"), std::string::npos) << text;
}

TEST(Unchecked, RunsDoNotLook) {
  options().check = false;
  EXPECT_EQ(run_planted(named("written_by_two_blocks")), "");
  options() = {};
}

TEST(Memory, IsGoneOnceItIsRemoved) {
  std::vector<float> gone(64 + kElements);
  add_memory(gone.data(), kElements * sizeof(float), "gone", true);
  remove_memory(gone.data());
  const Buffer out("out", false);
  try {
    named("written_by_two_blocks").start(out.begin(), gone.data());
    ADD_FAILURE() << "no fault";
  } catch (const Fault& fault) {
    EXPECT_EQ(fault.kind, "out of bounds");
  }
}

}  // namespace
}  // namespace simt

#include "distributed/local_world.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "distributed/rank_tree.h"

namespace reprise::distributed {
namespace {

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

std::vector<float> values_of(int rank, std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = 0.1f * static_cast<float>(rank + 1) * static_cast<float>(i % 17) - 0.3f;
  }
  return values;
}

TEST(LocalWorld, SumsByTheTreeOverRanks) {
  for (const int size : {1, 2, 3, 4, 5}) {
    const std::size_t count = 3000;
    std::vector<std::vector<float>> in;
    std::vector<const void*> parts;
    for (int r = 0; r < size; ++r) {
      in.push_back(values_of(r, count));
    }
    for (const auto& part : in) {
      parts.push_back(part.data());
    }
    std::vector<float> expected(count);
    reduce_tree(parts, expected.data(), 3000, DType::f32, Reduce::sum);
    std::atomic<int> ran = 0;
    run_ranks(size, [&](Communicator& ranks) {
      EXPECT_EQ(ranks.size(), size);
      EXPECT_EQ(threads(), 1);
      const Tensor x = Tensor::from(in[static_cast<std::size_t>(ranks.rank())], {3000});
      ranks.all_reduce(x, Reduce::sum, {"x"}).wait();
      EXPECT_EQ(x.to_vector<float>(), expected);
      ran += 1 << ranks.rank();
    });
    EXPECT_EQ(ran, (1 << size) - 1);
  }
}

TEST(LocalWorld, MovesParts) {
  run_ranks(3, [](Communicator& ranks) {
    const int me = ranks.rank();
    const Tensor all = Tensor::zeros({6}, DType::i32);
    const Tensor mine = all.slice(0, 2 * me, 2 * me + 2);  // its own place in the result
    mine.data<std::int32_t>()[0] = me;
    mine.data<std::int32_t>()[1] = 10 * me;
    ranks.all_gather(mine, all, {"gather"}).wait();
    EXPECT_EQ(all.to_vector<std::int32_t>(), (std::vector<std::int32_t>{0, 0, 1, 10, 2, 20}));
    const Tensor part = all.slice(0, 0, 2);  // overlaps what the others read
    ranks.reduce_scatter(all, part, Reduce::sum, {"scatter"}).wait();
    EXPECT_EQ(part.to_vector<std::int32_t>(), (std::vector<std::int32_t>{3 * me, 30 * me}));
    const Tensor words = Tensor::from(std::vector<std::int64_t>{std::int64_t{1} << me}, {1});
    ranks.agree(words, {"bits"}).wait();
    EXPECT_EQ(words.item<std::int64_t>(), 7);
    const Tensor root = Tensor::full({2}, DType::f32, me);
    ranks.broadcast(root, 2, {"root"}).wait();
    EXPECT_EQ(root.to_vector<float>(), (std::vector<float>{2, 2}));
    EXPECT_EQ(all_reduce_value(ranks, me, Reduce::max, "largest"), 2);
    const Tensor none = Tensor::zeros({0}, DType::f32);
    ranks.all_reduce(none, Reduce::sum, {"nothing"}).wait();
    ranks.all_gather(none, none, {"nothing"}).wait();
  });
}

// The caller goes on while collectives are under way: rank 1 joins only once rank 0 has gone on.
TEST(LocalWorld, IsAsynchronous) {
  std::atomic<bool> went_on = false;
  run_ranks(2, [&](Communicator& ranks) {
    const Tensor x = Tensor::full({1}, DType::f32, 1);
    while (ranks.rank() == 1 && !went_on) {
      std::this_thread::yield();
    }
    const Pending sum = ranks.all_reduce(x, Reduce::sum, {"x"});
    if (ranks.rank() == 0) {
      EXPECT_FALSE(sum.done());
      went_on = true;
    }
    sum.wait();
    EXPECT_EQ(x.item<float>(), 2);
  });
}

TEST(LocalWorld, WhatDiffersBetweenRanksIsNamed) {
  auto two = [](auto&& body) { return error_of([&] { run_ranks(3, body); }); };
  EXPECT_EQ(two([](Communicator& ranks) {
              const Tensor x = Tensor::zeros({ranks.rank() == 1 ? 4 : 5}, DType::f32);
              ranks.all_reduce(x, Reduce::sum, {"x"}).wait();
            }),
            "[communicator] ranks disagree at collective 1: count: rank 1 has 4, the other 2 have "
            "5");
  EXPECT_EQ(two([](Communicator& ranks) {
              ranks.barrier({"a"}).wait();
              ranks.barrier({ranks.rank() == 2 ? "b" : "c"}).wait();
            }),
            "[communicator] ranks disagree at collective 2: purpose: rank 2 has \"b\", the other 2 "
            "have \"c\"");
  EXPECT_EQ(two([](Communicator& ranks) {
              const Tensor x = Tensor::zeros({4}, ranks.rank() == 0 ? DType::bf16 : DType::f32);
              ranks.all_reduce(x, Reduce::sum, {"x"}).wait();
            }),
            "[communicator] ranks disagree at collective 1: dtype: rank 0 has bf16, the other 2 "
            "have f32");
}

TEST(LocalWorld, OneThatThrowsEndsTheOthers) {
  std::atomic<int> told = 0;
  EXPECT_EQ(error_of([&] {
              run_ranks(4, [&](Communicator& ranks) {
                if (ranks.rank() == 2) {
                  fail("forward", "the disk is full");
                }
                try {
                  ranks.barrier({"step"}).wait();
                } catch (const CommunicatorError& e) {
                  EXPECT_STREQ(e.what(),
                               "[communicator] rank 2 failed: [forward] the disk is full");
                  ++told;
                  throw;
                }
              });
            }),
            "[forward] the disk is full");
  EXPECT_EQ(told, 3);
}

TEST(LocalWorld, NothingWaitsForEver) {
  const std::string error = error_of([&] {
    run_ranks(2,
              [&](Communicator& ranks) {
                if (ranks.rank() == 0) {
                  ranks.barrier({"step"}).wait();
                } else {
                  std::this_thread::sleep_for(std::chrono::milliseconds(300));
                }
              },
              {.limit = std::chrono::milliseconds(50)});
  });
  EXPECT_EQ(error,
            "[communicator] rank 1 did not join collective 1 (barrier (step)) within 0.1 s of rank "
            "0");
}

TEST(LocalWorld, MistakesOfTheCaller) {
  EXPECT_EQ(error_of([] { local_world(0); }), "[local_world] size must be positive, got 0");
  const auto world = local_world(1);
  world[0]->close();
  EXPECT_EQ(error_of([&] { world[0]->barrier({"late"}).wait(); }), "[communicator] it is closed");
}

}  // namespace
}  // namespace reprise::distributed

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "distributed/comm_queue.h"
#include "distributed/communicator.h"

namespace reprise::distributed {
namespace {

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(WorldOfOne, CollectivesAreCopies) {
  const auto world = world_of_one();
  EXPECT_EQ(world->rank(), 0);
  EXPECT_EQ(world->size(), 1);
  const std::vector<float> values{1, 2, 3};
  const Tensor x = Tensor::from(values, {3});
  const Tensor y = Tensor::zeros({3, 1}, DType::f32);
  world->all_reduce(x, Reduce::sum, {"x"}).wait();
  world->broadcast(x, 0, {"x"}).wait();
  EXPECT_EQ(x.to_vector<float>(), values);
  world->all_gather(x, y, {"x"}).wait();
  EXPECT_EQ(y.to_vector<float>(), values);
  y.zero();
  world->reduce_scatter(x, y, Reduce::max, {"x"}).wait();
  EXPECT_EQ(y.to_vector<float>(), values);
  world->barrier({"end"}).wait();
  EXPECT_EQ(all_reduce_value(*world, 0.1, Reduce::sum, "loss"), 0.1);
}

TEST(WorldOfOne, MistakesOfTheCaller) {
  const auto world = world_of_one();
  const Tensor x = Tensor::zeros({4, 4}, DType::f32), words = Tensor::zeros({2}, DType::i32);
  EXPECT_EQ(error_of([&] { world->all_reduce({}, Reduce::sum, {}); }),
            "[all_reduce] data is undefined");
  EXPECT_EQ(error_of([&] { world->all_reduce(x.transpose(0, 1).slice(0, 1, 3), Reduce::sum, {}); }),
            "[all_reduce] data must be contiguous: call contiguous()");
  EXPECT_EQ(error_of([&] { world->broadcast(x, 1, {}); }),
            "[broadcast] root must be a rank of 1, got 1");
  EXPECT_EQ(error_of([&] { world->all_gather(x, x.slice(0, 0, 2), {}); }),
            "[all_gather] out must have 1 ranks * 16 elements = 16, got 8");
  EXPECT_EQ(error_of([&] { world->reduce_scatter(x, words, Reduce::sum, {}); }),
            "[reduce_scatter] out must be f32 as in, got i32");
  EXPECT_EQ(error_of([&] { world->agree(words, {}); }), "[agree] words must be i64, got i32");
}

TEST(WorldOfOne, AfterAbortEverythingFails) {
  const auto world = world_of_one();
  world->abort("the disk is full");
  EXPECT_EQ(error_of([&] { world->barrier({}).wait(); }),
            "[communicator] rank 0 failed: the disk is full");
}

TEST(CommQueue, RunsInOrderOnOneThreadAndFailsTheRest) {
  CommQueue queue;
  std::vector<int> seen;
  std::vector<std::thread::id> threads;
  std::vector<Pending> pending;
  for (int i = 0; i < 100; ++i) {
    pending.push_back(queue.push([&, i] {
      seen.push_back(i);
      threads.push_back(std::this_thread::get_id());
      if (i == 60) {
        throw CommunicatorError("sixty");
      }
    }));
  }
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(error_of([&] { pending[static_cast<std::size_t>(i)].wait(); }),
              i < 60 ? "no error" : "sixty");
  }
  ASSERT_EQ(seen.size(), 61u);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    EXPECT_EQ(seen[i], static_cast<int>(i));
    EXPECT_EQ(threads[i], threads[0]);
    EXPECT_NE(threads[i], std::this_thread::get_id());
  }
  EXPECT_EQ(queue.error(), "sixty");
}

TEST(CommQueue, LetsGoOfWhatAJobHeldBeforeItIsDone) {
  CommQueue queue;
  for (int i = 0; i < 200; ++i) {
    const Tensor data = Tensor::zeros({4}, DType::f32);
    queue.push([data] { (void)data; }).wait();
    ASSERT_EQ(data.storage_references(), 1);
  }
}

TEST(CommQueue, LeavesBehindAJobThatDoesNotReturn) {
  auto go_on = std::make_shared<std::atomic<bool>>(false);
  CommQueue queue;
  const Pending stuck = queue.push([go_on] {
    while (!*go_on) {
      std::this_thread::yield();
    }
  });
  EXPECT_FALSE(queue.finish(std::chrono::milliseconds(20)));
  *go_on = true;
  stuck.wait();
}

}  // namespace
}  // namespace reprise::distributed

// Capturing a step, on a stand-in of the CUDA runtime.
#include "core/step_graph.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/allocator.h"
#include "core/arena.h"
#include "core/error.h"
#include "core/host_copy.h"
#include "core/memory_plan.h"
#include "tests/core/cuda_stand_in.h"

namespace reprise::testing {
namespace {

class StepGraphTest : public ::testing::Test {
 protected:
  StepGraphTest() {
    for (float*& block : at_) {
      block = static_cast<float*>(device_->allocate(kBytes));
    }
  }
  ~StepGraphTest() override {
    EXPECT_TRUE(device_->violations().empty()) << device_->violations()[0];
  }
  CudaCalls::Stream compute() const { return streams_.stream(StreamKind::compute); }
  // to = 2 * from + 1, elementwise.
  void kernel(float* to, const float* from) {
    device_->work(compute(), "affine", {{from, kBytes}}, {{to, kBytes}}, [=] {
      for (int i = 0; i < kElements; ++i) {
        to[i] = 2 * from[i] + 1;
      }
    });
  }
  std::string error_of(const std::function<void()>& f) {
    try {
      f();
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing was thrown";
  }
  static CudaStandIn::Options with_host() {
    CudaStandIn::Options options;
    options.first_stream_is_host = true;
    return options;
  }

  static constexpr int kElements = 64;
  static constexpr std::size_t kBytes = 4 * kElements;
  std::shared_ptr<CudaStandIn> device_ = std::make_shared<CudaStandIn>(with_host());
  Streams streams_{device_};
  float* at_[3] = {};
};

TEST_F(StepGraphTest, ReplaysWithNewData) {
  StepGraph graph(streams_);
  std::fill_n(at_[0], kElements, 1.0f);
  std::fill_n(at_[2], kElements, -1.0f);
  graph.capture([&] {
    EXPECT_TRUE(capturing());
    kernel(at_[1], at_[0]);
    kernel(at_[2], at_[1]);
  });
  EXPECT_FALSE(capturing());
  streams_.synchronize(StreamKind::compute);
  EXPECT_EQ(at_[2][0], -1) << "what is captured is not done";
  for (const float value : {1.0f, 5.0f}) {
    std::fill_n(at_[0], kElements, value);
    graph.launch();
    streams_.synchronize(StreamKind::compute);
    EXPECT_EQ(at_[2][kElements - 1], 4 * value + 3);
  }
}

// The copies of values that leave for host memory, on the copy stream, are part of the graph.
TEST_F(StepGraphTest, ValuesThatLeaveForHostMemoryAreCaptured) {
  const CopiesThrough through(streams_);
  StepGraph graph(streams_);
  const Tensor value = Tensor::wrap(at_[1], {kElements}, DType::f32);
  const Tensor host = Tensor::empty({kElements}, DType::f32, host_of(cpu));
  Tensor back;
  graph.capture([&] {
    kernel(at_[1], at_[0]);
    streams_.follow(StreamKind::copy, StreamKind::compute);
    streams_.copy(StreamKind::copy, host.raw(), at_[1], kBytes);
    const Streams::Mark left = streams_.mark(StreamKind::copy);
    kernel(at_[2], at_[0]);  // while the copy is under way
    streams_.wait(StreamKind::compute, left);
    kernel(at_[1], at_[2]);  // its memory serves another
    streams_.follow(StreamKind::copy, StreamKind::compute);
    streams_.copy(StreamKind::copy, at_[2], host.raw(), kBytes);
    streams_.follow(StreamKind::compute, StreamKind::copy);
    kernel(at_[1], at_[2]);
  });
  for (const float x : {1.0f, 3.0f}) {
    std::fill_n(at_[0], kElements, x);
    graph.launch();
    streams_.synchronize(StreamKind::compute);
    EXPECT_EQ(at_[1][7], 2 * (2 * x + 1) + 1);
  }
}

TEST_F(StepGraphTest, AStepThatThrowsLeavesNoGraphAndAStreamThatWorks) {
  StepGraph graph(streams_);
  graph.capture([&] { kernel(at_[1], at_[0]); });
  EXPECT_EQ(error_of([&] {
              graph.capture([&] {
                kernel(at_[1], at_[0]);
                expect_not_capturing("item", "the host reads elements");
              });
            }),
            "[item] cannot be part of a captured step: the host reads elements");
  EXPECT_FALSE(capturing());
  EXPECT_FALSE(graph.captured());
  EXPECT_EQ(error_of([&] { graph.launch(); }), "[launch] no step was captured");
  std::fill_n(at_[0], kElements, 2.0f);
  kernel(at_[1], at_[0]);
  streams_.synchronize(StreamKind::compute);
  EXPECT_EQ(at_[1][0], 5);
  graph.capture([&] { kernel(at_[2], at_[1]); });
  graph.launch();
  streams_.synchronize(StreamKind::compute);
  EXPECT_EQ(at_[2][0], 11);
  EXPECT_EQ(device_->count("end_capture"), 3);
}

TEST_F(StepGraphTest, OneCaptureAtATime) {
  StepGraph graph(streams_), other(streams_);
  EXPECT_EQ(error_of([&] { graph.capture([&] { other.capture([] {}); }); }),
            "[capture] cannot be part of a captured step: another capture");
  other.capture([&] { kernel(at_[1], at_[0]); });
  EXPECT_EQ(error_of([&] { graph.capture([&] { other.launch(); }); }),
            "[launch] cannot be part of a captured step: a graph of its own");
}

TEST_F(StepGraphTest, BlocksMustLieWhereThePlanSays) {
  PlannedArena arena(std::make_unique<Arena>());
  StepGraph graph(streams_);
  const std::vector<Lifetime> trace{{1000, 0, 2}, {500, 1, 3}, {100, 4, Lifetime::kOpen}};
  const auto plan = std::make_shared<const MemoryPlan>(plan_memory(trace));
  std::vector<void*> first;
  const auto step = [&](std::size_t second_bytes, bool stays) {
    void* a = arena.allocate(1000);
    void* b = nullptr;
    try {
      b = arena.allocate(second_bytes);
    } catch (...) {
      arena.free(a, 1000);
      throw;
    }
    first = {a, b};
    arena.free(a, 1000);
    arena.free(b, second_bytes);
    if (stays) {
      arena.free(arena.allocate(100), 100);
    }
  };
  const auto captured = [&](std::size_t second_bytes, bool stays) {
    return error_of([&] { graph.capture([&] { step(second_bytes, stays); }); });
  };
  const std::string refused =
      " bytes is not in the step's memory plan, and cannot be part of a captured step: capture "
      "from the second step on, with the plan of the same step";
  EXPECT_EQ(captured(500, false), "[allocate] a block of 1000" + refused) << "no plan";
  arena.begin(plan);
  EXPECT_EQ(captured(500, false), "nothing was thrown");
  const std::vector<void*> planned = first;
  arena.end();
  arena.begin(plan);
  EXPECT_EQ(captured(501, false), "[allocate] a block of 501" + refused);
  arena.end();
  arena.begin(plan);
  EXPECT_EQ(captured(500, true), "[allocate] a block of 100" + refused) << "it outlives the step";
  EXPECT_EQ(first, planned);
  arena.end();
}

// The stand-in sees what CUDA refuses.
TEST(CudaStandIn, WhatACaptureMayNotDo) {
  const auto device = std::make_shared<CudaStandIn>();
  Streams streams(device);
  const Streams::Mark outside = streams.mark(StreamKind::communication);
  float* at = static_cast<float*>(device->allocate(64));
  StepGraph graph(streams);
  graph.capture([&] {
    streams.wait(StreamKind::compute, outside);
    streams.synchronize(StreamKind::compute);
    device->allocate(64);
    streams.follow(StreamKind::copy, StreamKind::compute);
    device->work(streams.stream(StreamKind::copy), "work", {}, {{at, 64}});
  });
  EXPECT_EQ(device->violations(),
            (std::vector<std::string>{
                "captured work waits for an event from outside of the capture",
                "a stream is waited for while it is captured",
                "device memory is allocated while a stream is captured",
                "stream 1 takes part in a capture and was not joined before its end"}));
}

}  // namespace
}  // namespace reprise::testing

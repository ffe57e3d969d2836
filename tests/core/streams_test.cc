// Streams, copies to the host and page-locked memory, on a stand-in of the CUDA runtime.
#include "core/streams.h"

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/host_copy.h"
#include "core/pinned_memory.h"
#include "tests/core/cuda_stand_in.h"

namespace reprise::testing {
namespace {

class StreamsTest : public ::testing::Test {
 protected:
  void start(CudaStandIn::Options options = {}) {
    device_ = std::make_shared<CudaStandIn>(std::move(options));
    streams_ = std::make_unique<Streams>(device_);
    at_ = static_cast<float*>(device_->allocate(kBytes));
  }
  void kernel(StreamKind on, bool writes, float value = 0) {
    const MemoryRange range{at_, kBytes};
    const auto fill = [this, value] { std::fill_n(at_, 64, value); };
    if (writes) {
      device_->work(streams_->stream(on), "fill", {}, {range}, fill);
    } else {
      device_->work(streams_->stream(on), "read", {range}, {});
    }
  }
  static constexpr std::size_t kBytes = 256;
  std::shared_ptr<CudaStandIn> device_;
  std::unique_ptr<Streams> streams_;
  float* at_ = nullptr;
};

TEST_F(StreamsTest, AStreamThatFollowsAnotherSeesItsWork) {
  start();
  std::vector<float> host(64);
  kernel(StreamKind::compute, true, 3);
  streams_->follow(StreamKind::copy, StreamKind::compute);
  streams_->copy(StreamKind::copy, host.data(), at_, kBytes);
  EXPECT_EQ(host[0], 0) << "nothing is done before somebody waits";
  streams_->synchronize(StreamKind::copy);
  EXPECT_EQ(host[63], 3);
  streams_->follow(StreamKind::compute, StreamKind::copy);
  kernel(StreamKind::compute, true, 4);
  EXPECT_TRUE(device_->violations().empty()) << device_->violations()[0];
}

// Each order that is left out is seen: the check of the checks below.
TEST_F(StreamsTest, WorkThatIsNotOrderedIsAViolation) {
  start();
  std::vector<float> host(64);
  kernel(StreamKind::compute, true, 3);
  streams_->copy(StreamKind::copy, host.data(), at_, kBytes);
  ASSERT_EQ(device_->violations().size(), 1u);
  EXPECT_EQ(device_->violations()[0],
            "copy on stream 1 reads 256 bytes that fill on stream 0 writes, unordered");
  kernel(StreamKind::compute, true, 4);  // while the copy reads
  EXPECT_EQ(device_->violations().size(), 2u);
  kernel(StreamKind::communication, false);
  EXPECT_EQ(device_->violations().size(), 3u);
  streams_->synchronize(StreamKind::copy);
}

// An older mark orders nothing that came after it.
TEST_F(StreamsTest, AMarkStandsForWhatWasGivenBeforeIt) {
  start();
  const Streams::Mark early = streams_->mark(StreamKind::compute);
  kernel(StreamKind::compute, true);
  streams_->wait(StreamKind::communication, early);
  kernel(StreamKind::communication, false);
  EXPECT_EQ(device_->violations().size(), 1u);
}

TEST_F(StreamsTest, EventsAreUsedAgain) {
  start();
  for (int i = 0; i < 100; ++i) {
    streams_->follow(StreamKind::copy, StreamKind::compute);
  }
  EXPECT_EQ(device_->count("make_event"), 1);
  Streams other(device_);
  const Streams::Mark mark = other.mark(StreamKind::compute);
  EXPECT_THROW(streams_->wait(StreamKind::copy, mark), InternalError);
}

TEST_F(StreamsTest, AStreamThatCannotBeMadeLeavesNone) {
  CudaStandIn::Options options;
  int left = 2;
  options.fault = [&](const char*) {
    if (left-- == 0) {
      fail("cuda", "no more");
    }
  };
  const auto device = std::make_shared<CudaStandIn>(options);
  EXPECT_THROW(Streams{device}, Error);
  EXPECT_EQ(device->count("make_stream"), device->count("destroy_stream"));
  EXPECT_EQ(device->count("make_stream"), 2);
}

// Its host takes part in the order: what it waits for is done.
CudaStandIn::Options with_host() {
  CudaStandIn::Options options;
  options.first_stream_is_host = true;
  return options;
}

// A tensor of the stand-in's device memory, which a kernel has filled with 0, 1, 2, ...
Tensor device_tensor(CudaStandIn& device, Streams& streams, std::int64_t elements) {
  auto* at = static_cast<float*>(device.allocate(static_cast<std::size_t>(4 * elements)));
  device.work(streams.stream(StreamKind::compute), "iota", {},
              {{at, static_cast<std::size_t>(4 * elements)}},
              [=] { std::iota(at, at + elements, 0.0f); });
  return Tensor::wrap(at, {elements}, DType::f32, cpu,
                      std::shared_ptr<void>(at, [](void*) { /* the test reuses it */ }));
}

TEST_F(StreamsTest, ATensorLeavesAndComesBackInOrder) {
  start(with_host());
  const CopiesThrough through(*streams_);
  const Tensor tensor = device_tensor(*device_, *streams_, 64);
  void* const memory = tensor.raw();
  const auto compute = streams_->stream(StreamKind::compute);
  {
    HostCopy copy(tensor);
    copy.settle();
    EXPECT_FALSE(copy.on_device());
    // Its memory has other work now.
    device_->work(compute, "other", {}, {{memory, 256}}, [=] { std::memset(memory, 0, 256); });
    const Tensor back = copy.take(MemoryKind::saved);
    EXPECT_EQ(back.kind(), MemoryKind::saved);
    device_->work(compute, "reader", {{back.raw(), 256}}, {});
    streams_->synchronize(StreamKind::compute);
    EXPECT_EQ(back.data<float>()[63], 63);
    EXPECT_EQ(allocator(host_of(cpu)).report().live_bytes, 0);
  }
  EXPECT_TRUE(device_->violations().empty()) << device_->violations()[0];
}

TEST_F(StreamsTest, WhatIsFetchedBeforeItsMemoryWentIsNotCopiedBack) {
  start(with_host());
  const CopiesThrough through(*streams_);
  const Tensor tensor = device_tensor(*device_, *streams_, 64);
  HostCopy copy(tensor);
  copy.fetch(MemoryKind::saved);
  copy.settle();
  EXPECT_TRUE(copy.on_device());
  EXPECT_TRUE(copy.take(MemoryKind::saved).shares_storage(tensor));
  EXPECT_EQ(device_->count("copy"), 1);
}

TEST_F(StreamsTest, ACopyThatIsLetGoOfIsWaitedFor) {
  start(with_host());
  const CopiesThrough through(*streams_);
  const Tensor tensor = device_tensor(*device_, *streams_, 64);
  { const HostCopy copy(tensor); }
  kernel(StreamKind::compute, true);
  device_->work(streams_->stream(StreamKind::compute), "other", {}, {{tensor.raw(), 256}});
  EXPECT_TRUE(device_->violations().empty()) << device_->violations()[0];
}

TEST_F(StreamsTest, ACopyThatFailsLeavesHostMemoryAsItWas) {
  for (const std::string call : {"record", "wait", "copy"}) {
    bool on = false;
    CudaStandIn::Options options = with_host();
    options.fault = [&](const char* name) {
      if (on && name == call) {
        on = false;
        fail("cuda", "{} failed", name);
      }
    };
    start(options);
    const CopiesThrough through(*streams_);
    const Tensor tensor = device_tensor(*device_, *streams_, 64);
    on = true;
    EXPECT_THROW(HostCopy{tensor}, Error) << call;
    HostCopy copy(tensor);
    copy.settle();
    on = true;
    EXPECT_THROW(copy.fetch(MemoryKind::saved), Error) << call;
    EXPECT_FALSE(copy.on_device());
    const Tensor back = copy.take(MemoryKind::saved);
    streams_->synchronize(StreamKind::compute);
    EXPECT_EQ(back.data<float>()[63], 63);
    EXPECT_TRUE(device_->violations().empty()) << device_->violations()[0];
  }
  EXPECT_EQ(allocator(host_of(cpu)).report().live_bytes, 0);
}

TEST(PinnedMemory, BlocksAreKeptForTheNextOfTheirSize) {
  const auto device = std::make_shared<CudaStandIn>();
  {
    PinnedMemory memory(device);
    void* first = memory.allocate(1000);
    void* second = memory.allocate(1000);
    memory.free(first, 1000);
    EXPECT_EQ(memory.allocate(1005), first);  // of the same rounded size
    memory.free(first, 1005);
    memory.free(second, 1000);
    EXPECT_EQ(device->count("allocate_pinned"), 2);
    EXPECT_EQ(memory.reserved_bytes(), 2 * 1024u);
    EXPECT_LE(device->pinned_bytes(), 2 * 1000 * 9 / 8u);
  }
  EXPECT_EQ(device->pinned_bytes(), 0u);
  EXPECT_TRUE(device->violations().empty());
}

TEST(PinnedMemory, GivesBackWhatItKeepsBeforeItFails) {
  CudaStandIn::Options options;
  options.pinned_bytes = 4096;
  PinnedMemory memory(std::make_shared<CudaStandIn>(options));
  void* first = memory.allocate(2048);
  void* second = memory.allocate(1024);
  memory.free(first, 2048);
  void* third = memory.allocate(3072);
  EXPECT_EQ(memory.reserved_bytes(), 4096u);
  try {
    memory.allocate(64);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "[cuda] no page-locked host memory for 64 bytes; 4096 are held");
  }
  memory.free(second, 1024);
  memory.free(third, 3072);
}

TEST(HostAccounts, HaveNamesOfTheirOwn) {
  EXPECT_EQ(to_string(host_of(cpu)), "host of cpu");
  EXPECT_EQ(to_string(host_of(meta)), "host of meta");
  EXPECT_EQ(to_string(host_of({DeviceKind::cuda, 3})), "host of cuda:3");
  EXPECT_THROW(allocator(host_of({DeviceKind::cuda, 3})), Error);
  const Tensor counted = Tensor::empty({8}, DType::f32, host_of(meta), MemoryKind::saved);
  EXPECT_EQ(allocator(host_of(meta)).report().live_bytes, 32);
  EXPECT_EQ(allocator(host_of(cpu)).report().live_bytes, 0);
}

}  // namespace
}  // namespace reprise::testing

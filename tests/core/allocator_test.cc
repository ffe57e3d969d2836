#include "core/allocator.h"

#include <atomic>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "core/arena.h"
#include "core/error.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace reprise {
namespace {

TEST(Allocator, CountsByKindAndPeak) {
  Allocator& memory = allocator(meta);
  memory.reset_peak();
  const MemoryReport before = memory.report();
  {
    const Tensor a = Tensor::empty({1000}, DType::f32, meta);
    const Tensor b = Tensor::empty({500}, DType::f32, meta, MemoryKind::parameters);
    b.reclassify(MemoryKind::gradients);
    const MemoryReport now = memory.report();
    EXPECT_EQ(now.live_bytes - before.live_bytes, 6000);
    const auto kind = [](MemoryKind k) { return static_cast<std::size_t>(k); };
    EXPECT_EQ(now.live[kind(MemoryKind::activations)] - before.live[kind(MemoryKind::activations)],
              4000);
    EXPECT_EQ(now.live[kind(MemoryKind::parameters)], before.live[kind(MemoryKind::parameters)]);
    EXPECT_EQ(now.live[kind(MemoryKind::gradients)] - before.live[kind(MemoryKind::gradients)],
              2000);
  }
  const MemoryReport after = memory.report();
  EXPECT_EQ(after.live_bytes, before.live_bytes);
  EXPECT_EQ(after.peak_bytes, before.live_bytes + 6000);
}

TEST(Allocator, CountsBySegment) {
  Allocator& memory = allocator(meta);
  const std::string before = memory.set_segment("block.7");
  Tensor x = Tensor::empty({256}, DType::f32, meta);
  memory.set_segment(before);
  const Tensor y = Tensor::empty({512}, DType::f32, meta);
  EXPECT_EQ(memory.report().peak_by_segment.at("block.7"), 1024);
}

TEST(Allocator, GuardFindsAWriteBehindTheEnd) {
  Allocator memory(cpu, std::make_unique<Arena>());
  memory.set_guard(true);
  std::uint32_t segment = 0;
  std::uint64_t number = 0;
  auto* at = static_cast<unsigned char*>(
      memory.allocate(100, MemoryKind::activations, true, segment, number));
  at[99] = 1;
  memory.free(at, 100, MemoryKind::activations, segment, number);
  EXPECT_EQ(memory.damaged_guards(), 0);
  at = static_cast<unsigned char*>(
      memory.allocate(100, MemoryKind::activations, true, segment, number));
  at[100] = 1;
  memory.free(at, 100, MemoryKind::activations, segment, number);
  EXPECT_EQ(memory.damaged_guards(), 1);
  at = static_cast<unsigned char*>(
      memory.allocate(100, MemoryKind::activations, true, segment, number));
  EXPECT_THROW(memory.set_guard(false), InternalError);
  at[-1] = 1;
  memory.free(at, 100, MemoryKind::activations, segment, number);
  EXPECT_EQ(memory.damaged_guards(), 2);
}

TEST(Allocator, FaultIsThrownBeforeAnythingIsCounted) {
  Allocator& memory = allocator(cpu);
  const auto live = memory.report().live_bytes;
  memory.set_fault([](std::size_t bytes) { fail("allocate", "out of memory: {} bytes", bytes); });
  EXPECT_THROW((void)Tensor::empty({10}, DType::f32), Error);
  memory.set_fault(nullptr);
  EXPECT_EQ(memory.report().live_bytes, live);
}

TEST(Allocator, TimelineIsJson) {
  Allocator& memory = allocator(meta);
  memory.set_timeline(true);
  const std::string before = memory.set_segment("quote\"");
  { const Tensor x = Tensor::empty({10}, DType::f32, meta); }
  memory.set_segment(before);
  memory.set_timeline(false);
  const auto json = nlohmann::json::parse(memory.timeline_json());
  EXPECT_EQ(json["device"], "meta");
  ASSERT_EQ(json["events"].size(), 2u);
  EXPECT_EQ(json["events"][0][2], 40);
  EXPECT_EQ(json["events"][1][2], -40);
  EXPECT_EQ(json["events"][0][3], "activations");
  EXPECT_EQ(json["events"][0][4], "quote\"");
}

TEST(Allocator, TimelineOfAKindAddsUp) {
  Allocator& memory = allocator(meta);
  memory.set_timeline(true);
  {
    const Tensor x = Tensor::empty({10}, DType::f32, meta);
    x.reclassify(MemoryKind::saved);
  }
  memory.set_timeline(false);
  std::map<std::string, std::int64_t> live;
  const auto json = nlohmann::json::parse(memory.timeline_json());
  for (const auto& event : json["events"]) {
    EXPECT_GE(live[event[3]] += event[2].get<std::int64_t>(), 0);
  }
  EXPECT_EQ(live, (std::map<std::string, std::int64_t>{{"activations", 0}, {"saved", 0}}));
}

// Blocks never overlap, and what is resident stays near what is live.
TEST(Arena, RandomBlocksKeepTheirContents) {
  Arena arena(std::size_t{1} << 20);
  std::mt19937_64 random(5);
  struct Block {
    unsigned char* at;
    std::size_t bytes;
    unsigned char mark;
  };
  std::vector<Block> live;
  for (int step = 0; step < 4000; ++step) {
    if (live.size() > 40 || (!live.empty() && random() % 3 == 0)) {
      const std::size_t i = random() % live.size();
      for (std::size_t k = 0; k < live[i].bytes; k += 997) {
        ASSERT_EQ(live[i].at[k], live[i].mark);
      }
      ASSERT_EQ(live[i].at[live[i].bytes - 1], live[i].mark);
      arena.free(live[i].at, live[i].bytes);
      live[i] = live.back();
      live.pop_back();
    } else {
      const std::size_t bytes = 1 + random() % (std::size_t{1} << (8 + random() % 12));
      auto* at = static_cast<unsigned char*>(arena.allocate(bytes));
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(at) % 64, 0u);
      const auto mark = static_cast<unsigned char>(random());
      std::fill(at, at + bytes, mark);
      live.push_back({at, bytes, mark});
    }
  }
  for (const Block& block : live) {
    arena.free(block.at, block.bytes);
  }
}

std::size_t resident_bytes(const void* at, std::size_t bytes) {
  std::vector<unsigned char> resident(bytes / 4096);
  EXPECT_EQ(mincore(const_cast<void*>(at), bytes, resident.data()), 0);
  std::size_t pages = 0;
  for (unsigned char page : resident) {
    pages += page & 1u;
  }
  return pages * 4096;
}

constexpr std::size_t kMiB = std::size_t{1} << 20;

unsigned char* filled(Arena& arena, std::size_t bytes) {
  auto* at = static_cast<unsigned char*>(arena.allocate(bytes));
  std::fill(at, at + bytes, static_cast<unsigned char>(1));
  return at;
}

TEST(Arena, WhatWasTouchedServesTheNextStepWithoutFaults) {
  Arena arena(kMiB);
  auto* const at = filled(arena, 64 * kMiB);
  arena.free(at, 64 * kMiB);
  EXPECT_EQ(resident_bytes(at, 64 * kMiB), 64 * kMiB);
  EXPECT_EQ(arena.allocate(64 * kMiB), at);
  arena.free(at, 64 * kMiB);
}

TEST(Arena, FreePagesGoBackBeyondTheMostThatWasLive) {
  Arena arena(kMiB);
  std::vector<unsigned char*> blocks;
  for (int i = 0; i < 16; ++i) {
    blocks.push_back(filled(arena, 4 * kMiB));
  }
  for (std::size_t i = 0; i < blocks.size(); i += 2) {
    arena.free(blocks[i], 4 * kMiB);
  }
  auto* const large = filled(arena, 32 * kMiB);  // fits into none of the holes
  std::size_t resident = resident_bytes(large, 32 * kMiB);
  EXPECT_EQ(resident, 32 * kMiB);
  for (unsigned char* block : blocks) {
    resident += resident_bytes(block, 4 * kMiB);
  }
  EXPECT_LE(resident, 65 * kMiB);
  EXPECT_EQ(resident, arena.resident_bytes());
  for (std::size_t i = 1; i < blocks.size(); i += 2) {
    for (std::size_t k = 0; k < 4 * kMiB; k += 997) {
      ASSERT_EQ(blocks[i][k], 1);
    }
  }
}

TEST(Parallel, ChunksAreTheSameForAnyNumberOfThreads) {
  const int before = threads();
  for (int count : {1, 2, 3}) {
    set_threads(count);
    std::vector<std::pair<std::int64_t, std::int64_t>> chunks(4);
    parallel_for(10, 3, [&](std::int64_t begin, std::int64_t end) {
      chunks[static_cast<std::size_t>(begin / 3)] = {begin, end};
    });
    EXPECT_EQ(chunks, (std::vector<std::pair<std::int64_t, std::int64_t>>{
                          {0, 3}, {3, 6}, {6, 9}, {9, 10}}));
  }
  set_threads(before);
  parallel_for(0, 3, [](std::int64_t, std::int64_t) { FAIL(); });
}

// An exception that left a thread of the pool would end the process.
TEST(Parallel, TheFirstExceptionReachesTheCaller) {
  const int before = threads();
  for (int count : {1, 2, 3}) {
    set_threads(count);
    const auto failing = [] {
      parallel_for(100, 1, [](std::int64_t i, std::int64_t) {
        if (i % 10 == 5) {
          fail("loop", "does not work");
        }
      });
    };
    EXPECT_THROW(failing(), Error);
    std::atomic<int> calls = 0;
    parallel_for(100, 1, [&](std::int64_t, std::int64_t) { ++calls; });
    EXPECT_EQ(calls, 100);
  }
  set_threads(before);
}

// Blocks that hold on to a huge page each must not cost a search at every allocation.
TEST(Arena, PinnedPagesStayCheap) {
  Arena arena(kMiB);
  constexpr std::size_t kSmallBlock = 64 << 10;
  std::vector<void*> large, pins;
  for (int i = 0; i < 64; ++i) {
    large.push_back(arena.allocate(2 * kMiB));
    pins.push_back(arena.allocate(kSmallBlock));
  }
  for (void* at : large) {
    arena.free(at, 2 * kMiB);
  }
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 20000; ++i) {
    arena.free(arena.allocate(3 * kMiB), 3 * kMiB);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  for (void* at : pins) {
    arena.free(at, kSmallBlock);
  }
}

}  // namespace
}  // namespace reprise

#include "core/memory_plan.h"

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/allocator.h"
#include "core/arena.h"
#include "core/error.h"
#include "core/tensor.h"

namespace reprise::testing {
namespace {

// Nested and overlapping lifetimes, as a forward and a sweep over it have.
std::vector<Lifetime> draw_step(unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Lifetime> trace;
  std::vector<std::size_t> live;
  std::int64_t clock = 0;
  for (int i = 0; i < 120; ++i) {
    if (live.empty() || random() % 5 < 3) {
      live.push_back(trace.size());
      trace.push_back({static_cast<std::int64_t>(1 + random() % 40000), clock++, Lifetime::kOpen});
    } else {
      const std::size_t at = random() % 3 == 0 ? random() % live.size() : live.size() - 1;
      trace[live[at]].end = clock++;
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  while (live.size() > 3) {  // the rest outlives the step
    trace[live.back()].end = clock++;
    live.pop_back();
  }
  return trace;
}

TEST(MemoryPlan, NoTwoBlocksThatLiveTogetherOverlap) {
  double worst = 1, sum = 0;
  constexpr int kSteps = 200;
  for (unsigned seed = 0; seed < kSteps; ++seed) {
    const std::vector<Lifetime> trace = draw_step(seed);
    const MemoryPlan plan = plan_memory(trace);
    ASSERT_EQ(plan.blocks.size(), trace.size());
    std::int64_t end = 0;
    for (std::size_t i = 0; i < trace.size(); ++i) {
      ASSERT_EQ(plan.blocks[i].offset == MemoryPlan::kElsewhere, trace[i].end == Lifetime::kOpen);
      ASSERT_EQ(plan.blocks[i].bytes, trace[i].bytes);
      if (trace[i].end == Lifetime::kOpen) {
        continue;
      }
      ASSERT_EQ(plan.blocks[i].offset % kPlanAlignment, 0);
      end = std::max(end, plan.blocks[i].offset + trace[i].bytes);
      for (std::size_t j = 0; j < i; ++j) {
        const bool together = trace[j].end != Lifetime::kOpen && trace[j].begin < trace[i].end &&
                              trace[i].begin < trace[j].end;
        const auto &a = plan.blocks[i], &b = plan.blocks[j];
        ASSERT_TRUE(!together || a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset)
            << "seed " << seed << ", blocks " << i << " and " << j;
      }
    }
    ASSERT_LE(end, plan.bytes);
    ASSERT_GE(plan.bytes, plan.live_bytes);
    const double ratio = static_cast<double>(plan.bytes) / static_cast<double>(plan.live_bytes);
    worst = std::max(worst, ratio);
    sum += ratio;
  }
  EXPECT_LT(worst, 1.25);
  EXPECT_LT(sum / kSteps, 1.04);
}

TEST(MemoryPlan, AStackOfBlocksNeedsWhatIsLive) {
  const std::vector<Lifetime> trace{
      {256, 0, 9}, {512, 1, 3}, {1024, 2, 4}, {300, 5, 8}, {100, 6, 7}};
  const MemoryPlan plan = plan_memory(trace);
  EXPECT_EQ(plan.live_bytes, 256 + 512 + 1024);
  EXPECT_EQ(plan.bytes, plan.live_bytes);
  EXPECT_EQ(plan_memory({}).bytes, 0);
}

// Memory that says what was asked of it.
class CountedMemory final : public MemorySource {
 public:
  struct Counts {
    std::vector<std::size_t> asked;
    std::int64_t live = 0;
    bool exhausted = false;
  };
  explicit CountedMemory(Counts& counts) : counts_(counts) {}
  void* allocate(std::size_t bytes) override {
    if (counts_.exhausted) {
      fail("allocate", "exhausted");
    }
    counts_.asked.push_back(bytes);
    ++counts_.live;
    return arena_.allocate(bytes);
  }
  void free(void* at, std::size_t bytes) noexcept override {
    --counts_.live;
    arena_.free(at, bytes);
  }

 private:
  Counts& counts_;
  Arena arena_;
};

// Allocates and frees in the order of the trace; the addresses by block. Block `skewed` is of
// another size.
std::vector<void*> run(PlannedArena& arena, const std::vector<Lifetime>& trace,
                       std::size_t skewed = SIZE_MAX) {
  std::vector<std::pair<std::int64_t, std::size_t>> events;
  for (std::size_t i = 0; i < trace.size(); ++i) {
    events.emplace_back(2 * trace[i].begin + 1, i);
    if (trace[i].end != Lifetime::kOpen) {
      events.emplace_back(2 * trace[i].end, i);
    }
  }
  std::ranges::sort(events);
  const auto bytes = [&](std::size_t i) {
    return static_cast<std::size_t>(trace[i].bytes) + (i == skewed ? 1 : 0);
  };
  std::vector<void*> at(trace.size());
  for (const auto& [time, i] : events) {
    if (time % 2 != 0) {
      at[i] = arena.allocate(bytes(i));
      std::fill_n(static_cast<char*>(at[i]), bytes(i), static_cast<char>(i));
    } else {
      const auto* first = static_cast<const char*>(at[i]);
      EXPECT_TRUE(std::all_of(first, first + bytes(i),
                              [i = i](char c) { return c == static_cast<char>(i); }))
          << "block " << i << " was written by another";
      arena.free(at[i], bytes(i));
    }
  }
  for (std::size_t i = 0; i < trace.size(); ++i) {
    if (trace[i].end == Lifetime::kOpen) {
      arena.free(at[i], bytes(i));
    }
  }
  return at;
}

TEST(PlannedArena, ReservesWhatThePlanSaysAndGivesTheSameAddresses) {
  const std::vector<Lifetime> trace = draw_step(7);
  const auto plan = std::make_shared<const MemoryPlan>(plan_memory(trace));
  CountedMemory::Counts counts;
  {
    PlannedArena arena(std::make_unique<CountedMemory>(counts));
    arena.begin(plan);
    EXPECT_EQ(counts.asked, std::vector<std::size_t>{static_cast<std::size_t>(plan->bytes)});
    EXPECT_EQ(arena.reserved_bytes(), plan->bytes);
    const std::vector<void*> first = run(arena, trace);
    arena.end();
    EXPECT_EQ(arena.strays(), 0);
    EXPECT_EQ(counts.asked.size(), 1u + 3u) << "the three that outlive the step";
    arena.begin(plan);
    const std::vector<void*> second = run(arena, trace);
    arena.end();
    for (std::size_t i = 0; i < trace.size(); ++i) {
      EXPECT_TRUE(trace[i].end == Lifetime::kOpen || first[i] == second[i]) << i;
    }
    EXPECT_EQ(counts.live, 1);
    run(arena, trace);  // without a plan: all from the other source
    EXPECT_EQ(counts.asked.size(), 1u + 2 * 3 + trace.size());
  }
  EXPECT_EQ(counts.live, 0);
}

TEST(PlannedArena, AStepThatDiffersFromItsPlanIsRightAllTheSame) {
  CountedMemory::Counts counts;
  PlannedArena arena(std::make_unique<CountedMemory>(counts));
  const std::vector<Lifetime> trace = draw_step(8);
  const auto plan = std::make_shared<const MemoryPlan>(plan_memory(trace));
  for (const std::size_t skewed : {std::size_t{0}, trace.size() / 2, trace.size() - 1}) {
    arena.begin(plan);
    run(arena, trace, skewed);
    arena.end();
    EXPECT_EQ(arena.strays(), static_cast<std::int64_t>(trace.size() - skewed));
  }
  // Another step altogether: of the first block's size, perhaps, and then not.
  arena.begin(plan);
  run(arena, draw_step(9));
  arena.end();
  EXPECT_GT(arena.strays(), 0);
  EXPECT_EQ(counts.live, 1);
}

TEST(PlannedArena, ABlockThatIsHeldLongerIsNotWrittenOver) {
  CountedMemory::Counts counts;
  PlannedArena arena(std::make_unique<CountedMemory>(counts));
  const std::vector<Lifetime> trace{{1000, 0, 1}, {1000, 2, 3}, {1000, 4, 5}};
  const auto plan = std::make_shared<const MemoryPlan>(plan_memory(trace));
  EXPECT_EQ(plan->bytes, 1024);
  arena.begin(plan);
  void* held = arena.allocate(1000);
  void* second = arena.allocate(1000);
  EXPECT_NE(second, held);
  arena.free(held, 1000);
  EXPECT_EQ(arena.allocate(1000), held);
  arena.end();
  EXPECT_EQ(arena.strays(), 1);
  // The next plan is larger, and a block of this one is there still.
  const std::vector<Lifetime> larger{{5000, 0, 1}};
  arena.begin(std::make_shared<const MemoryPlan>(plan_memory(larger)));
  EXPECT_EQ(arena.reserved_bytes(), 1024);
  void* other = arena.allocate(5000);
  arena.end();
  EXPECT_EQ(arena.strays(), 1);
  arena.free(other, 5000);
  arena.free(second, 1000);
  arena.free(held, 1000);
  arena.begin(std::make_shared<const MemoryPlan>(plan_memory(larger)));
  EXPECT_EQ(arena.reserved_bytes(), 5120);
  EXPECT_THROW(arena.begin(plan), Error);
  arena.end();
}

TEST(PlannedArena, WithoutMemoryThereIsNoPlan) {
  CountedMemory::Counts counts;
  PlannedArena arena(std::make_unique<CountedMemory>(counts));
  counts.exhausted = true;
  const std::vector<Lifetime> trace{{1000, 0, 1}};
  EXPECT_THROW(arena.begin(std::make_shared<const MemoryPlan>(plan_memory(trace))), Error);
  EXPECT_FALSE(arena.in_use());
  EXPECT_EQ(arena.reserved_bytes(), 0);
}

TEST(AllocatorTrace, WritesDownLifetimes) {
  Allocator& memory = allocator(meta);
  const Tensor before = Tensor::empty({10}, DType::f32, meta);
  memory.set_trace(true);
  {
    const Tensor a = Tensor::empty({100}, DType::f32, meta);
    const Tensor none = Tensor::empty({0}, DType::f32, meta);
    const Tensor b = Tensor::empty({50}, DType::i64, meta);
  }
  Tensor stays = Tensor::empty({3}, DType::f32, meta);
  memory.set_trace(false);
  const Tensor after = Tensor::empty({4}, DType::f32, meta);
  const std::vector<Lifetime> trace = memory.trace();
  ASSERT_EQ(trace.size(), 3u);
  EXPECT_EQ(trace[0].bytes, 400);
  EXPECT_EQ(trace[1].bytes, 400);
  EXPECT_LT(trace[0].begin, trace[1].begin);
  EXPECT_LT(trace[1].end, trace[0].end);
  EXPECT_EQ(trace[2].end, Lifetime::kOpen);
  memory.set_trace(true);  // what the last trace saw means nothing to this one
  {
    const Tensor a = Tensor::empty({7}, DType::f32, meta);
    stays = Tensor();
  }
  memory.set_trace(false);
  ASSERT_EQ(memory.trace().size(), 1u);
  EXPECT_EQ(memory.trace()[0].begin, 0);
  EXPECT_EQ(memory.trace()[0].end, 1);
}

}  // namespace
}  // namespace reprise::testing

#include "core/memory_plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/allocator.h"
#include "core/error.h"
#include "core/step_graph.h"

namespace reprise {
namespace {

std::int64_t rounded(std::int64_t bytes) {
  return (bytes + kPlanAlignment - 1) / kPlanAlignment * kPlanAlignment;
}

// The lowest gap that fits best among the blocks that live at the same time, by the order given.
void place(std::span<const Lifetime> trace, const std::vector<std::size_t>& order,
           MemoryPlan& plan) {
  std::vector<std::size_t> placed;  // by offset
  for (const std::size_t block : order) {
    const Lifetime& life = trace[block];
    const std::int64_t wanted = rounded(life.bytes);
    std::int64_t best = -1, best_gap = std::numeric_limits<std::int64_t>::max(), end = 0;
    for (const std::size_t other : placed) {
      const Lifetime& there = trace[other];
      if (there.end <= life.begin || life.end <= there.begin) {
        continue;
      }
      const std::int64_t offset = plan.blocks[other].offset, gap = offset - end;
      if (gap >= wanted && gap < best_gap) {
        best = end;
        best_gap = gap;
      }
      end = std::max(end, offset + rounded(there.bytes));
    }
    const std::int64_t at = best >= 0 ? best : end;
    plan.blocks[block].offset = at;
    plan.bytes = std::max(plan.bytes, at + wanted);
    const auto after = std::ranges::upper_bound(
        placed, at, {}, [&](std::size_t other) { return plan.blocks[other].offset; });
    placed.insert(after, block);
  }
}

std::int64_t most_live(std::span<const Lifetime> trace) {
  std::vector<std::pair<std::int64_t, std::int64_t>> changes;
  for (const Lifetime& life : trace) {
    if (life.end != Lifetime::kOpen) {
      changes.emplace_back(life.begin, rounded(life.bytes));
      changes.emplace_back(life.end, -rounded(life.bytes));
    }
  }
  std::ranges::sort(changes);
  std::int64_t live = 0, most = 0;
  for (const auto& [time, bytes] : changes) {
    live += bytes;
    most = std::max(most, live);
  }
  return most;
}

}  // namespace

// No order is best for all steps, and the optimum is hard: of three, the one that needs least.
MemoryPlan plan_memory(std::span<const Lifetime> trace) {
  MemoryPlan empty;
  for (const Lifetime& life : trace) {
    empty.blocks.push_back({life.bytes, MemoryPlan::kElsewhere});
  }
  empty.live_bytes = most_live(trace);
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < trace.size(); ++i) {
    if (trace[i].end != Lifetime::kOpen && trace[i].bytes > 0) {
      order.push_back(i);
    }
  }
  MemoryPlan best = empty;
  best.bytes = std::numeric_limits<std::int64_t>::max();
  const auto attempt = [&] {
    if (best.bytes == empty.live_bytes) {
      return;
    }
    MemoryPlan plan = empty;
    place(trace, order, plan);
    if (plan.bytes < best.bytes) {
      best = std::move(plan);
    }
  };
  const auto size = [&](std::size_t i) { return -trace[i].bytes; };
  const auto area = [&](std::size_t i) {
    return -static_cast<double>(trace[i].bytes) *
           static_cast<double>(trace[i].end - trace[i].begin);
  };
  const auto length = [&](std::size_t i) { return trace[i].begin - trace[i].end; };
  std::ranges::stable_sort(order, {}, size);
  attempt();
  std::ranges::stable_sort(order, {}, area);
  attempt();
  std::ranges::stable_sort(order, {}, length);
  attempt();
  return best;
}

PlannedArena::PlannedArena(std::unique_ptr<MemorySource> source, bool device)
    : source_(std::move(source)), device_(device) {}

PlannedArena::~PlannedArena() {
  give_back_late();
}

void PlannedArena::begin(std::shared_ptr<const MemoryPlan> plan) {
  ensure(plan != nullptr, "no plan was given");
  if (plan_ != nullptr) {
    fail("memory plan", "another plan is in use");
  }
  if (plan->bytes > reserved_bytes_ && live_.empty()) {
    base_ = nullptr;
    reserved_bytes_ = 0;
    reserved_ = nullptr;
    const auto bytes = static_cast<std::size_t>(plan->bytes);
    void* const at = source_->allocate(bytes);
    reserved_ = std::shared_ptr<const void>(
        at, [source = source_, at, bytes](const void*) { source->free(at, bytes); });
    base_ = static_cast<char*>(at);
    reserved_bytes_ = plan->bytes;
  }
  plan_ = std::move(plan);
  next_ = 0;
  strays_ = 0;
  gone_ = 0;
  off_plan_ = plan_->bytes > reserved_bytes_;
}

void PlannedArena::end() {
  plan_ = nullptr;
}

bool PlannedArena::vacant(std::int64_t offset, std::int64_t bytes) const {
  const auto after = live_.lower_bound(offset);
  return (after == live_.end() || offset + bytes <= after->first) &&
         (after == live_.begin() || std::prev(after)->second <= offset);
}

// A captured step would find its blocks at these addresses at each launch: only the plan's are its
// own.
void* PlannedArena::elsewhere(std::size_t bytes) {
  if (device_ && capturing()) {
    fail("allocate",
         "a block of {} bytes is not in the step's memory plan, and cannot be part of a captured "
         "step: capture from the second step on, with the plan of the same step",
         bytes);
  }
  give_back_late();
  return source_->allocate(bytes);
}

void PlannedArena::give_back_late() {
  for (const auto& [at, bytes] : std::exchange(late_, {})) {
    source_->free(at, bytes);
  }
}

void* PlannedArena::allocate(std::size_t bytes) {
  if (plan_ == nullptr) {
    return elsewhere(bytes);
  }
  const auto wanted = static_cast<std::int64_t>(bytes);
  if (!off_plan_ && next_ < plan_->blocks.size() && plan_->blocks[next_].bytes == wanted) {
    const std::int64_t offset = plan_->blocks[next_++].offset;
    if (offset == MemoryPlan::kElsewhere) {
      return elsewhere(bytes);
    }
    if (vacant(offset, wanted)) {
      live_[offset] = offset + wanted;
      return base_ + offset;
    }
  } else {
    off_plan_ = true;
  }
  ++strays_;
  return elsewhere(bytes);
}

void PlannedArena::free(void* at, std::size_t bytes) noexcept {
  const std::less<const char*> before;
  const char* block = static_cast<const char*>(at);
  if (base_ != nullptr && !before(block, base_) && before(block, base_ + reserved_bytes_)) {
    live_.erase(block - base_);
  } else if (device_ && capturing()) {
    ++gone_;
    late_.emplace_back(at, bytes);
  } else {
    give_back_late();
    source_->free(at, bytes);
  }
}

}  // namespace reprise

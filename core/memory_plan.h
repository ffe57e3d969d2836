// Where the blocks of a step lie, when the step is known beforehand: a dry run tells what it
// allocates and frees, in order (Allocator::set_trace), and all of it goes to fixed offsets of one
// piece of memory. So the bytes that are reserved are those of the plan, a step has no fragments,
// and its addresses are the same each time, as a captured graph wants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace reprise {

class MemorySource;

// A block of a trace. Times count allocations and frees.
struct Lifetime {
  static constexpr std::int64_t kOpen = std::numeric_limits<std::int64_t>::max();
  std::int64_t bytes = 0;
  std::int64_t begin = 0, end = kOpen;  // kOpen: it was live when the trace ended
};

struct MemoryPlan {
  static constexpr std::int64_t kElsewhere = -1;  // an offset: the block outlives the step
  struct Block {
    std::int64_t bytes = 0, offset = kElsewhere;
  };
  std::vector<Block> blocks;  // in order of allocation
  std::int64_t bytes = 0;     // to be reserved
  // The most that is live at one time, sizes rounded to kPlanAlignment: no plan can have less.
  std::int64_t live_bytes = 0;
};
inline constexpr std::int64_t kPlanAlignment = 256;

// Blocks that are live at the end are not planned: they belong to the next step too.
MemoryPlan plan_memory(std::span<const Lifetime> trace);

// Hands out the blocks of a plan in its order, while one is in use, and otherwise those of another
// source. A step that differs from its plan is as right as one without: from the first block of
// another size on, and wherever a block that should be gone is still there, blocks come from the
// other source.
//
// Blocks are used in order of one stream, or of streams that wait for each other as core/streams.h
// says: a block is handed out again as soon as it is freed.
class PlannedArena {
 public:
  // `device`: work that is captured (core/step_graph.h) uses its addresses, so that meanwhile
  // blocks of the plan only are handed out, and others are given back afterwards.
  explicit PlannedArena(std::unique_ptr<MemorySource> source, bool device = true);
  ~PlannedArena();
  PlannedArena(const PlannedArena&) = delete;

  void* allocate(std::size_t bytes);
  void free(void* at, std::size_t bytes) noexcept;

  // The next block is the plan's first. What is reserved is kept for the next plan that fits it;
  // one that does not makes room when no block is in it. Throws Error while a plan is in use, or
  // when there is no memory.
  void begin(std::shared_ptr<const MemoryPlan> plan);
  void end();
  bool in_use() const { return plan_ != nullptr; }
  std::int64_t reserved_bytes() const { return reserved_bytes_; }
  // Since begin(): blocks that the plan should have had and that came from the other source.
  std::int64_t strays() const { return strays_; }
  // Since begin(): blocks from before that were freed while a step was captured.
  std::int64_t gone() const { return gone_; }
  // What is reserved; it stays as long as this is held, whatever plan comes next.
  std::shared_ptr<const void> reserved() const { return reserved_; }

 private:
  void* elsewhere(std::size_t bytes);
  bool vacant(std::int64_t offset, std::int64_t bytes) const;
  void give_back_late();

  const std::shared_ptr<MemorySource> source_;
  const bool device_;
  std::shared_ptr<const MemoryPlan> plan_;
  std::size_t next_ = 0;
  bool off_plan_ = false;
  char* base_ = nullptr;
  std::shared_ptr<const void> reserved_;
  std::int64_t reserved_bytes_ = 0;
  std::map<std::int64_t, std::int64_t> live_;  // end of each block by its offset
  std::int64_t strays_ = 0, gone_ = 0;
  std::vector<std::pair<void*, std::size_t>> late_;  // to be given back after the capture
};

}  // namespace reprise

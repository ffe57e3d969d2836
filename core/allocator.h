// The accounting allocator: one per device, every byte of a step goes through it.
//
// Bytes are requested sizes, not block sizes, so that the meta device (which hands out no memory
// for floating tensors) and a real device count the same.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/memory_plan.h"

namespace reprise {

enum class MemoryKind : std::uint8_t {
  parameters,
  gradients,
  optimizer,
  activations,  // alive through a handle or an op under way
  saved,        // held by the tape for backward or as the start of a replay
  workspace,
  communication,
};
inline constexpr std::size_t kMemoryKinds = 7;
std::string_view name(MemoryKind kind);

using BytesByKind = std::array<std::int64_t, kMemoryKinds>;

struct MemoryReport {
  std::int64_t live_bytes = 0;
  std::int64_t peak_bytes = 0;
  BytesByKind live{};     // by kind, now
  BytesByKind at_peak{};  // by kind, at the moment of the peak
  BytesByKind peak{};     // the largest of each kind, whenever it was
  // Of activations, saved values and workspace together, the most at one time: what a checkpoint
  // policy can change.
  std::int64_t peak_transient_bytes = 0;
  std::map<std::string, std::int64_t> peak_by_segment;  // bytes allocated under each label
};

// Where the bytes come from.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  // 64-byte aligned; throws Error when there is no more. bytes > 0.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* at, std::size_t bytes) noexcept = 0;
};

class Allocator {
 public:
  Allocator(Device device, std::unique_ptr<MemorySource> source);
  Allocator(const Allocator&) = delete;

  // `real` false counts the bytes and returns null (floating tensors on meta).
  // `number` is the block's in the trace under way.
  void* allocate(std::size_t bytes, MemoryKind kind, bool real, std::uint32_t& segment,
                 std::uint64_t& number);
  void free(void* at, std::size_t bytes, MemoryKind kind, std::uint32_t segment,
            std::uint64_t number) noexcept;
  // The same bytes now serve another purpose.
  void reclassify(std::size_t bytes, MemoryKind from, MemoryKind to, std::uint32_t segment);

  MemoryReport report() const;
  // The peak starts again at what is live now.
  void reset_peak();

  // Later allocations are counted under this label, until the next call. Returns the one before.
  std::string set_segment(std::string label);

  // Guard bytes around every block, checked when it is freed and counted when damaged: for tests.
  void set_guard(bool on);
  // Number of damaged guards seen since the start.
  std::int64_t damaged_guards() const;
  // Fills blocks with NaN bytes (0xff) when they are freed: for tests.
  void set_poison(bool on);
  // Called before each allocation with its size; may throw to play an exhausted device.
  void set_fault(std::function<void(std::size_t bytes)> fault);

  // Writes down the lifetime of each block that is allocated from here on; what was written down
  // before is forgotten.
  void set_trace(bool on);
  std::vector<Lifetime> trace() const;
  // Blocks lie where the plan says, until end_plan(): for a step that allocates what the traced one
  // did. Throws Error while another is in use.
  void begin_plan(std::shared_ptr<const MemoryPlan> plan);
  struct PlanUse {
    std::int64_t reserved_bytes = 0;
    std::int64_t strays = 0;  // blocks that were not where the plan says: 0, or the step differed
    std::int64_t gone = 0;    // blocks from before the step that a captured one has freed
    std::shared_ptr<const void> reserved;  // keeps the memory where it is: for a captured step
  };
  PlanUse end_plan();

  // Records (time, live bytes, kind, segment) at each change while on.
  void set_timeline(bool on);
  // {"device": ..., "events": [[microseconds, live_bytes, delta_bytes, "kind", "segment"], ...]}.
  // The deltas of a kind add up to its live bytes: bytes that change their kind are two events.
  std::string timeline_json() const;

 private:
  struct Event {
    std::int64_t microseconds, live_bytes, delta_bytes;
    MemoryKind kind;
    std::uint32_t segment;
  };
  void count(std::int64_t delta_bytes, MemoryKind kind, std::uint32_t segment);
  void add_event(std::int64_t delta_bytes, MemoryKind kind, std::uint32_t segment);

  const Device device_;
  PlannedArena source_;
  mutable std::mutex mutex_;
  std::int64_t live_bytes_ = 0, peak_bytes_ = 0;
  std::int64_t transient_bytes() const;

  BytesByKind live_{}, at_peak_{}, peak_{};
  std::int64_t peak_transient_bytes_ = 0;
  std::vector<std::string> labels_{""};
  std::map<std::string, std::uint32_t, std::less<>> label_ids_{{"", 0}};
  std::vector<std::int64_t> live_by_label_{0}, peak_by_label_{0};
  std::uint32_t label_ = 0;
  bool guard_ = false, poison_ = false, timeline_ = false;
  std::int64_t damaged_ = 0;
  std::function<void(std::size_t)> fault_;
  std::vector<Event> events_;
  bool tracing_ = false;
  std::uint64_t trace_begin_ = 1;  // the number of its first block; numbers are never used again
  std::int64_t trace_clock_ = 0;
  std::vector<Lifetime> trace_;
  std::chrono::steady_clock::time_point start_;
};

// The allocator of a device; made at its first use. Throws Error for a device that is not there.
Allocator& allocator(Device device);

// A block of memory with a reference count. Made by Tensor.
struct Storage {
  void* data = nullptr;  // null for a floating tensor on meta, and for zero bytes
  std::size_t bytes = 0;
  MemoryKind kind = MemoryKind::activations;
  Device device;
  std::uint32_t segment = 0;
  std::uint64_t number = 0;  // in the allocator's trace
  std::atomic<std::int32_t> references{1};
  std::shared_ptr<void> owner;  // set when the memory is not the allocator's

  // From the allocator of the device.
  static Storage* allocate(std::size_t bytes, Device device, MemoryKind kind, bool real);
  // Memory of somebody else (a mapped file, a bucket), which `owner` keeps alive. Not counted.
  static Storage* wrap(void* data, std::size_t bytes, Device device, std::shared_ptr<void> owner);
  void reclassify(MemoryKind to);
  void release() noexcept;
};

}  // namespace reprise

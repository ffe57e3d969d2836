// What this process is doing, for whoever watches it from outside of its work: a process whose
// counter stands still for too long, and which does not wait for others, hangs.
//
// Ops, their replays and backwards, chunks of parallel_for and pieces of files that are read or
// written (nn/weights) count. Work of another kind that takes longer than a watchdog's limit
// (distributed/watchdog.h) calls progress().tick() now and then.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <string_view>

namespace reprise {

enum class Phase : std::uint8_t {
  starting,
  loading,
  data,
  forward,
  backward,
  replay,
  optimizer,
  saving,
  evaluation,
  ending
};

constexpr std::string_view name(Phase phase) {
  constexpr std::string_view names[] = {"start",  "loading",   "data",   "forward",    "backward",
                                        "replay", "optimizer", "saving", "evaluation", "end"};
  return names[static_cast<std::uint8_t>(phase)];
}

// All calls may come from any thread.
class Progress {
 public:
  void tick() noexcept { ticks_.fetch_add(1, std::memory_order_relaxed); }
  void enter(Phase phase) noexcept {
    phase_.store(phase, std::memory_order_relaxed);
    tick();
  }
  void begin_step(std::int64_t step) noexcept { step_.store(step, std::memory_order_relaxed); }
  // While the thread that computes waits for other ranks, its counter may stand still.
  void begin_wait() noexcept { waits_.fetch_add(1, std::memory_order_relaxed); }
  void end_wait() noexcept {
    waits_.fetch_sub(1, std::memory_order_relaxed);
    tick();
  }

  std::uint64_t ticks() const noexcept { return ticks_.load(std::memory_order_relaxed); }
  Phase phase() const noexcept { return phase_.load(std::memory_order_relaxed); }
  std::int64_t step() const noexcept { return step_.load(std::memory_order_relaxed); }
  bool waiting() const noexcept { return waits_.load(std::memory_order_relaxed) > 0; }

 private:
  std::atomic<std::uint64_t> ticks_ = 0;
  std::atomic<std::int64_t> step_ = 0;
  std::atomic<int> waits_ = 0;
  std::atomic<Phase> phase_ = Phase::starting;
};

// Of this process.
inline Progress& progress() noexcept {
  static Progress instance;
  return instance;
}

// The phase until the end of its life; then the one before, unless an exception is under way: its
// reader wants to know where it came from.
class PhaseScope {
 public:
  explicit PhaseScope(Phase phase) noexcept
      : before_(progress().phase()), exceptions_(std::uncaught_exceptions()) {
    progress().enter(phase);
  }
  ~PhaseScope() {
    if (std::uncaught_exceptions() == exceptions_) {
      progress().enter(before_);
    }
  }
  PhaseScope(const PhaseScope&) = delete;

 private:
  Phase before_;
  int exceptions_;
};

}  // namespace reprise

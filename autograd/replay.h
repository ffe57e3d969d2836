// Replay: a folded segment's values, as far as the sweep needs them, computed again from its
// records. Internal to autograd.
#pragma once

#include <cstdint>

#include "autograd/sweep_plan.h"
#include "autograd/tape_state.h"

namespace reprise {

class Replay {
 public:
  Replay(TapeState& tape, const SweepPlan& plan) : tape_(tape), plan_(plan) {}
  // The exact mirror of close(): afterwards all that the segment's level wants is resident.
  void enter(std::int32_t segment);

 private:
  TapeState& tape_;
  const SweepPlan& plan_;
};

// Adds to f(value) over wants(level), restricted to live records; -1 is the root.
template <class F>
void each_wanted(const TapeState& tape, const SweepPlan& plan, std::int32_t level, F&& f) {
  const auto& segments = tape.segments();
  const std::int32_t first = level < 0 ? 0 : segments[static_cast<std::size_t>(level)].first;
  const auto last = level < 0 ? static_cast<std::int32_t>(tape.records().size())
                              : segments[static_cast<std::size_t>(level)].last;
  for (std::int32_t r = first; r < last; ++r) {
    const Record& record = tape.records()[static_cast<std::size_t>(r)];
    if (record.segment == level && plan.live[static_cast<std::size_t>(r)] != 0) {
      tape.each_saved(record, f);
    }
  }
  auto child = [&](std::int32_t c) {
    for (Value* v : plan.hold[static_cast<std::size_t>(c)]) {
      f(v);
    }
    for (Value* v : plan.keep[static_cast<std::size_t>(c)]) {
      f(v);
    }
  };
  if (level >= 0) {
    for (std::int32_t c : segments[static_cast<std::size_t>(level)].children) {
      child(c);
    }
    return;
  }
  for (std::size_t s = 0; s < segments.size(); ++s) {
    if (segments[s].parent < 0) {
      child(static_cast<std::int32_t>(s));
    }
  }
}

}  // namespace reprise

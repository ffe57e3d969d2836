// What close(), the sweep's plan, its replays and explain() share: what a level wants, and the walk
// from values that are asked for, backwards through a segment's records, to what a replay must
// start from. Internal to autograd.
#pragma once

#include <cstdint>
#include <vector>

#include "autograd/tape_state.h"

namespace reprise {

// Calls f(value) over wants(level), of the records r with live(r); -1 is the root. held(segment, f)
// calls f over what a child segment holds and keeps.
template <class Live, class Held, class F>
void each_wanted(const TapeState& tape, std::int32_t level, Live&& live, Held&& held, F&& f) {
  const auto& segments = tape.segments();
  const Segment* segment = level < 0 ? nullptr : &segments[static_cast<std::size_t>(level)];
  const std::int32_t last =
      segment != nullptr ? segment->last : static_cast<std::int32_t>(tape.records().size());
  for (std::int32_t r = segment != nullptr ? segment->first : 0; r < last; ++r) {
    const Record& record = tape.records()[static_cast<std::size_t>(r)];
    if (record.segment == level && live(r)) {
      tape.each_saved(record, f);
    }
  }
  if (segment != nullptr) {
    for (std::int32_t c : segment->children) {
      held(c, f);
    }
    return;
  }
  for (std::size_t s = 0; s < segments.size(); ++s) {
    if (segments[s].parent < 0) {
      held(static_cast<std::int32_t>(s), f);
    }
  }
}
// The same as forward left it: every record, and what the segments were folded to.
template <class F>
void each_wanted(const TapeState& tape, std::int32_t level, F&& f) {
  each_wanted(
      tape, level, [](std::int32_t) { return true; },
      [&](std::int32_t c, auto& g) { tape.each_held(c, g); }, f);
}

class Closure {
 public:
  Closure(TapeState& tape, std::int32_t segment)
      : tape_(tape), segment_(segment), candidate_(tape.next_epoch()), epoch_(tape.next_epoch()) {}

  // The walk does not go past it.
  void at_hand(Value* value) { value->candidate = candidate_; }
  void ask(Value* value) {
    Value* root = value->root;
    if (!root->is_parameter() && root->asked != epoch_) {
      root->asked = epoch_;
      asked_.push_back(root);
    }
  }
  // Calls on_run(record) for each record that a replay may execute.
  template <class F>
  void run(F&& on_run) {
    const Segment& s = tape_.segments()[static_cast<std::size_t>(segment_)];
    for (std::int32_t i = s.last - 1; i >= s.first; --i) {
      const Record& r = tape_.records()[static_cast<std::size_t>(i)];
      if (r.op->is_view()) {
        continue;
      }
      for (Value* output : tape_.outputs(r)) {
        if (output->asked == epoch_ && output->candidate != candidate_) {
          on_run(i);
          for (Value* input : tape_.inputs(r)) {
            if (input != nullptr) {
              ask(input);
            }
          }
          break;
        }
      }
    }
  }
  // Asked and made before the segment.
  std::vector<Value*> hold() const {
    std::vector<Value*> result;
    for (Value* v : asked_) {
      if (TapeState::outside(v, tape_.segments()[static_cast<std::size_t>(segment_)])) {
        result.push_back(v);
      }
    }
    return result;
  }
  // Asked, made in the segment, and at hand.
  std::vector<Value*> keep() const {
    std::vector<Value*> result;
    for (Value* v : asked_) {
      if (v->candidate == candidate_ &&
          !TapeState::outside(v, tape_.segments()[static_cast<std::size_t>(segment_)])) {
        result.push_back(v);
      }
    }
    return result;
  }

 private:
  TapeState& tape_;
  std::int32_t segment_;
  std::uint32_t candidate_, epoch_;
  std::vector<Value*> asked_;
};

}  // namespace reprise

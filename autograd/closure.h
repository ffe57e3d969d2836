// The walk that close() and the sweep's plan share: from values that are asked for, backwards
// through a segment's records, to what a replay must start from. Internal to autograd.
#pragma once

#include <cstdint>
#include <vector>

#include "autograd/tape_state.h"

namespace reprise {

class Closure {
 public:
  // Values marked with `candidate` are at hand: the walk does not go past them.
  Closure(TapeState& tape, std::int32_t segment, std::uint32_t candidate)
      : tape_(tape), segment_(segment), candidate_(candidate), epoch_(tape.next_epoch()) {}

  void ask(Value* value) {
    Value* root = value->root;
    if (!root->is_parameter() && root->asked != epoch_) {
      root->asked = epoch_;
      asked_.push_back(root);
    }
  }
  void ask(const std::vector<Value*>& values) {
    for (Value* v : values) {
      ask(v);
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

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

}  // namespace reprise

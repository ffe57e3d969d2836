// What backward knows before it touches anything. Internal to autograd.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "autograd/closure.h"
#include "autograd/tape_state.h"

namespace reprise {

struct SweepPlan {
  struct Reader {
    int expected = 0;             // contributions
    std::int32_t ready_at = 0;    // lowest record that contributes
    std::size_t slot = 0;         // its input there
    std::int32_t last_read = -1;  // lowest record that may still read it
  };

  // Throws Error for all that the caller can have done wrong; nothing is touched.
  SweepPlan(TapeState& tape, std::span<const Variable> losses, std::span<const Variable> wrt,
            const BackwardOptions& options);

  // Calls f(value) over wants(level), restricted to what is live; -1 is the root.
  template <class F>
  void each_wanted(std::int32_t level, F&& f) const {
    reprise::each_wanted(
        tape_, level, [&](std::int32_t r) { return live[static_cast<std::size_t>(r)] != 0; },
        [&](std::int32_t c, auto& g) {
          std::ranges::for_each(hold[static_cast<std::size_t>(c)], g);
          std::ranges::for_each(keep[static_cast<std::size_t>(c)], g);
        },
        f);
  }

  std::vector<char> live;                       // by record: a backward runs
  std::vector<std::vector<Value*>> hold, keep;  // by segment, restricted to what is live
  std::vector<std::vector<std::int32_t>> runs;  // by segment: what its replay may run, descending
  std::unordered_map<Parameter*, Reader> readers;
  std::vector<std::vector<Parameter*>> last_reads;  // by record, only when asked for
  std::vector<Parameter*> never_read;               // announced, and not read in the sweep at all
  Plan plan;

  std::vector<Contribution> contributions() const;

 private:
  void check(std::span<const Variable> losses, std::span<const Variable> wrt,
             const BackwardOptions& options) const;
  void find_live(std::span<const Variable> losses);
  void restrict_segments();
  void find_last_reads();
  void order(const BackwardOptions& options);
  void announce_last_reads();
  void list_reads();
  void expect_all_reached() const;

  TapeState& tape_;
  std::vector<const Parameter*> parameter_losses_;
  std::vector<char> may_run_;
};

}  // namespace reprise

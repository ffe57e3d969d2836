// Stage 3 of sharding: the values of a unit are gathered ahead of their first read, and let go of
// after the last.
//
// Ranks may read different units, in different orders; they gather the same ones in one order.
//
// In a forward that order is a list that all have: of the last forward, at first the recorded one.
// A rank goes along it as it reads, one unit ahead, and takes part in what it does not read itself;
// at the end of its forward it goes through the rest. Each gather comes with a few words to the
// other ranks, by which a rank asks for a unit that the list does not have, or not any more: all
// gather it next. When a unit is let go of is each rank's own affair: after what was its last read
// in this rank's last forward. What no rank has read in two forwards leaves the list.
//
// In a sweep the tape's plan says exactly what is read. Where the plans of all ranks are the same,
// as a rule, the units come in the order of its reads, one ahead, and a unit goes when the last
// read of all its parameters is announced. A replay and the backward of its records share one
// gather, and so do the last segment's forward and its sweep: nothing is gathered twice in a
// forward, nor in a sweep. Where plans differ, or a rank has no data, ranks wait for each other:
// one that needs a unit asks, the others take part when they need one or have come to the end, and
// who will read it keeps it. So nothing is gathered twice either, but nothing ahead.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd/tape.h"
#include "distributed/communicator.h"
#include "distributed/gather_words.h"
#include "distributed/shard_units.h"
#include "distributed/sharded_gradients.h"

namespace reprise::distributed {

struct GatherEvent {
  std::size_t unit = 0;
  bool sweep = false;  // for a replay or backward; else for a forward
  bool ahead = false;  // before anything of the unit was read
};

// What comes after a forward: stops, accumulates or reduces.
using AfterForward = GatherWords::Flag;

class ShardedValues {
 public:
  // `order`: of a forward's units. The parameters' values go, the ranks' shards are copies of them
  // (of MemoryKind::parameters; uninitialised where a parameter had no elements). `again`:
  // ShardingOptions::gather_again.
  ShardedValues(Communicator& communicator, const std::vector<Parameter*>& parameters,
                const std::vector<ShardUnit>& units, std::vector<std::size_t> order,
                ShardedGradients& gradients, std::size_t again);
  ShardedValues(const ShardedValues&) = delete;

  void before_read(const Parameter& p);
  // The end of a forward without a sweep, on all ranks. Nothing is gathered any more.
  void end_forward();
  // For a rank without a forward: takes part in that of the others. What they do after it; absent
  // when no rank has one.
  std::optional<AfterForward> join_forward();

  // The sweep's hooks. The end of a forward too: what all ranks go on with, which is to accumulate
  // when some have more micro-batches.
  AfterForward begin_sweep(const Plan& plan, AfterForward kind);
  // Once the gradients have begun.
  void start_sweep();
  void last_read(const Parameter& p);
  // After a sweep on all ranks. Of a rank without one: instead of it.
  void end_sweep();
  // All gathered values go, on this rank.
  void release_all();
  // Whether ranks wait for each other in this sweep.
  bool in_step() const { return in_step_; }

  const Tensor& shard(std::size_t unit) const { return states_[unit].shard; }
  // Gathers of the last forward and its sweep, and of those since.
  const std::vector<GatherEvent>& gathers() const { return gathers_; }
  void clear_gathers() { gathers_.clear(); }

 private:
  struct State {
    Tensor shard, full;
    Pending pending;
    bool resident = false;                // the parameters have their values
    std::vector<const Parameter*> still;  // in a sweep: whose last read is to come
    // Of the forward under way.
    bool read = false;      // by this rank
    bool gathered = false;  // on all ranks
    bool stays = false;     // nobody foresaw it: others may read it too
    int idle_forwards = 0;  // in a row, on all ranks
  };
  // A gather of the list under way, with the words that came before it.
  struct Flight {
    GatherWords words;
    Pending exchange;
  };
  static constexpr std::size_t kNone = ~std::size_t{0};

  bool here(std::size_t unit) const { return states_[unit].full.defined(); }
  void launch(std::size_t unit, bool ahead);
  void take_part(std::size_t unit);
  void make_resident(std::size_t unit);
  void release(std::size_t unit);
  std::size_t find_next(std::size_t unit, const std::vector<std::size_t>& order) const;

  // sharded_values_forward.cc
  void read_in_forward(std::size_t unit);
  bool foreseen(std::size_t unit) const;
  void release_unneeded(std::size_t reading, bool wait);
  void look_ahead();
  GatherWords words_of_forward(std::size_t wanted) const;
  void advance(std::size_t wanted);
  void start_flight(std::size_t wanted, bool ahead);
  void settle_flight();
  void gather_wanted(const GatherWords& words, std::size_t reading);
  std::optional<GatherWords> finish_forward(AfterForward kind, std::uint64_t plan);
  AfterForward kind_of(const GatherWords& words) const;
  void release_unread();
  void reset_forward();
  void renew_list(const GatherWords& words);
  std::uint64_t hash_of_reads() const;

  void read_in_sweep(std::size_t unit);
  void look_ahead_in_sweep();
  void release_until_later(std::size_t reading);
  void meet(std::size_t wanted);
  void ask_in_sweep(std::size_t unit);
  std::uint64_t hash_of(const Plan& plan) const;

  Communicator& communicator_;
  const std::vector<Parameter*>& parameters_;
  const std::vector<ShardUnit>& units_;
  ShardedGradients& gradients_;
  const std::size_t again_;
  std::unordered_map<const Parameter*, std::size_t> unit_of_, index_of_;
  std::vector<State> states_;
  std::vector<std::size_t> list_;  // of a forward's gathers, the same on all ranks
  std::size_t list_at_ = 0;
  std::vector<std::size_t> gathered_;  // in this forward, the same on all ranks
  std::optional<Flight> flight_;
  bool runs_ = true;                   // this rank has a forward
  bool others_run_ = false;            // some rank has one
  std::vector<std::size_t> foreseen_;  // this rank's reads, as in the last forward
  std::vector<std::size_t> seen_, sweep_order_;
  bool sweeping_ = false, in_step_ = false, over_ = true;
  std::size_t sweep_reads_left_ = 0;
  std::size_t next_ = 0;  // in the order of the phase: after what is read now
  std::size_t current_ = kNone;
  std::vector<GatherEvent> gathers_;
};

}  // namespace reprise::distributed

// Stage 3 of sharding: the values of a unit are gathered ahead of their first read, and let go of
// after the last.
//
// In a forward the order of the last forward (the first time: the one that was recorded) says what
// comes next and what comes again; what it did not foresee is gathered when it is read. In a sweep
// the tape's plan says it exactly: the units come in the order of its reads, and a unit goes when
// the last read of all its parameters is announced. A replay and the backward of its records share
// one gather, and so do the last segment's forward and its sweep: nothing is gathered twice in a
// forward, nor in a sweep. One unit at most is under way or waits to be read.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd/tape.h"
#include "distributed/communicator.h"
#include "distributed/shard_units.h"

namespace reprise::distributed {

struct GatherEvent {
  std::size_t unit = 0;
  bool sweep = false;  // for a replay or backward; else for a forward
  bool ahead = false;  // before anything of the unit was read
};

class ShardedValues {
 public:
  // `order`: of a forward's units. The parameters' values go, the ranks' shards are copies of them
  // (of MemoryKind::parameters; uninitialised where a parameter had no elements).
  ShardedValues(Communicator& communicator, const std::vector<Parameter*>& parameters,
                const std::vector<ShardUnit>& units, std::vector<std::size_t> order);
  ShardedValues(const ShardedValues&) = delete;

  void before_read(const Parameter& p);
  // The sweep's hooks.
  void begin_sweep(const Plan& plan);
  void last_read(const Parameter& p);
  // Nothing is read any more: all gathered values go.
  void end();

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
  };
  void move_to(std::size_t unit);
  std::size_t find_next(std::size_t unit, const std::vector<std::size_t>& order);
  void launch(std::size_t unit, bool ahead);
  void make_resident(std::size_t unit);
  void release(std::size_t unit);
  void look_ahead();
  bool gathered(const State& state) const { return state.full.defined(); }

  static constexpr std::size_t kNone = ~std::size_t{0};

  Communicator& communicator_;
  const std::vector<Parameter*>& parameters_;
  const std::vector<ShardUnit>& units_;
  std::unordered_map<const Parameter*, std::size_t> unit_of_;
  std::vector<State> states_;
  std::vector<std::size_t> forward_order_, seen_, sweep_order_;
  bool sweeping_ = false;
  std::size_t sweep_reads_left_ = 0;
  std::size_t next_ = 0;  // in the order of the phase: after what is read now
  std::size_t current_ = kNone;
  std::vector<GatherEvent> gathers_;
};

}  // namespace reprise::distributed

// Stages 2 and 3 of sharding: each rank gets the sum of the gradients of its shard only.
//
// The gradients of a unit lie in one flat buffer, as its values do, that is made when the first of
// them is written. When the last is ready it is reduce-scattered: rank r keeps slice r, the buffer
// goes. One buffer at most is under way while the next fills, so that a sweep needs memory for two
// units, not for all. Units go in the reverse order of a forward's reads, the same on every rank
// whatever branches it takes. Sums have the bits of Communicator::all_reduce.
//
// In a sweep that only accumulates nothing is sent and the buffers stay, so that the local sum over
// micro-batches comes first, as without sharding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "autograd/tape.h"
#include "distributed/communicator.h"
#include "distributed/shard_units.h"

namespace reprise::distributed {

class ShardedGradients {
 public:
  ShardedGradients(Communicator& communicator, const std::vector<Parameter*>& parameters,
                   const std::vector<ShardUnit>& units, double divisor);
  ShardedGradients(const ShardedGradients&) = delete;
  ~ShardedGradients();

  // Where the gradient of a parameter goes; undefined for one of a unit that is not trainable.
  Tensor storage(const Parameter& p);
  // The sweep's hooks. `reduce`: it is the last of a step.
  void begin_sweep(const Plan& plan, bool reduce);
  void ready(const Parameter& p);
  // After the sweep that reduces: waits, divides.
  void finish();
  // Gradients are absent again, on every rank.
  void zero();

  // Whether any rank has used the parameter since the gradients were zero; after finish().
  bool used(std::size_t parameter) const;
  // [slice]; undefined when nothing of the unit was used.
  const Tensor& shard(std::size_t unit) const { return states_[unit].shard; }
  // Of the last reduction, in order of launch.
  const std::vector<std::size_t>& launched() const { return launched_; }

 private:
  struct State {
    Tensor full, shard;
    Pending pending;
    std::size_t left = 0;  // parameters that the sweep is to make ready
  };
  void launch_ready();
  void launch(std::size_t unit);
  void settle_flight();
  void start_agreement();
  void finish_agreement();
  bool used_anywhere(std::size_t unit) const;

  Communicator& communicator_;
  const std::vector<Parameter*>& parameters_;
  const std::vector<ShardUnit>& units_;
  const double divisor_;
  struct Place {
    std::size_t unit, slot, parameter;
  };
  std::unordered_map<const Parameter*, Place> places_;
  std::vector<State> states_;
  std::vector<std::size_t> order_;  // of launching: trainable units
  std::vector<char> touched_;       // by parameter: has had a contribution since zero()
  std::unordered_map<const Parameter*, int> expected_;
  std::size_t next_ = 0;
  std::optional<std::size_t> flight_;
  std::vector<std::size_t> launched_;
  Tensor words_;  // a hash, its complement, a bit per used parameter
  Pending agreement_;
  bool agreed_ = false, reducing_ = false, reduced_ = false;
  std::int64_t step_ = 0;
};

}  // namespace reprise::distributed

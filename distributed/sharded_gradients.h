// Stages 2 and 3 of sharding: each rank gets the sum of the gradients of its shard only.
//
// The gradients of a unit lie in one flat buffer, as its values do, that is made when the first of
// them is written. When the last is ready it is reduce-scattered: rank r keeps slice r, the buffer
// goes. One buffer at most is under way while the next fills, so that a sweep needs memory for two
// units, not for all. Units go in the reverse order of a forward's reads, the same on every rank
// whatever branches it takes. Sums have the bits of Communicator::all_reduce, and what the options
// ask for is done as the reducer does it (distributed/reducer.h).
//
// In a sweep that only accumulates nothing is sent and the buffers stay, so that the local sum over
// micro-batches comes first, as without sharding. With fixed shards of the batch they are added in
// the tree of shard_sums.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "autograd/tape.h"
#include "distributed/communicator.h"
#include "distributed/gather_words.h"
#include "distributed/reducer.h"
#include "distributed/shard_sums.h"
#include "distributed/shard_units.h"

namespace reprise::distributed {

class ShardedGradients {
 public:
  ShardedGradients(Communicator& communicator, const std::vector<Parameter*>& parameters,
                   const std::vector<ShardUnit>& units, const ReducerOptions& options);
  ShardedGradients(const ShardedGradients&) = delete;
  ~ShardedGradients();

  // Where the gradient of a parameter goes; undefined for one of a unit that is not trainable.
  Tensor storage(const Parameter& p);
  void add_tokens(std::int64_t count);

  // The sweep's hooks: what the caller did wrong fails in prepare(), before any collective.
  // `reduce`: it is the last of a step; start() begins the reduction.
  void prepare(const Plan& plan, bool reduce);
  void start();
  void ready(const Parameter& p);
  void finish_accumulation();
  // After the sweep that reduces: waits, divides.
  void finish();
  // Instead of a sweep that reduces, for a rank without data: prepare_join(), start(), finish().
  // Without a live() rank nothing is reduced.
  void prepare_join();
  // This rank has gradients that were accumulated and not reduced.
  bool has_accumulated() const;
  // Gradients are absent again, on every rank.
  void zero();

  // Where the sweeps of ranks differ, units are sent when all have said that they are ready.
  void wait_for_all(bool on) { in_step_ = on; }
  void mark_unready(GatherWords& words) const;
  void launch_ready_on_all(const GatherWords& words);

  // Divides what has arrived meanwhile.
  void settle_arrived();
  // The unit's gradients are final on this rank.
  bool settled(std::size_t unit) const;

  // Whether any rank has used the parameter since the gradients were zero; once they agreed.
  bool used(std::size_t parameter) const;
  // [slice]; undefined when nothing of the unit was used.
  const Tensor& shard(std::size_t unit) const { return states_[unit].shard; }
  // Of the last reduction, in order of launch.
  const std::vector<std::size_t>& launched() const { return launched_; }
  std::int64_t tokens() const { return tokens_; }
  int live() const { return live_; }

 private:
  struct State {
    Tensor full, shard;
    Tensor sent, received;  // what travels when it is neither: compressed, or nodes of shards
    Pending pending;
    std::size_t left = 0;  // parameters that the sweep is to make ready
  };
  void launch_ready();
  void launch(std::size_t unit);
  void send(std::size_t unit);
  void settle_flight();
  void start_agreement();
  void finish_agreement();
  void fill_gaps(std::size_t unit);
  void expect_shard(bool last) const;
  void store_shard();
  void send_nodes(std::size_t unit);
  void settle_nodes(std::size_t unit);
  ShardPlaces shard_places() const { return {options_.shards, communicator_.size()}; }
  int next_shard() const { return shard_places().shard(communicator_.rank(), shards_done_); }
  double divisor() const;
  bool used_anywhere(std::size_t unit) const;
  void drop(std::size_t unit);

  Communicator& communicator_;
  const std::vector<Parameter*>& parameters_;
  const std::vector<ShardUnit>& units_;
  const ReducerOptions options_;
  struct Place {
    std::size_t unit, slot, parameter;
  };
  std::unordered_map<const Parameter*, Place> places_;
  std::vector<State> states_;
  std::vector<std::size_t> order_;  // of launching: trainable units
  std::vector<std::size_t> rank_in_order_;
  std::vector<char> touched_;  // by parameter: has had a contribution since zero()
  std::vector<char> written_;  // its part of `full` is its gradient
  std::unordered_map<const Parameter*, int> expected_;
  std::size_t next_ = 0;
  std::optional<std::size_t> flight_;
  std::vector<std::size_t> launched_;
  std::int64_t own_tokens_ = 0, tokens_ = 0;
  bool tokens_counted_ = false;
  int live_ = 0, shards_done_ = 0;
  ShardSums shard_sums_;
  Tensor words_;  // a hash, its complement, a word per rank, a bit per used parameter
  Pending agreement_;
  bool agreed_ = false, reducing_ = false, reduced_ = false, joining_ = false, in_step_ = false;
  std::int64_t step_ = 0;
};

}  // namespace reprise::distributed

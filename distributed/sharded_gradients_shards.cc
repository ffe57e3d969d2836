// Micro-batches that are shards of a global batch, where gradients are cut over ranks: the sums of
// reducer_shards.cc, of which each rank finishes its slice.
#include <utility>

#include "distributed/sharded_gradients.h"

namespace reprise::distributed {

void ShardedGradients::expect_shard(bool last) const {
  if (options_.shards > 0) {
    shard_places().expect_turn("sharding", shards_done_, last);
  }
}

// The sweep's gradients become a sum of their own, and the next sweep gets other memory.
void ShardedGradients::store_shard() {
  std::vector<Tensor> set;
  for (const std::size_t u : order_) {
    fill_gaps(u);
    set.push_back(states_[u].full);
    drop(u);
  }
  shard_sums_.push(next_shard(), std::move(set));
  std::vector<Tensor> next = shard_sums_.take_free();
  for (std::size_t i = 0; i < next.size(); ++i) {
    states_[order_[i]].full = std::move(next[i]);
  }
  ++shards_done_;
}

void ShardedGradients::send_nodes(std::size_t u) {
  State& state = states_[u];
  const Tag tag{"gradients", static_cast<int>(u)};
  const std::size_t taken = shard_sums_.complete(next_shard(), rank_in_order_[u], state.full);
  if (shard_places().one_node_each()) {
    state.pending = communicator_.reduce_scatter(state.full, state.shard, Reduce::sum, tag);
    return;
  }
  NodeRows rows = shard_sums_.rows(shard_places(), taken, rank_in_order_[u], state.full);
  state.sent = std::move(rows.sent);
  state.received = std::move(rows.received);
  state.pending = communicator_.all_gather(state.sent, state.received, tag);
}

void ShardedGradients::settle_nodes(std::size_t u) {
  const State& state = states_[u];
  if (state.received.defined()) {
    finish_shard_tree(shard_places(), {state.sent, state.received},
                      communicator_.rank() * units_[u].slice, state.shard);
  }
}

}  // namespace reprise::distributed

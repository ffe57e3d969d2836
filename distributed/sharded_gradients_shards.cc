// Micro-batches that are shards of a global batch, where gradients are cut over ranks: the sums of
// reducer_shards.cc, of which each rank finishes its slice.
#include <algorithm>
#include <bit>
#include <utility>

#include "distributed/sharded_gradients.h"

namespace reprise::distributed {

void ShardedGradients::expect_shard(bool last) const {
  if (options_.shards == 0 || last == (shards_done_ + 1 == shards_per_rank())) {
    return;
  }
  fail("sharding",
       "a rank has {} of {} shards: accumulate() for all but the last, backward() for that; this "
       "is {}() for shard {}",
       shards_per_rank(), options_.shards, last ? "backward" : "accumulate", shards_done_ + 1);
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

std::vector<ShardNode> ShardedGradients::nodes_of(int rank) const {
  return shard_nodes(rank * shards_per_rank(), (rank + 1) * shards_per_rank());
}

void ShardedGradients::send_nodes(std::size_t u) {
  State& state = states_[u];
  const Tag tag{"gradients", static_cast<int>(u)};
  const std::size_t taken = shard_sums_.complete(next_shard(), rank_in_order_[u], state.full);
  if (std::has_single_bit(static_cast<unsigned>(shards_per_rank()))) {
    state.pending = communicator_.reduce_scatter(state.full, state.shard, Reduce::sum, tag);
    return;
  }
  std::size_t rows = 0;  // the same on all ranks
  for (int r = 0; r < communicator_.size(); ++r) {
    rows = std::max(rows, nodes_of(r).size());
  }
  const auto& sums = shard_sums_.sums();
  const auto row_count = static_cast<std::int64_t>(rows);
  const Device device = state.full.device();
  state.sent =
      Tensor::zeros({row_count, state.full.numel()}, DType::f32, device, MemoryKind::communication);
  state.received = Tensor::empty({row_count * communicator_.size(), state.full.numel()}, DType::f32,
                                 device, MemoryKind::communication);
  const auto left = static_cast<std::int64_t>(sums.size() - taken);
  for (std::int64_t i = 0; i <= left; ++i) {
    const Tensor row = state.sent.slice(0, i, i + 1).reshape(state.full.shape());
    row.copy_from(i < left ? sums[static_cast<std::size_t>(i)].set[rank_in_order_[u]] : state.full);
  }
  state.pending = communicator_.all_gather(state.sent, state.received, tag);
}

void ShardedGradients::settle_nodes(std::size_t u) {
  State& state = states_[u];
  if (!state.received.defined()) {
    return;
  }
  const std::int64_t rows = state.sent.size(0), slice = units_[u].slice;
  const std::int64_t own = communicator_.rank() * slice;
  std::vector<ShardNode> where;
  std::vector<Tensor> nodes;
  for (int r = 0; r < communicator_.size(); ++r) {
    std::int64_t row = r * rows;
    for (const ShardNode& node : nodes_of(r)) {
      where.push_back(node);
      nodes.push_back(state.received.slice(0, row, row + 1)
                          .reshape({state.full.numel()})
                          .slice(0, own, own + slice));
      ++row;
    }
  }
  finish_shard_tree(where, nodes, options_.shards, state.shard);
}

}  // namespace reprise::distributed

// Micro-batches that are shards of a global batch.
#include <algorithm>
#include <bit>

#include "distributed/reducer.h"

namespace reprise::distributed {

void Reducer::expect_shard(bool last) const {
  if (options_.shards == 0) {
    return;
  }
  if (last != (shards_done_ + 1 == shards_per_rank())) {
    fail("reducer",
         "a rank has {} of {} shards: accumulate() for all but the last, backward() for that; this "
         "is {}() for shard {}",
         shards_per_rank(), options_.shards, last ? "backward" : "accumulate", shards_done_ + 1);
  }
  for (const Parameter* p : parameters_) {
    if (p->trainable() && p->has_gradient()) {
      fail("reducer", "with shards gradients must be zeroed before a step: {} has one", p->name());
    }
  }
}

// The sweep's gradients become a sum of their own, and the next sweep gets other memory.
void Reducer::store_shard() {
  std::vector<Tensor> set;
  for (std::size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].active) {
      if (states_[i].expected == 0) {
        slot_of(i).zero();
      }
      parameters_[i]->zero_gradient();
    }
  }
  for (BucketState& bucket : bucket_states_) {
    set.push_back(std::move(bucket.data));
  }
  shard_sums_.push(next_shard(), std::move(set));
  std::vector<Tensor> next = shard_sums_.take_free();
  if (next.empty() && !buckets_.empty()) {
    next = make_set();
    ++shard_sets_;
  }
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    bucket_states_[b].data = std::move(next[b]);
    for (const Bucket::Slot& slot : buckets_[b].slots) {
      parameters_[slot.parameter]->bind_gradient(slot_of(slot.parameter));
    }
  }
  ++shards_done_;
}

std::vector<ShardNode> Reducer::nodes_of(int rank) const {
  return shard_nodes(rank * shards_per_rank(), (rank + 1) * shards_per_rank());
}

void Reducer::launch_shards(std::size_t b) {
  BucketState& bucket = bucket_states_[b];
  const Tag tag{"gradients", static_cast<int>(b)};
  const std::size_t taken = shard_sums_.complete(next_shard(), b, bucket.data);
  if (std::has_single_bit(static_cast<unsigned>(shards_per_rank()))) {
    bucket.pending = communicator_.all_reduce(bucket.data, Reduce::sum, tag);
    return;
  }
  std::size_t rows = 0;  // the same on all ranks
  for (int r = 0; r < communicator_.size(); ++r) {
    rows = std::max(rows, nodes_of(r).size());
  }
  const auto& sums = shard_sums_.sums();
  const auto row_count = static_cast<std::int64_t>(rows);
  bucket.sent =
      Tensor::zeros({row_count, bucket.data.numel()}, DType::f32, cpu, MemoryKind::communication);
  bucket.gathered = Tensor::empty({row_count * communicator_.size(), bucket.data.numel()},
                                  DType::f32, cpu, MemoryKind::communication);
  const auto left = static_cast<std::int64_t>(sums.size() - taken);
  for (std::int64_t i = 0; i <= left; ++i) {
    const Tensor row = bucket.sent.slice(0, i, i + 1).reshape(bucket.data.shape());
    row.copy_from(i < left ? sums[static_cast<std::size_t>(i)].set[b] : bucket.data);
  }
  gathered_bytes_ = std::max(gathered_bytes_, bucket.sent.bytes() + bucket.gathered.bytes());
  bucket.pending = communicator_.all_gather(bucket.sent, bucket.gathered, tag);
}

void Reducer::settle_shards(std::size_t b) {
  BucketState& bucket = bucket_states_[b];
  if (!bucket.gathered.defined()) {
    return;
  }
  const std::int64_t rows = bucket.sent.size(0);
  std::vector<ShardNode> where;
  std::vector<Tensor> nodes;
  for (int r = 0; r < communicator_.size(); ++r) {
    std::int64_t row = r * rows;
    for (const ShardNode& node : nodes_of(r)) {
      where.push_back(node);
      nodes.push_back(bucket.gathered.slice(0, row, row + 1).reshape(bucket.data.shape()));
      ++row;
    }
  }
  finish_shard_tree(where, nodes, options_.shards, bucket.data);
}

std::int64_t Reducer::shard_bytes() const {
  std::int64_t set = 0;
  for (const Bucket& bucket : buckets_) {
    set += bucket.numel * static_cast<std::int64_t>(size_bytes(bucket.dtype));
  }
  return shard_sets_ * set + gathered_bytes_;
}

}  // namespace reprise::distributed

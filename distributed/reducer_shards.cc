// Micro-batches that are shards of a global batch.
#include <algorithm>
#include <utility>

#include "distributed/reducer.h"

namespace reprise::distributed {

void Reducer::expect_shard(bool last) const {
  if (options_.shards == 0) {
    return;
  }
  shard_places().expect_turn("reducer", shards_done_, last);
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

void Reducer::launch_shards(std::size_t b) {
  BucketState& bucket = bucket_states_[b];
  const Tag tag{"gradients", static_cast<int>(b)};
  const std::size_t taken = shard_sums_.complete(next_shard(), b, bucket.data);
  if (shard_places().one_node_each()) {
    bucket.pending = communicator_.all_reduce(bucket.data, Reduce::sum, tag);
    return;
  }
  NodeRows rows = shard_sums_.rows(shard_places(), taken, b, bucket.data);
  bucket.sent = std::move(rows.sent);
  bucket.gathered = std::move(rows.received);
  gathered_bytes_ = std::max(gathered_bytes_, bucket.sent.bytes() + bucket.gathered.bytes());
  bucket.pending = communicator_.all_gather(bucket.sent, bucket.gathered, tag);
}

void Reducer::settle_shards(std::size_t b) {
  BucketState& bucket = bucket_states_[b];
  if (bucket.gathered.defined()) {
    finish_shard_tree(shard_places(), {bucket.sent, bucket.gathered}, 0, bucket.data);
  }
}

std::int64_t Reducer::shard_bytes() const {
  std::int64_t set = 0;
  for (const Bucket& bucket : buckets_) {
    set += bucket.numel * static_cast<std::int64_t>(size_bytes(bucket.dtype));
  }
  return shard_sets_ * set + gathered_bytes_;
}

}  // namespace reprise::distributed

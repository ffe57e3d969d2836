#include "distributed/shard_sums.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "core/error.h"
#include "kernels/accumulate.h"

namespace reprise::distributed {
namespace {

// Whether the two are the halves of one node.
bool are_halves(const ShardNode& left, const ShardNode& right) {
  return left.count == right.count && left.first + left.count == right.first &&
         left.first % (2 * left.count) == 0;
}

class Finish {
 public:
  Finish(std::span<const ShardNode> where, std::span<const Tensor> nodes)
      : where_(where), nodes_(nodes) {}

  // The sum of shards [first, first + count), in one of the nodes' tensors.
  Tensor run(int first, int count) {
    if (next_ < where_.size() && where_[next_] == ShardNode{first, count}) {
      return nodes_[next_++];
    }
    ensure(count > 1, "shards: shard {} is in no node", first);
    const int left = static_cast<int>(std::bit_floor(static_cast<unsigned>(count) - 1));
    const Tensor a = run(first, left);
    const Tensor b = run(first + left, count - left);
    kernels::accumulate(a, b);
    return a;
  }

 private:
  std::span<const ShardNode> where_;
  std::span<const Tensor> nodes_;
  std::size_t next_ = 0;
};

}  // namespace

std::vector<ShardNode> shard_nodes(int first, int last) {
  std::vector<ShardNode> nodes;
  for (int shard = first; shard < last; ++shard) {
    ShardNode node{shard, 1};
    while (!nodes.empty() && are_halves(nodes.back(), node)) {
      node = {nodes.back().first, 2 * node.count};
      nodes.pop_back();
    }
    nodes.push_back(node);
  }
  return nodes;
}

void finish_shard_tree(std::span<const ShardNode> where, std::span<const Tensor> nodes, int shards,
                       const Tensor& out) {
  const Tensor sum = Finish(where, nodes).run(0, shards);
  if (!sum.shares_storage(out) || sum.offset() != out.offset()) {
    out.copy_from(sum);
  }
}

std::vector<ShardNode> ShardPlaces::nodes_of(int rank) const {
  return shard_nodes(shard(rank, 0), shard(rank, each()));
}

bool ShardPlaces::one_node_each() const {
  return std::has_single_bit(static_cast<unsigned>(each()));
}

void ShardPlaces::expect_turn(std::string_view who, int done, bool last) const {
  if (last != (done + 1 == each())) {
    fail(who,
         "a rank has {} of {} shards: accumulate() for all but the last, backward() for that; this "
         "is {}() for shard {}",
         each(), shards, last ? "backward" : "accumulate", done + 1);
  }
}

void finish_shard_tree(const ShardPlaces& places, const NodeRows& rows, std::int64_t first,
                       const Tensor& out) {
  const std::int64_t numel = rows.received.size(1);
  std::vector<ShardNode> where;
  std::vector<Tensor> nodes;
  for (int r = 0; r < places.ranks; ++r) {
    std::int64_t row = r * rows.sent.size(0);
    for (const ShardNode& node : places.nodes_of(r)) {
      where.push_back(node);
      nodes.push_back(rows.received.slice(0, row, row + 1)
                          .reshape({numel})
                          .slice(0, first, first + out.numel())
                          .reshape(out.shape()));
      ++row;
    }
  }
  finish_shard_tree(where, nodes, places.shards, out);
}

void ShardSums::push(int shard, std::vector<Tensor> set) {
  ShardNode node{shard, 1};
  while (!sums_.empty() && are_halves(sums_.back().node, node)) {
    Sum& left = sums_.back();
    for (std::size_t b = 0; b < set.size(); ++b) {
      kernels::accumulate(left.set[b], set[b]);
    }
    free_.push_back(std::exchange(set, std::move(left.set)));
    node = {left.node.first, 2 * node.count};
    sums_.pop_back();
  }
  sums_.push_back({node, std::move(set)});
}

std::size_t ShardSums::complete(int shard, std::size_t bucket, const Tensor& last) const {
  ShardNode node{shard, 1};
  std::size_t taken = 0;
  while (taken < sums_.size() && are_halves(sums_[sums_.size() - 1 - taken].node, node)) {
    const Sum& left = sums_[sums_.size() - 1 - taken++];
    kernels::accumulate(last, left.set[bucket]);
    node = {left.node.first, 2 * node.count};
  }
  return taken;
}

NodeRows ShardSums::rows(const ShardPlaces& places, std::size_t taken, std::size_t bucket,
                         const Tensor& last) const {
  std::size_t most = 0;  // the same on all ranks
  for (int r = 0; r < places.ranks; ++r) {
    most = std::max(most, places.nodes_of(r).size());
  }
  const auto count = static_cast<std::int64_t>(most);
  const Device device = last.device();
  NodeRows rows;
  rows.sent = Tensor::zeros({count, last.numel()}, DType::f32, device, MemoryKind::communication);
  rows.received = Tensor::empty({count * places.ranks, last.numel()}, DType::f32, device,
                                MemoryKind::communication);
  const auto left = static_cast<std::int64_t>(sums_.size() - taken);
  for (std::int64_t i = 0; i <= left; ++i) {
    const Tensor row = rows.sent.slice(0, i, i + 1).reshape(last.shape());
    row.copy_from(i < left ? sums_[static_cast<std::size_t>(i)].set[bucket] : last);
  }
  return rows;
}

std::vector<Tensor> ShardSums::take_free() {
  if (free_.empty()) {
    return {};
  }
  std::vector<Tensor> set = std::move(free_.back());
  free_.pop_back();
  return set;
}

void ShardSums::clear() {
  for (Sum& sum : sums_) {
    free_.push_back(std::move(sum.set));
  }
  sums_.clear();
}

void ShardSums::release() {
  sums_.clear();
  free_.clear();
}

}  // namespace reprise::distributed

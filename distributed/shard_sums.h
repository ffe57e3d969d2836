// Sums over the fixed shards of a global batch in one binary tree over shard numbers, wherever the
// shards are computed: the tree of rank_tree.h with shards for parts. Every number of ranks that
// divides the number of shards gives the same bits.
//
// A rank adds up its shards as they come, like a binary counter: two neighbours that make one node
// of the tree become that node. What is left are the largest nodes that lie in the rank's range.
// One, when shards a rank are a power of two; then the tree over ranks goes on as it is. Otherwise
// the ranks' nodes are gathered and every rank finishes the tree.
//
// Memory: besides the set of gradients that a sweep writes at most floor(log2(shards a rank)) more;
// when nodes are gathered, ranks * nodes copies of a bucket on the way.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/tensor.h"

namespace reprise::distributed {

// Shards [first, first + count): count a power of two that divides first.
struct ShardNode {
  int first = 0, count = 1;
  bool operator==(const ShardNode&) const = default;
};

// What is left of shards [first, last) when equal neighbours have been added, in order.
std::vector<ShardNode> shard_nodes(int first, int last);

// out = the sum of `shards` shards. nodes[i], of out's shape and f32, holds the sum of where[i];
// together they are all shards, in order. The nodes' elements are overwritten. `out` may be one of
// them.
void finish_shard_tree(std::span<const ShardNode> where, std::span<const Tensor> nodes, int shards,
                       const Tensor& out);

// The partial sums of one rank. A set is one tensor a bucket, f32.
class ShardSums {
 public:
  struct Sum {
    ShardNode node;
    std::vector<Tensor> set;
  };

  // The next sum of the rank's, a single shard: takes the tensors, adds up what makes a node.
  void push(int shard, std::vector<Tensor> set);
  // `last`, bucket b of the last shard, becomes the sum of the largest node that it completes.
  // Returns how many of sums() are part of it now.
  std::size_t complete(int shard, std::size_t bucket, const Tensor& last) const;
  const std::vector<Sum>& sums() const { return sums_; }
  // A set that was added to another, for the next sweep; empty when there is none.
  std::vector<Tensor> take_free();
  // Keeps the memory for the next step.
  void clear();
  // Forgets all memory.
  void release();

 private:
  std::vector<Sum> sums_;
  std::vector<std::vector<Tensor>> free_;
};

}  // namespace reprise::distributed

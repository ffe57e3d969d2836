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
#include <string_view>
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

// How the shards of a batch lie on ranks: rank r has [r * each(), (r + 1) * each()).
struct ShardPlaces {
  int shards = 0, ranks = 1;

  int each() const { return shards / ranks; }
  // Number `done` of a rank's own.
  int shard(int rank, int done) const { return rank * each() + done; }
  std::vector<ShardNode> nodes_of(int rank) const;
  // Whether every rank's shards make one node, so that the tree over ranks goes on.
  bool one_node_each() const;
  // Throws Error in the name of `who` when the sweep after `done` shards is of the wrong kind:
  // backward() is for the last of a rank's, accumulate() for those before.
  void expect_turn(std::string_view who, int done, bool last) const;
};

// What travels where a rank's shards make several nodes: its own, a row each, and those of all
// ranks, as many rows each (the most that one has).
struct NodeRows {
  Tensor sent, received;  // f32 [rows, numel], [rows * ranks, numel]
};

// out = elements [first, first + out.numel()) of the sum of all shards. The rows are overwritten.
void finish_shard_tree(const ShardPlaces& places, const NodeRows& rows, std::int64_t first,
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
  // Returns how many of the sums are part of it now.
  std::size_t complete(int shard, std::size_t bucket, const Tensor& last) const;
  // For what complete() made of `last`, which has taken `taken` of the sums: this rank's rows,
  // filled, and place for all.
  NodeRows rows(const ShardPlaces& places, std::size_t taken, std::size_t bucket,
                const Tensor& last) const;
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

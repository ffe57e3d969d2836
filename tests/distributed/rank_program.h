// Random data-parallel training runs: what a case draws, how a rank runs it, and what must come
// out, computed in one process without a reducer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "distributed/communicator.h"
#include "distributed/reducer.h"

namespace reprise::testing {

// A use of a parameter in a block; `branch` b > 1: only where (source + step) is divisible by b.
struct Use {
  enum class Kind { mul, add, mul_add, tanh, dropout, ignored } kind = Kind::mul;
  std::size_t parameter = 0, other = 0;
  bool second_half = false;  // of a parameter that is twice as long
  int branch = 1;
};

struct RankBlock {
  std::vector<Use> uses;
  int depth = 0;       // segments around it
  bool twice = false;  // the same block is run again on its own output
};

struct RankProgram {
  std::uint64_t seed = 0;
  int ranks = 1, steps = 2;
  std::int64_t width = 4;
  std::vector<bool> twice_as_long;  // by parameter
  std::vector<bool> frozen;         // parameter 0 never is
  int thaw_step = -1;               // from here on the frozen ones are trained and others are not
  std::vector<RankBlock> blocks;
  bool segment_around_all = false;
  std::vector<std::vector<int>> micro_batches;  // [rank][step]; 0: the rank has run out
  distributed::ReducerOptions options;
  bool zero = true;    // gradients before each step
  bool early = false;  // parameters are updated as their buckets arrive
  bool drop = true;    // segments keep nothing but their inputs
  int stage = 0;       // of sharding; 0: a reducer
  std::size_t gather_again = 0;
  std::string text() const;  // for a message

  bool trainable(std::size_t parameter, int step) const;
  int live(int step) const;
  // The data of a micro-batch: of a shard, or of a rank and its micro-batch.
  std::uint64_t source(int rank, int micro) const;
  std::int64_t tokens(std::uint64_t source, int step) const;
};

RankProgram draw_program(std::uint64_t seed);

using Values = std::vector<std::vector<float>>;  // by parameter; empty: absent
struct StepResult {
  Values gradients, parameters;  // after the reduction; after the update
};

// Sharded: without what sharding does not have.
RankProgram sharded(RankProgram program, int stage, std::size_t gather_again);

// What rank communicator.rank() of the program sees, step by step.
std::vector<StepResult> run_rank(const RankProgram& program,
                                 distributed::Communicator& communicator);
// The same without reducer and ranks: every rank's sweeps one after the other, added by the tree.
std::vector<StepResult> expected_of(const RankProgram& program);
// Gradients of step 0, every micro-batch swept into one gradient: the full batch in one process.
Values full_batch(const RankProgram& program);

// Empty when all is equal bit for bit.
std::string difference(const std::vector<StepResult>& a, const std::vector<StepResult>& b);

}  // namespace reprise::testing

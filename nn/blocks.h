// The one function that runs a stack of blocks. It opens a segment a block, "NAME.0", "NAME.1",
// ..., or, when the policies of the current tape say nested, segments nested by halves, "NAME.0-3"
// around "NAME.0-1" around "NAME.0": then O(log n) inputs of blocks are held at a time instead of
// n. A model's code has no other trace of checkpointing.
//
// Blocks at the beginning that need no gradient - their input has none, and nothing in them is
// trained: a frozen tower, the blocks before the first adapter - run outside of any segment and
// record nothing: their values live as long as they do without a tape. (What needs a gradient and
// comes into such a block by another way than x or its parameters is found, but not checkpointed.)
//
//   x = run_blocks("h", blocks, std::move(x), [&](Gpt2Block& block, Variable x) {
//     return block(std::move(x), batch);
//   });
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "autograd/variable.h"

namespace reprise::nn {

// Runs block i on x. Called once a block, in order.
using RunBlock = std::function<Variable(std::size_t i, Variable x)>;

// Whether a parameter of block i is trained.
using IsTrained = std::function<bool(std::size_t i)>;

Variable run_blocks(std::string_view name, std::size_t count, Variable x, const RunBlock& run,
                    const IsTrained& is_trained);

// The first `count` of blocks: anything with size() and [i]; what are no Modules counts as trained.
template <class Blocks, class Each>
Variable run_blocks(std::string_view name, Blocks& blocks, std::size_t count, Variable x,
                    Each&& each) {
  return run_blocks(
      name, count, std::move(x),
      [&](std::size_t i, Variable in) { return each(blocks[i], std::move(in)); },
      [&](std::size_t i) {
        if constexpr (requires { blocks[i].trainable_parameters(); }) {
          return !blocks[i].trainable_parameters().empty();
        } else {
          return true;
        }
      });
}
template <class Blocks, class Each>
Variable run_blocks(std::string_view name, Blocks& blocks, Variable x, Each&& each) {
  return run_blocks(name, blocks, blocks.size(), std::move(x), std::forward<Each>(each));
}

}  // namespace reprise::nn

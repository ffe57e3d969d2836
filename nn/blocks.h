// The one function that runs a stack of blocks. It opens a segment a block, "NAME.0", "NAME.1",
// ..., or, when the policies of the current tape say nested, segments nested by halves, "NAME.0-3"
// around "NAME.0-1" around "NAME.0": then O(log n) inputs of blocks are held at a time instead of
// n. A model's code has no other trace of checkpointing.
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

Variable run_blocks(std::string_view name, std::size_t count, Variable x, const RunBlock& run);

// blocks: anything with size() and [i].
template <class Blocks, class Each>
Variable run_blocks(std::string_view name, Blocks& blocks, Variable x, Each&& each) {
  return run_blocks(name, blocks.size(), std::move(x),
                    [&](std::size_t i, Variable in) { return each(blocks[i], std::move(in)); });
}

}  // namespace reprise::nn

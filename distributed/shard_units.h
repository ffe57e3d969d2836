// Which parameters are cut and gathered together, and where the ranks' slices are cut.
//
// A unit is what one segment reads: parameters that the same segments read (innermost ones, or
// stretches between segments) in a forward, of one dtype, trainable or not. So a block of a stack
// is a unit, an embedding another, and a weight that is tied over two places a third. What is read
// outside of segments (by a frozen tower, say, which opens none) is cut into units of at most what
// the largest segment reads, or one parameter. The values of a unit lie in one flat buffer of N *
// slice elements, N ranks; rank r's shard is [r * slice, (r + 1) * slice). No copy is needed to
// gather it, and at most a few elements are padding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "autograd/parameter.h"

namespace reprise::distributed {

// What one forward reads, in order, read by read.
struct ForwardReads {
  struct Read {
    std::size_t parameter;  // as numbered by the caller
    std::int64_t place;     // > 0: an innermost segment; otherwise a stretch between segments
    bool operator==(const Read&) const = default;
  };
  std::vector<Read> reads;
};

// Runs forward() on a tape of its own and notes what it reads of the parameters. Values are not
// needed, so that a model on meta serves for the one that is to be sharded: their parameters have
// the same numbers. Throws Error for a parameter that has a host.
ForwardReads record_reads(std::span<Parameter* const> parameters,
                          const std::function<void()>& forward);

struct ShardUnit {
  struct Slot {
    std::size_t parameter;
    std::int64_t offset, numel;  // elements of the flat buffer; starts at multiples of 64 bytes
  };
  DType dtype = DType::f32, grad_dtype = DType::f32;
  bool trainable = true;
  std::int64_t slice = 0;  // elements of a rank's shard
  std::vector<Slot> slots;

  // Where rank's shard has elements of the slot, counted from the slot's first; empty: first >=
  // second.
  std::pair<std::int64_t, std::int64_t> part_of(const Slot& slot, int rank) const;
};

// Places slots of these sizes over `ranks` slices; their order stays. A slot is cut only at
// multiples of kernels::kBlockElements from its start, so that sums over a slot can be put together
// from its parts bit by bit; one that is shorter is not cut. Returns the elements of a slice.
std::int64_t place_slots(std::vector<ShardUnit::Slot>& slots, int ranks, DType dtype);

// Units in the order of their first read; what is not read comes last.
std::vector<ShardUnit> shard_units(std::span<Parameter* const> parameters,
                                   const ForwardReads& reads, int ranks);

// The order in which a forward reads the units: one after the other, repeats in a row left out.
std::vector<std::size_t> unit_order(const std::vector<ShardUnit>& units, const ForwardReads& reads);

}  // namespace reprise::distributed

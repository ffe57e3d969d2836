// The norm of gradients that are cut over ranks, with the bits of nn::global_norm: a tensor's sum
// of squares is that of its chunks, a chunk's that of its blocks, and slices are cut between
// blocks.
#include <algorithm>
#include <cmath>

#include "distributed/sharding.h"
#include "kernels/reduce.h"
#include "nn/optimizer/clip.h"

namespace reprise::distributed {
namespace {

using kernels::kBlockElements;
using kernels::kChunkElements;

// Calls f(begin, end, ends_chunk) for each stretch whose sum of squares one rank can make: chunks
// that lie in one slice, and the blocks of those that are cut.
template <class F>
void each_stretch(const ShardUnit& unit, const ShardUnit::Slot& slot, F&& f) {
  for (std::int64_t begin = 0; begin < slot.numel; begin += kChunkElements) {
    const std::int64_t end = std::min(begin + kChunkElements, slot.numel);
    const std::int64_t at = slot.offset + begin;
    if (at / unit.slice == (slot.offset + end - 1) / unit.slice) {
      f(begin, end, true);
      continue;
    }
    for (std::int64_t block = begin; block < end; block += kBlockElements) {
      const std::int64_t block_end = std::min(block + kBlockElements, end);
      f(block, block_end, block_end == end);
    }
  }
}

}  // namespace

double Sharding::norm_of_parts() const {
  std::vector<Tensor> stretches;      // those of this rank
  std::vector<std::int64_t> numbers;  // their places in the list of all
  std::int64_t count = 0;
  const auto each_parameter = [&](auto&& f) {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const auto found = slots_.find(parameters_[i]);
      if (found != slots_.end() && units_[found->second.unit].trainable && used(i)) {
        const ShardUnit& unit = units_[found->second.unit];
        f(found->second.unit, unit, unit.slots[found->second.slot]);
      }
    }
  };
  each_parameter([&](std::size_t u, const ShardUnit& unit, const ShardUnit::Slot& slot) {
    const std::int64_t own = communicator_.rank() * unit.slice;
    each_stretch(unit, slot, [&](std::int64_t begin, std::int64_t end, bool) {
      const std::int64_t at = slot.offset + begin - own;
      if (at >= 0 && at < unit.slice) {
        stretches.push_back(gradients_->shard(u).slice(0, at, at + end - begin));
        numbers.push_back(count);
      }
      ++count;
    });
  });
  const Device device = stretches.empty() ? cpu : stretches[0].device();
  const Tensor own =
      Tensor::empty({std::ssize(stretches)}, DType::f64, device, MemoryKind::workspace);
  kernels::squared_norms(stretches, own);
  if (own.is_meta()) {
    return 0;
  }
  const std::vector<double> squares = own.to_vector<double>();
  const Tensor all = Tensor::zeros({count}, DType::f64, cpu, MemoryKind::communication);
  for (std::size_t i = 0; i < squares.size(); ++i) {
    all.data<double>()[numbers[i]] = squares[i];
  }
  // Each has one term that is not zero: the sums are exact.
  communicator_.all_reduce(all, Reduce::sum, {"squares of gradients"}).wait();
  const double* next = all.data<double>();
  double total = 0;
  each_parameter([&](std::size_t, const ShardUnit& unit, const ShardUnit::Slot& slot) {
    double tensor = 0, chunk = 0;
    each_stretch(unit, slot, [&](std::int64_t, std::int64_t, bool ends_chunk) {
      chunk += *next++;
      if (ends_chunk) {
        tensor += chunk;
        chunk = 0;
      }
    });
    total += tensor;
  });
  return std::sqrt(total);
}

double Sharding::global_norm() {
  if (update_) {
    fail("sharding",
         "with an early update the gradients are used before their norm is known: clip by it, or "
         "update early");
  }
  if (gradients_ != nullptr) {
    return norm_of_parts();
  }
  std::vector<Parameter*> trainable;
  std::ranges::copy_if(parameters_, std::back_inserter(trainable), &Parameter::trainable);
  return nn::global_norm(trainable);
}

}  // namespace reprise::distributed

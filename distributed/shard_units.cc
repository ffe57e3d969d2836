#include "distributed/shard_units.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>

#include "autograd/tape.h"
#include "kernels/reduce_blocks.h"

namespace reprise::distributed {
namespace {

class Recorder final : public ParameterHost {
 public:
  explicit Recorder(std::span<Parameter* const> parameters) : parameters_(parameters) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (parameters[i]->host() != nullptr) {
        fail("record_reads", "parameter {} is sharded already", parameters[i]->name());
      }
    }
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      index_.emplace(parameters[i], i);
      parameters[i]->set_host(this);
    }
  }
  ~Recorder() override {
    for (Parameter* p : parameters_) {
      p->set_host(nullptr);
    }
  }
  void before_read(const Parameter& p) override {
    const Tape* const tape = Tape::current();
    std::int64_t place = 0;
    if (tape != nullptr) {
      place = tape->open_segment() > 0 ? tape->open_segment() : -tape->report().segments;
    }
    const ForwardReads::Read read{index_.at(&p), place};
    if (result.reads.empty() || result.reads.back() != read) {
      result.reads.push_back(read);
    }
  }
  Tensor gradient_storage(const Parameter&) override { return {}; }

  ForwardReads result;

 private:
  std::span<Parameter* const> parameters_;
  std::unordered_map<const Parameter*, std::size_t> index_;
};

std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// The offset of a slot that may start at `at`; -1 when slices of this size cannot be cut as it
// must be.
std::int64_t offset_from(std::int64_t at, std::int64_t numel, std::int64_t slice) {
  const std::int64_t border = (at / slice + 1) * slice;
  if (at + numel <= border) {
    return at;
  }
  if (numel <= kernels::kBlockElements) {
    return numel <= slice ? border : -1;
  }
  const std::int64_t whole_blocks = (border - at) / kernels::kBlockElements;
  const std::int64_t offset = border - whole_blocks * kernels::kBlockElements;
  const bool second_border = offset + numel > border + slice;
  return second_border && slice % kernels::kBlockElements != 0 ? -1 : offset;
}

bool place(std::vector<ShardUnit::Slot>& slots, int ranks, std::int64_t slice, std::int64_t align) {
  std::int64_t at = 0;
  for (ShardUnit::Slot& slot : slots) {
    slot.offset = offset_from(round_up(at, align), slot.numel, slice);
    at = slot.offset + slot.numel;
    if (slot.offset < 0 || at > ranks * slice) {
      return false;
    }
  }
  return true;
}

bool in_segment(const std::vector<std::int64_t>& places) {
  return std::ranges::any_of(places, [](std::int64_t place) { return place > 0; });
}

// Elements that one segment reads alone, at most; without segments, the largest parameter's.
std::int64_t largest_segment(std::span<Parameter* const> parameters,
                             const std::vector<std::vector<std::int64_t>>& places) {
  std::map<std::int64_t, std::int64_t> elements;
  std::int64_t largest = 0;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const std::int64_t numel = parameters[i]->shape().numel();
    if (places[i].size() == 1 && in_segment(places[i])) {
      elements[places[i][0]] += numel;
    }
    largest = std::max(largest, numel);
  }
  for (const auto& [place, of_segment] : elements) {
    largest = place == elements.begin()->first ? of_segment : std::max(largest, of_segment);
  }
  return largest;
}

}  // namespace

ForwardReads record_reads(std::span<Parameter* const> parameters,
                          const std::function<void()>& forward) {
  Recorder recorder(parameters);
  Tape tape;
  const Tape::Scope scope(tape);
  forward();
  return std::move(recorder.result);
}

std::pair<std::int64_t, std::int64_t> ShardUnit::part_of(const Slot& slot, int rank) const {
  const std::int64_t first = rank * slice - slot.offset;
  return {std::max<std::int64_t>(first, 0), std::min(first + slice, slot.numel)};
}

std::int64_t place_slots(std::vector<ShardUnit::Slot>& slots, int ranks, DType dtype) {
  const auto align = static_cast<std::int64_t>(64 / size_bytes(dtype));
  std::int64_t total = 0;
  for (const ShardUnit::Slot& slot : slots) {
    total += round_up(slot.numel, align);
  }
  std::int64_t slice = std::max(align, round_up((total + ranks - 1) / ranks, align));
  // Every size is tried up to a whole number of blocks, with which all slots can be cut.
  while (!place(slots, ranks, slice, align)) {
    slice += slice % kernels::kBlockElements == 0 ? kernels::kBlockElements : align;
  }
  return slice;
}

std::vector<ShardUnit> shard_units(std::span<Parameter* const> parameters,
                                   const ForwardReads& reads, int ranks) {
  std::vector<std::vector<std::int64_t>> places(parameters.size());
  std::vector<std::size_t> order;
  for (const ForwardReads::Read& read : reads.reads) {
    if (read.parameter >= parameters.size()) {
      fail("sharding", "the reads name parameter {} of {}", read.parameter, parameters.size());
    }
    auto& of = places[read.parameter];
    if (of.empty()) {
      order.push_back(read.parameter);
    }
    if (std::ranges::find(of, read.place) == of.end()) {
      of.push_back(read.place);
    }
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (places[i].empty()) {
      order.push_back(i);
    }
  }
  const std::int64_t limit = largest_segment(parameters, places);
  using Key = std::tuple<std::vector<std::int64_t>, DType, DType, bool>;
  struct Group {
    std::size_t unit = 0;
    std::int64_t elements = 0;
  };
  std::map<Key, Group> groups;
  std::vector<ShardUnit> units;
  for (const std::size_t i : order) {
    const Parameter& p = *parameters[i];
    const std::int64_t elements = p.shape().numel();
    const auto [found, fresh] =
        groups.try_emplace(Key{places[i], p.dtype(), p.grad_dtype(), p.trainable()});
    Group& group = found->second;
    const bool full = !in_segment(places[i]) && group.elements + elements > limit;
    if (fresh || full) {
      group = {units.size(), 0};
      units.push_back({p.dtype(), p.grad_dtype(), p.trainable(), 0, {}});
    }
    group.elements += elements;
    units[group.unit].slots.push_back({i, 0, elements});
  }
  for (ShardUnit& unit : units) {
    std::ranges::sort(unit.slots, {}, &ShardUnit::Slot::parameter);
    unit.slice = place_slots(unit.slots, ranks, unit.dtype);
  }
  return units;
}

std::vector<std::size_t> unit_order(const std::vector<ShardUnit>& units,
                                    const ForwardReads& reads) {
  std::unordered_map<std::size_t, std::size_t> unit_of;
  for (std::size_t u = 0; u < units.size(); ++u) {
    for (const ShardUnit::Slot& slot : units[u].slots) {
      unit_of[slot.parameter] = u;
    }
  }
  std::vector<std::size_t> order;
  for (const ForwardReads::Read& read : reads.reads) {
    if (const std::size_t u = unit_of.at(read.parameter); order.empty() || order.back() != u) {
      order.push_back(u);
    }
  }
  return order;
}

}  // namespace reprise::distributed

#include "distributed/sharded_values.h"

#include <algorithm>

namespace reprise::distributed {

ShardedValues::ShardedValues(Communicator& communicator, const std::vector<Parameter*>& parameters,
                             const std::vector<ShardUnit>& units, std::vector<std::size_t> order)
    : communicator_(communicator),
      parameters_(parameters),
      units_(units),
      states_(units.size()),
      forward_order_(std::move(order)) {
  for (std::size_t u = 0; u < units.size(); ++u) {
    const ShardUnit& unit = units[u];
    const Device device = parameters[unit.slots[0].parameter]->value().device();
    Tensor& shard = states_[u].shard;
    shard = Tensor::empty({unit.slice}, unit.dtype, device, MemoryKind::parameters);
    shard.zero();
    for (const ShardUnit::Slot& slot : unit.slots) {
      Parameter& p = *parameters[slot.parameter];
      unit_of_[&p] = u;
      const auto [first, last] = unit.part_of(slot, communicator.rank());
      if (first < last && p.value().has_storage()) {
        const std::int64_t at = slot.offset + first - communicator.rank() * unit.slice;
        shard.slice(0, at, at + last - first)
            .copy_from(p.value().contiguous().reshape({slot.numel}).slice(0, first, last));
      }
      p.release_value();
    }
  }
}

void ShardedValues::before_read(const Parameter& p) {
  const std::size_t unit = unit_of_.at(&p);
  if (unit != current_) {
    move_to(unit);
  }
}

// The place after its next occurrence; a forward that begins anew starts at the front.
std::size_t ShardedValues::find_next(std::size_t unit, const std::vector<std::size_t>& order) {
  const auto after = order.begin() + static_cast<std::ptrdiff_t>(next_);
  auto found = std::find(after, order.end(), unit);
  if (found == order.end() && !sweeping_) {
    found = std::find(order.begin(), after, unit);
    if (found == after) {
      return next_;  // not foreseen
    }
  }
  return found == order.end() ? next_ : static_cast<std::size_t>(found - order.begin()) + 1;
}

void ShardedValues::move_to(std::size_t unit) {
  const std::vector<std::size_t>& order = sweeping_ ? sweep_order_ : forward_order_;
  next_ = find_next(unit, order);
  current_ = unit;
  if (!sweeping_) {
    seen_.push_back(unit);
    const auto after = order.begin() + static_cast<std::ptrdiff_t>(next_);
    for (std::size_t u = 0; u < states_.size(); ++u) {
      if (u != unit && states_[u].resident && std::find(after, order.end(), u) == order.end()) {
        release(u);
      }
    }
  }
  if (!gathered(states_[unit])) {
    launch(unit, false);
  }
  make_resident(unit);
  look_ahead();
}

void ShardedValues::launch(std::size_t unit, bool ahead) {
  State& state = states_[unit];
  const std::int64_t elements = units_[unit].slice * communicator_.size();
  state.full =
      Tensor::empty({elements}, units_[unit].dtype, state.shard.device(), MemoryKind::parameters);
  state.pending =
      communicator_.all_gather(state.shard, state.full, {"parameters", static_cast<int>(unit)});
  gathers_.push_back({unit, sweeping_, ahead});
}

void ShardedValues::make_resident(std::size_t unit) {
  State& state = states_[unit];
  if (std::exchange(state.resident, true)) {
    return;
  }
  state.pending.wait();
  for (const ShardUnit::Slot& slot : units_[unit].slots) {
    Parameter& p = *parameters_[slot.parameter];
    p.restore_value(state.full.slice(0, slot.offset, slot.offset + slot.numel).reshape(p.shape()));
  }
}

void ShardedValues::release(std::size_t unit) {
  State& state = states_[unit];
  state.pending.wait();
  if (std::exchange(state.resident, false)) {
    for (const ShardUnit::Slot& slot : units_[unit].slots) {
      parameters_[slot.parameter]->release_value();
    }
  }
  state.full = Tensor();
  current_ = current_ == unit ? kNone : current_;
}

// The next unit that is not here is sent for, unless one is under way already.
void ShardedValues::look_ahead() {
  for (const State& state : states_) {
    if (gathered(state) && !state.resident) {
      return;
    }
  }
  const std::vector<std::size_t>& order = sweeping_ ? sweep_order_ : forward_order_;
  for (std::size_t i = next_; i < order.size(); ++i) {
    const State& state = states_[order[i]];
    if (!gathered(state) && (!sweeping_ || !state.still.empty())) {
      launch(order[i], true);
      return;
    }
  }
}

void ShardedValues::begin_sweep(const Plan& plan) {
  if (!seen_.empty()) {
    forward_order_ = std::exchange(seen_, {});  // the next forward is likely to be the same
  }
  sweep_order_.clear();
  sweep_reads_left_ = 0;
  for (State& state : states_) {
    state.still.clear();
  }
  for (Parameter* p : plan.reads) {
    const auto found = unit_of_.find(p);
    if (found == unit_of_.end()) {
      continue;
    }
    State& state = states_[found->second];
    if (std::ranges::find(state.still, p) == state.still.end()) {
      state.still.push_back(p);
      ++sweep_reads_left_;
    }
    if (sweep_order_.empty() || sweep_order_.back() != found->second) {
      sweep_order_.push_back(found->second);
    }
  }
  next_ = 0;
  current_ = kNone;
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (gathered(states_[u]) && states_[u].still.empty()) {
      release(u);
    }
  }
  sweeping_ = sweep_reads_left_ > 0;
  if (sweeping_) {
    look_ahead();
  }
}

void ShardedValues::last_read(const Parameter& p) {
  const auto unit = unit_of_.find(&p);
  if (!sweeping_ || unit == unit_of_.end()) {
    return;
  }
  State& state = states_[unit->second];
  if (std::erase(state.still, &p) == 0) {
    return;
  }
  if (state.still.empty() && gathered(state)) {
    release(unit->second);
  }
  if (--sweep_reads_left_ == 0) {
    end();
  }
}

void ShardedValues::end() {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (gathered(states_[u])) {
      release(u);
    }
  }
  seen_.clear();
  sweeping_ = false;
  next_ = 0;
  current_ = kNone;
}

}  // namespace reprise::distributed

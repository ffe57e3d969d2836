#include "distributed/sharded_values.h"

#include <algorithm>

#include "distributed/hash.h"

namespace reprise::distributed {

ShardedValues::ShardedValues(Communicator& communicator, const std::vector<Parameter*>& parameters,
                             const std::vector<ShardUnit>& units, std::vector<std::size_t> order,
                             ShardedGradients& gradients, std::size_t again)
    : communicator_(communicator),
      parameters_(parameters),
      units_(units),
      gradients_(gradients),
      again_(again),
      states_(units.size()),
      foreseen_(std::move(order)) {
  for (const std::size_t u : foreseen_) {
    if (std::ranges::find(list_, u) == list_.end()) {
      list_.push_back(u);
    }
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    index_of_[parameters[i]] = i;
  }
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
    sweeping_ ? read_in_sweep(unit) : read_in_forward(unit);
  }
}

// The place after its next occurrence; a forward that begins anew starts at the front.
std::size_t ShardedValues::find_next(std::size_t unit,
                                     const std::vector<std::size_t>& order) const {
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

void ShardedValues::launch(std::size_t unit, bool ahead) {
  State& state = states_[unit];
  const std::int64_t elements = units_[unit].slice * communicator_.size();
  state.full =
      Tensor::empty({elements}, units_[unit].dtype, state.shard.device(), MemoryKind::parameters);
  state.pending =
      communicator_.all_gather(state.shard, state.full, {"parameters", static_cast<int>(unit)});
  gathers_.push_back({unit, sweeping_ || !over_, ahead});
}

// In a gather that this rank does not need.
void ShardedValues::take_part(std::size_t unit) {
  const Tensor full = Tensor::empty({units_[unit].slice * communicator_.size()}, units_[unit].dtype,
                                    states_[unit].shard.device(), MemoryKind::parameters);
  communicator_.all_gather(states_[unit].shard, full, {"parameters", static_cast<int>(unit)})
      .wait();
  gathers_.push_back({unit, sweeping_ || !over_, false});
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

void ShardedValues::release_all() {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (here(u)) {
      release(u);
    }
  }
  current_ = kNone;
}

// What decides in which order a sweep gathers and reduces.
std::uint64_t ShardedValues::hash_of(const Plan& plan) const {
  Hash hash;
  const auto add = [&](std::int64_t x) { hash.add(static_cast<std::uint64_t>(x)); };
  const auto index = [&](const Parameter* p) {
    const auto found = index_of_.find(p);
    return found == index_of_.end() ? -1 : static_cast<std::int64_t>(found->second);
  };
  for (std::size_t u = 0; u < states_.size(); ++u) {
    add(states_[u].resident ? 1 : 0);
  }
  for (const Parameter* p : plan.reads) {
    add(index(p));
  }
  add(-2);
  for (const Ready& ready : plan.order) {
    add(index(ready.parameter));
    add(ready.last_read);
  }
  add(-2);
  for (const Contribution& contribution : plan.contributions()) {
    add(index(contribution.parameter));
    add(contribution.record);
  }
  return hash.value();
}

AfterForward ShardedValues::begin_sweep(const Plan& plan, AfterForward kind) {
  const std::uint64_t hash = hash_of(plan);
  // All ranks have data, or the words say so.
  const GatherWords words = *finish_forward(kind, hash);
  in_step_ = !words.same(GatherWords::Of::plan) || words.has(GatherWords::joins);
  next_ = 0;
  sweep_order_.clear();
  sweep_reads_left_ = 0;
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
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (here(u) && states_[u].still.empty()) {
      release(u);
    }
  }
  sweeping_ = sweep_reads_left_ > 0;
  over_ = false;
  return kind_of(words);
}

void ShardedValues::start_sweep() {
  if (sweeping_ && !in_step_) {
    look_ahead_in_sweep();
  }
}

void ShardedValues::read_in_sweep(std::size_t unit) {
  next_ = find_next(unit, sweep_order_);
  current_ = unit;
  if (again_ > 0) {
    release_until_later(unit);
  }
  if (!here(unit)) {
    in_step_ ? ask_in_sweep(unit) : launch(unit, false);
  }
  make_resident(unit);
  if (!in_step_) {
    look_ahead_in_sweep();
  }
}

// What the next `again_` other units of the sweep's order do not include.
void ShardedValues::release_until_later(std::size_t reading) {
  std::vector<std::size_t> soon;
  for (std::size_t i = next_; i < sweep_order_.size() && soon.size() < again_; ++i) {
    if (sweep_order_[i] != reading && std::ranges::find(soon, sweep_order_[i]) == soon.end()) {
      soon.push_back(sweep_order_[i]);
    }
  }
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (u != reading && states_[u].resident && std::ranges::find(soon, u) == soon.end()) {
      release(u);
    }
  }
}

// The next unit that is not here is sent for, unless one is under way already.
void ShardedValues::look_ahead_in_sweep() {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (here(u) && !states_[u].resident) {
      return;
    }
  }
  for (std::size_t i = next_; i < sweep_order_.size(); ++i) {
    const std::size_t unit = sweep_order_[i];
    if (!here(unit) && !states_[unit].still.empty()) {
      launch(unit, true);
      return;
    }
  }
}

// One meeting of the ranks: what any of them needs is gathered, what all have ready is reduced.
void ShardedValues::meet(std::size_t wanted) {
  GatherWords words(states_.size());
  if (wanted != kNone) {
    words.want(wanted);
    words.set(GatherWords::sweeps);
  }
  gradients_.mark_unready(words);
  words.exchange(communicator_, "gathers of sweeps that differ").wait();
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (!words.wanted(u)) {
      continue;
    }
    if (here(u) || states_[u].still.empty()) {
      take_part(u);
    } else {
      launch(u, false);
    }
  }
  gradients_.launch_ready_on_all(words);
  over_ = !words.has(GatherWords::sweeps);
}

void ShardedValues::ask_in_sweep(std::size_t unit) {
  while (!here(unit)) {
    meet(unit);
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
  if (state.still.empty() && here(unit->second)) {
    release(unit->second);
  }
  if (--sweep_reads_left_ == 0) {
    sweeping_ = false;
    release_all();
  }
}

void ShardedValues::end_sweep() {
  while (in_step_ && !over_) {
    meet(kNone);
  }
  over_ = true;
  sweeping_ = in_step_ = false;
  for (State& state : states_) {
    state.still.clear();
  }
  next_ = 0;
  release_all();
}

}  // namespace reprise::distributed

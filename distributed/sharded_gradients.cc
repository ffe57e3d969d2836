#include "distributed/sharded_gradients.h"

#include <algorithm>
#include <ranges>

#include "core/parallel.h"
#include "distributed/disagreement.h"
#include "kernels/reduce.h"

namespace reprise::distributed {
namespace {

void divide(const Tensor& data, double divisor) {
  if (divisor == 1.0 || data.is_meta()) {
    return;
  }
  if (data.device().kind == DeviceKind::cuda) {
    return kernels::scale_all({&data, 1}, 1 / divisor);
  }
  const auto by = static_cast<float>(divisor);
  const auto each = [&](auto* x, auto&& f) {
    parallel_for(data.numel(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      std::transform(x + begin, x + end, x + begin, f);
    });
  };
  if (data.dtype() == DType::f32) {
    each(data.data<float>(), [by](float x) { return x / by; });
  } else {
    each(data.data<bfloat16>(), [by](bfloat16 x) { return to_bfloat16(to_float(x) / by); });
  }
}

void drop_gradient(Parameter& p) {
  p.zero_gradient();
  p.unbind_gradient();
}

}  // namespace

ShardedGradients::ShardedGradients(Communicator& communicator,
                                   const std::vector<Parameter*>& parameters,
                                   const std::vector<ShardUnit>& units, double divisor)
    : communicator_(communicator),
      parameters_(parameters),
      units_(units),
      divisor_(divisor != 0 ? divisor : static_cast<double>(communicator.size())),
      states_(units.size()),
      touched_(parameters.size()) {
  for (std::size_t u = units.size(); u-- > 0;) {
    if (!units[u].trainable) {
      continue;
    }
    order_.push_back(u);
    for (std::size_t s = 0; s < units[u].slots.size(); ++s) {
      const std::size_t i = units[u].slots[s].parameter;
      places_[parameters[i]] = {u, s, i};
    }
  }
}

ShardedGradients::~ShardedGradients() {
  for (const auto& [p, place] : places_) {
    drop_gradient(*const_cast<Parameter*>(p));
  }
}

Tensor ShardedGradients::storage(const Parameter& p) {
  const auto found = places_.find(&p);
  if (found == places_.end()) {
    return {};
  }
  const Place& place = found->second;
  const ShardUnit& unit = units_[place.unit];
  Tensor& full = states_[place.unit].full;
  if (!full.defined()) {
    full = Tensor::empty({unit.slice * communicator_.size()}, unit.grad_dtype, p.value().device(),
                         MemoryKind::gradients);
  }
  const ShardUnit::Slot& slot = unit.slots[place.slot];
  return full.slice(0, slot.offset, slot.offset + slot.numel).reshape(p.shape());
}

void ShardedGradients::begin_sweep(const Plan& plan, bool reduce) {
  if (reduced_) {
    fail("sharding", "the gradients of step {} are there still: zero_gradients() first", step_);
  }
  if (reducing_) {
    fail("sharding", "finish() was not called after the backward of step {}, or that one failed",
         step_);
  }
  for (State& state : states_) {
    state.left = 0;
  }
  expected_.clear();
  for (const Ready& ready : plan.order) {
    if (ready.expected == 0) {
      continue;
    }
    const auto found = places_.find(ready.parameter);
    if (found == places_.end()) {
      fail("sharding",
           "the losses reach parameter {}, which was not trainable, or not in the list, when the "
           "sharding was made",
           ready.parameter->name());
    }
    expected_[ready.parameter] = ready.expected;
    touched_[found->second.parameter] = 1;
    ++states_[found->second.unit].left;
  }
  reducing_ = reduce;
  if (reduce) {
    next_ = 0;
    launched_.clear();
    start_agreement();
  }
}

void ShardedGradients::start_agreement() {
  words_ = Tensor::zeros({3 + (std::ssize(parameters_) + 63) / 64}, DType::i64, cpu,
                         MemoryKind::communication);
  auto* const words = words_.data<std::int64_t>();
  words[0] = step_;
  words[1] = ~step_;
  for (std::size_t i = 0; i < touched_.size(); ++i) {
    if (touched_[i] != 0) {
      words[2 + i / 64] |= std::int64_t{1} << (i % 64);
    }
  }
  agreed_ = false;
  agreement_ = communicator_.agree(words_, {"used parameters of a sharded step"});
}

void ShardedGradients::finish_agreement() {
  if (std::exchange(agreed_, true)) {
    return;
  }
  agreement_.wait();
  if (words_.data<std::int64_t>()[0] != ~words_.data<std::int64_t>()[1]) {
    const std::string why =
        fmt::format("[sharding] ranks disagree about the step; this one is at step {}", step_);
    communicator_.abort(why);
    throw CommunicatorError(why);
  }
}

bool ShardedGradients::used(std::size_t parameter) const {
  return (words_.data<std::int64_t>()[2 + parameter / 64] >> (parameter % 64) & 1) != 0;
}

bool ShardedGradients::used_anywhere(std::size_t unit) const {
  return std::ranges::any_of(units_[unit].slots,
                             [&](const ShardUnit::Slot& slot) { return used(slot.parameter); });
}

void ShardedGradients::ready(const Parameter& p) {
  if (!reducing_ || !expected_.contains(&p)) {
    return;
  }
  State& state = states_[places_.at(&p).unit];
  ensure(state.left > 0, "sharding: parameter {} became ready once more than announced", p.name());
  --state.left;
  launch_ready();
}

void ShardedGradients::launch_ready() {
  while (next_ < order_.size() && states_[order_[next_]].left == 0) {
    finish_agreement();
    const std::size_t unit = order_[next_++];
    if (used_anywhere(unit)) {
      launch(unit);
    }
  }
}

void ShardedGradients::launch(std::size_t u) {
  settle_flight();
  const ShardUnit& unit = units_[u];
  State& state = states_[u];
  (void)storage(*parameters_[unit.slots[0].parameter]);
  // Padding too is defined, and what this rank did not use is zero.
  std::int64_t end = 0;
  for (const ShardUnit::Slot& slot : unit.slots) {
    state.full.slice(0, end, slot.offset).zero();
    end = slot.offset + slot.numel;
    if (touched_[slot.parameter] == 0) {
      state.full.slice(0, slot.offset, end).zero();
    }
  }
  state.full.slice(0, end, state.full.numel()).zero();
  state.shard =
      Tensor::empty({unit.slice}, unit.grad_dtype, state.full.device(), MemoryKind::gradients);
  state.pending = communicator_.reduce_scatter(state.full, state.shard, Reduce::sum,
                                               {"gradients", static_cast<int>(u)});
  flight_ = u;
  launched_.push_back(u);
}

void ShardedGradients::settle_flight() {
  if (!flight_) {
    return;
  }
  State& state = states_[*flight_];
  state.pending.wait();
  for (const ShardUnit::Slot& slot : units_[*flight_].slots) {
    drop_gradient(*parameters_[slot.parameter]);
  }
  state.full = Tensor();
  divide(state.shard, divisor_);
  flight_.reset();
}

void ShardedGradients::finish() {
  if (!reducing_) {
    fail("sharding", "finish() belongs after a backward with the options of attach()");
  }
  for (const std::size_t u : order_) {
    ensure(states_[u].left == 0, "sharding: {} parameters of unit {} did not become ready",
           states_[u].left, u);
  }
  launch_ready();
  finish_agreement();
  settle_flight();
  reducing_ = false;
  reduced_ = true;
  ++step_;
}

void ShardedGradients::zero() {
  for (State& state : states_) {
    state.shard = state.full = Tensor();
  }
  for (const auto& [p, place] : places_) {
    drop_gradient(*const_cast<Parameter*>(p));
  }
  std::ranges::fill(touched_, char{0});
  reduced_ = false;
}

}  // namespace reprise::distributed

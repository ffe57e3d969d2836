#include "distributed/sharded_gradients.h"

#include <algorithm>
#include <ranges>
#include <utility>

#include "distributed/divide.h"
#include "kernels/accumulate.h"

namespace reprise::distributed {
namespace {

constexpr std::size_t kHead = 2;  // the step and its complement
constexpr std::int64_t kDone = std::int64_t{1} << 62;

void drop_gradient(Parameter& p) {
  p.zero_gradient();
  p.unbind_gradient();
}

}  // namespace

ShardedGradients::ShardedGradients(Communicator& communicator,
                                   const std::vector<Parameter*>& parameters,
                                   const std::vector<ShardUnit>& units,
                                   const ReducerOptions& options)
    : communicator_(communicator),
      parameters_(parameters),
      units_(units),
      options_(options),
      states_(units.size()),
      rank_in_order_(units.size()),
      touched_(parameters.size()),
      written_(parameters.size()) {
  expect_compatible(options, communicator.size());
  for (std::size_t u = units.size(); u-- > 0;) {
    if (!units[u].trainable) {
      continue;
    }
    if (options.shards > 0 && units[u].grad_dtype != DType::f32) {
      fail("sharding", "the gradient of {} must be f32 to be added over shards, got {}",
           parameters[units[u].slots[0].parameter]->name(), name(units[u].grad_dtype));
    }
    rank_in_order_[u] = order_.size();
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

void ShardedGradients::drop(std::size_t unit) {
  for (const ShardUnit::Slot& slot : units_[unit].slots) {
    drop_gradient(*parameters_[slot.parameter]);
    written_[slot.parameter] = 0;
  }
  states_[unit].full = Tensor();
}

void ShardedGradients::add_tokens(std::int64_t count) {
  if (count < 0 || own_tokens_ + count >= std::int64_t{1} << 61) {
    fail("sharding", "tokens of a step must be 0 or more, got {} after {}", count, own_tokens_);
  }
  own_tokens_ += count;
  tokens_counted_ = true;
}

void ShardedGradients::prepare(const Plan& plan, bool reduce) {
  if (reduced_) {
    fail("sharding", "the gradients of step {} are there still: zero_gradients() first", step_);
  }
  if (reducing_) {
    fail("sharding", "finish() was not called after the backward of step {}, or that one failed",
         step_);
  }
  if (reduce && options_.mean == Mean::tokens && !tokens_counted_) {
    fail("sharding", "no tokens were counted since the last reduction: call add_tokens()");
  }
  expect_shard(reduce);
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
    touched_[found->second.parameter] = written_[found->second.parameter] = 1;
    ++states_[found->second.unit].left;
  }
  joining_ = false;
}

void ShardedGradients::prepare_join() {
  if (reduced_) {
    fail("sharding", "the gradients of step {} are there still: zero_gradients() first", step_);
  }
  if (options_.shards > 0) {
    fail("sharding", "with shards every rank has data in every step");
  }
  for (State& state : states_) {
    state.left = 0;
  }
  expected_.clear();
  joining_ = true;
}

bool ShardedGradients::has_accumulated() const {
  return own_tokens_ > 0 || std::ranges::any_of(touched_, [](char c) { return c != 0; });
}

void ShardedGradients::start() {
  reducing_ = true;
  next_ = 0;
  launched_.clear();
  start_agreement();
}

void ShardedGradients::start_agreement() {
  const auto ranks = static_cast<std::size_t>(communicator_.size());
  const std::size_t bits_at = kHead + ranks;
  words_ = Tensor::zeros({static_cast<std::int64_t>(bits_at + (parameters_.size() + 63) / 64)},
                         DType::i64, cpu, MemoryKind::communication);
  auto* const words = words_.data<std::int64_t>();
  words[0] = step_;
  words[1] = ~step_;
  const bool done = joining_ && !has_accumulated();
  words[kHead + static_cast<std::size_t>(communicator_.rank())] = own_tokens_ | (done ? kDone : 0);
  for (std::size_t i = 0; i < touched_.size(); ++i) {
    if (touched_[i] != 0) {
      words[bits_at + i / 64] |= std::int64_t{1} << (i % 64);
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
  const auto* const words = words_.data<std::int64_t>();
  if (words[0] != ~words[1]) {
    const std::string why =
        fmt::format("[sharding] ranks disagree about the step; this one is at step {}", step_);
    communicator_.abort(why);
    throw CommunicatorError(why);
  }
  live_ = 0;
  tokens_ = 0;
  for (int r = 0; r < communicator_.size(); ++r) {
    const std::int64_t word = words[kHead + static_cast<std::size_t>(r)];
    live_ += (word & kDone) == 0 ? 1 : 0;
    tokens_ += word & ~kDone;
  }
}

bool ShardedGradients::used(std::size_t parameter) const {
  const std::size_t bits_at = kHead + static_cast<std::size_t>(communicator_.size());
  return words_.defined() &&
         (words_.data<std::int64_t>()[bits_at + parameter / 64] >> (parameter % 64) & 1) != 0;
}

bool ShardedGradients::used_anywhere(std::size_t unit) const {
  return std::ranges::any_of(units_[unit].slots,
                             [&](const ShardUnit::Slot& slot) { return used(slot.parameter); });
}

double ShardedGradients::divisor() const {
  return divisor_of(options_, tokens_, live_, communicator_.size());
}

void ShardedGradients::ready(const Parameter& p) {
  if (!reducing_ || !expected_.contains(&p)) {
    return;
  }
  State& state = states_[places_.at(&p).unit];
  ensure(state.left > 0, "sharding: parameter {} became ready once more than announced", p.name());
  --state.left;
  if (!in_step_) {
    launch_ready();
  }
}

void ShardedGradients::launch_ready() {
  while (next_ < order_.size() && states_[order_[next_]].left == 0) {
    finish_agreement();
    const std::size_t unit = order_[next_++];
    if (live_ > 0 && used_anywhere(unit)) {
      launch(unit);
    }
  }
}

void ShardedGradients::mark_unready(GatherWords& words) const {
  for (std::size_t i = next_; reducing_ && i < order_.size(); ++i) {
    if (states_[order_[i]].left > 0) {
      words.mark(order_[i]);
    }
  }
}

void ShardedGradients::launch_ready_on_all(const GatherWords& words) {
  while (reducing_ && next_ < order_.size() && !words.marked(order_[next_])) {
    finish_agreement();
    const std::size_t unit = order_[next_++];
    if (used_anywhere(unit)) {
      launch(unit);
    }
  }
}

// Padding too is defined, and what this rank did not use is zero.
void ShardedGradients::fill_gaps(std::size_t u) {
  const ShardUnit& unit = units_[u];
  (void)storage(*parameters_[unit.slots[0].parameter]);
  const Tensor& full = states_[u].full;
  std::int64_t end = 0;
  for (const ShardUnit::Slot& slot : unit.slots) {
    full.slice(0, end, slot.offset).zero();
    end = slot.offset + slot.numel;
    if (written_[slot.parameter] == 0) {
      full.slice(0, slot.offset, end).zero();
    }
  }
  full.slice(0, end, full.numel()).zero();
}

void ShardedGradients::launch(std::size_t u) {
  settle_flight();
  fill_gaps(u);
  send(u);
  flight_ = u;
  launched_.push_back(u);
}

void ShardedGradients::send(std::size_t u) {
  const ShardUnit& unit = units_[u];
  State& state = states_[u];
  const Tag tag{"gradients", static_cast<int>(u)};
  state.shard =
      Tensor::empty({unit.slice}, unit.grad_dtype, state.full.device(), MemoryKind::gradients);
  if (options_.shards > 0) {
    send_nodes(u);
    return;
  }
  if (!options_.compress || unit.grad_dtype != DType::f32) {
    state.pending = communicator_.reduce_scatter(state.full, state.shard, Reduce::sum, tag);
    return;
  }
  const auto packed = [&](const Tensor& like) {
    return Tensor::empty(like.shape(), DType::bf16, like.device(), MemoryKind::communication);
  };
  state.sent = packed(state.full);
  state.received = packed(state.shard);
  kernels::cast(state.full, state.sent);
  state.pending = communicator_.reduce_scatter(state.sent, state.received, Reduce::sum, tag);
}

void ShardedGradients::settle_flight() {
  if (!flight_) {
    return;
  }
  State& state = states_[*flight_];
  state.pending.wait();
  if (options_.shards > 0) {
    settle_nodes(*flight_);
  } else if (state.received.defined()) {
    kernels::cast(state.received, state.shard);
  }
  state.sent = state.received = Tensor();
  drop(*flight_);
  divide(state.shard, divisor());
  flight_.reset();
}

void ShardedGradients::settle_arrived() {
  if (flight_ && states_[*flight_].pending.done()) {
    settle_flight();
  }
}

bool ShardedGradients::settled(std::size_t unit) const {
  return states_[unit].shard.defined() && flight_ != unit;
}

void ShardedGradients::finish_accumulation() {
  if (options_.shards > 0) {
    store_shard();
  }
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
  reducing_ = in_step_ = false;
  if (live_ == 0) {
    return;  // nothing was reduced
  }
  reduced_ = true;
  own_tokens_ = 0;
  tokens_counted_ = false;
  shards_done_ = 0;
  shard_sums_.release();
  ++step_;
}

void ShardedGradients::zero() {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    states_[u].shard = Tensor();
  }
  for (const std::size_t u : order_) {
    drop(u);
  }
  std::ranges::fill(touched_, char{0});
  shard_sums_.release();
  shards_done_ = 0;
  reduced_ = false;
}

}  // namespace reprise::distributed

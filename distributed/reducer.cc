#include "distributed/reducer.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "distributed/divide.h"
#include "kernels/accumulate.h"

namespace reprise::distributed {
Reducer::Reducer(Communicator& communicator, std::vector<Parameter*> parameters,
                 ReducerOptions options)
    : communicator_(communicator),
      parameters_(std::move(parameters)),
      options_(std::move(options)),
      states_(parameters_.size()) {
  expect_compatible(options_, communicator_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = *parameters_[i];
    if (!index_.emplace(&p, i).second) {
      fail("reducer", "parameter {} is in the list twice", p.name());
    }
    const DType dtype = p.grad_dtype();
    if (dtype != DType::f32 && (dtype != DType::bf16 || options_.shards > 0)) {
      fail("reducer", "the gradient of {} must be f32{}, got {}", p.name(),
           options_.shards > 0 ? " to be added over shards" : " or bf16", reprise::name(dtype));
    }
  }
  start_agreement(false);
  finish_agreement();
  made_ = true;
}

Reducer::~Reducer() = default;

std::size_t Reducer::index_of(const Parameter& p) const {
  const auto it = index_.find(&p);
  if (it == index_.end()) {
    fail("reducer", "the losses reach parameter {}, which is not in the reducer's list", p.name());
  }
  return it->second;
}

Tensor Reducer::slot_of(std::size_t i) const {
  const ParameterState& state = states_[i];
  const Bucket::Slot& slot = buckets_[state.bucket].slots[state.slot];
  return bucket_states_[state.bucket]
      .data.slice(0, slot.offset, slot.offset + slot.numel)
      .reshape(parameters_[i]->shape());
}

void Reducer::log(ReducerEvent::Kind kind, std::size_t index) {
  events_.push_back({kind, 0, index, Clock::now()});
}

// For the message of a broken invariant.
std::string Reducer::describe(std::size_t i) const {
  const ParameterState& state = states_[i];
  return fmt::format("parameter {} (bucket {}): expected to be ready once, seen {} times; {}",
                     parameters_[i]->name(), state.bucket, state.ready,
                     contributors(contributions_, *parameters_[i]));
}

void Reducer::expect_idle() const {
  if (phase_ == Phase::sweeping) {
    fail("reducer", "finish() was not called after the backward of step {}, or that one failed",
         step_);
  }
}

template <class F>
void Reducer::guarded(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    communicator_.abort(fmt::format("exception in backward: {}", e.what()));
    throw;
  }
}

void Reducer::attach(BackwardOptions& options) {
  expect_idle();
  if (update_ && options.keep) {
    fail("reducer", "a tape that is kept reads values that an early update would change");
  }
  phase_ = Phase::attached;
  if (options.parameters.empty()) {
    options.parameters = parameters_;
  }
  options.on_plan = [this, next = std::move(options.on_plan)](const Plan& plan) {
    begin(plan);
    if (next) {
      next(plan);
    }
  };
  options.on_ready = [this, next = std::move(options.on_ready)](Parameter& p) {
    if (next) {
      next(p);
    }
    became_ready(p);
  };
  if (update_) {
    options.on_last_read = [this, next = std::move(options.on_last_read)](Parameter& p) {
      if (next) {
        next(p);
      }
      not_read_any_more(p);
    };
  }
}

void Reducer::attach_accumulation(BackwardOptions& options) {
  expect_idle();
  phase_ = Phase::attached_accumulation;
  if (options.parameters.empty()) {
    options.parameters = parameters_;
  }
  options.on_plan = [this, next = std::move(options.on_plan)](const Plan& plan) {
    expect_shard(/*last=*/false);
    ensure_layout(&plan);
    note_uses(plan);
    if (next) {
      next(plan);
    }
  };
}

void Reducer::finish_accumulation() {
  if (phase_ != Phase::attached_accumulation) {
    fail("reducer", "finish_accumulation() belongs after attach_accumulation()");
  }
  if (options_.shards > 0) {
    store_shard();
  }
  phase_ = Phase::idle;
}

void Reducer::backward(std::span<const Variable> losses, BackwardOptions options) {
  guarded([&] {
    attach(options);
    reprise::backward(losses, options);
    finish();
  });
}

void Reducer::backward(const Variable& loss, BackwardOptions options) {
  backward({&loss, 1}, std::move(options));
}

void Reducer::accumulate(std::span<const Variable> losses, BackwardOptions options) {
  guarded([&] {
    attach_accumulation(options);
    reprise::backward(losses, options);
    finish_accumulation();
  });
}

void Reducer::accumulate(const Variable& loss, BackwardOptions options) {
  accumulate({&loss, 1}, std::move(options));
}

void Reducer::add_tokens(std::int64_t count) {
  if (count < 0 || own_tokens_ + count >= std::int64_t{1} << 61) {
    fail("reducer", "tokens of a step must be 0 or more, got {} after {}", count, own_tokens_);
  }
  own_tokens_ += count;
  tokens_counted_ = true;
}

void Reducer::update_early(std::function<void(std::span<Parameter* const>)> update) {
  if (phase_ != Phase::idle) {
    fail("reducer", "an early update cannot be changed in a step");
  }
  update_ = std::move(update);
}

void Reducer::note_uses(const Plan& plan) {
  for (ParameterState& state : states_) {
    state.expected = 0;
    state.planned = false;
  }
  for (const Ready& ready : plan.order) {
    ParameterState& state = states_[index_of(*ready.parameter)];
    state.planned = true;
    state.expected = ready.expected;
    if (ready.expected > 0 && !std::exchange(state.touched, true)) {
      state.carried = state.reduced && ready.parameter->has_gradient();
    }
  }
}

void Reducer::begin(const Plan& plan) {
  if (options_.mean == Mean::tokens && !tokens_counted_) {
    fail("reducer", "no tokens were counted since the last reduction: call add_tokens()");
  }
  expect_shard(/*last=*/true);
  events_.clear();
  log(ReducerEvent::Kind::plan, 0);
  ensure_layout(&plan);
  note_uses(plan);
  contributions_ = plan.contributions();
  start_reduction(/*done=*/false);
  for (std::size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].active && !states_[i].planned) {
      count_ready(i);  // the caller's plan covers other parameters
    }
  }
}

void Reducer::start_reduction(bool done) {
  for (std::size_t i = 0; i < states_.size(); ++i) {
    ParameterState& state = states_[i];
    const Parameter& p = *parameters_[i];
    const bool left = p.has_gradient() && !state.reduced;
    state.used = state.active && (state.touched || left);
    state.carried = state.touched ? state.carried : state.reduced && p.has_gradient();
    state.ready = 0;
    state.read_last = false;
  }
  start_agreement(done);
  contribute_unused();
  next_bucket_ = next_update_ = ready_count_ = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    BucketState& bucket = bucket_states_[b];
    bucket.left = bucket.read = buckets_[b].slots.size();
    bucket.launches = 0;
    bucket.settled = false;
    bucket.pending = {};
  }
  phase_ = Phase::sweeping;
}

void Reducer::contribute_unused() {
  for (std::size_t i = 0; i < states_.size(); ++i) {
    ParameterState& state = states_[i];
    state.before = Tensor();
    const Parameter& p = *parameters_[i];
    if (!state.active || (state.used && options_.shards == 0)) {
      continue;
    }
    if (p.has_gradient()) {
      state.before = p.gradient().clone(MemoryKind::gradients);
    } else if (state.expected == 0) {
      slot_of(i).zero();
    }
  }
}

void Reducer::became_ready(Parameter& p) {
  const std::size_t i = index_of(p);
  ParameterState& state = states_[i];
  ++state.ready;
  if (phase_ != Phase::sweeping || !state.active || state.ready != 1) {
    ensure(false, "reducer: in step {} {}", step_, describe(i));
  }
  log(ReducerEvent::Kind::ready, i);
  count_ready(i);
  if (state.expected > 0) {  // at the beginning the other ranks are not waited for
    launch_ready();
    update_what_can_be();
  }
}

void Reducer::count_ready(std::size_t i) {
  ParameterState& state = states_[i];
  state.ready = 1;
  ++ready_count_;
  BucketState& bucket = bucket_states_[state.bucket];
  ensure(bucket.left > 0, "reducer: bucket {} has no parameter left to become ready: {}",
         state.bucket, describe(i));
  --bucket.left;
}

void Reducer::not_read_any_more(Parameter& p) {
  const auto it = index_.find(&p);
  if (it == index_.end() || !states_[it->second].active ||
      std::exchange(states_[it->second].read_last, true)) {
    return;
  }
  --bucket_states_[states_[it->second].bucket].read;
  update_what_can_be();
}

void Reducer::launch_ready() {
  while (next_bucket_ < buckets_.size() && bucket_states_[next_bucket_].left == 0) {
    finish_agreement();  // nothing is sent before the ranks are known to agree
    launch(next_bucket_++);
  }
}

void Reducer::launch(std::size_t b) {
  BucketState& bucket = bucket_states_[b];
  ++bucket.launches;
  ensure(bucket.launches == 1, "reducer: bucket {} was launched {} times in step {}, expected 1", b,
         bucket.launches, step_);
  log(ReducerEvent::Kind::launch, b);
  if (options_.shards > 0) {
    launch_shards(b);
    return;
  }
  const bool packed = options_.compress && bucket.data.dtype() == DType::f32;
  if (packed) {
    bucket.sent = Tensor::empty(bucket.data.shape(), DType::bf16, bucket.data.device(),
                                MemoryKind::communication);
    kernels::cast(bucket.data, bucket.sent);
  }
  bucket.pending = communicator_.all_reduce(packed ? bucket.sent : bucket.data, Reduce::sum,
                                            {"gradients", static_cast<int>(b)});
}

double Reducer::divisor() const {
  return divisor_of(options_, tokens_, live_, communicator_.size());
}

void Reducer::settle(std::size_t b) {
  BucketState& bucket = bucket_states_[b];
  ensure(bucket.launches == 1 && !bucket.settled,
         "reducer: bucket {} was launched {} times and settled {} times in step {}, expected once "
         "and not yet; its first parameter is {}",
         b, bucket.launches, bucket.settled ? 1 : 0, step_,
         parameters_[buckets_[b].slots[0].parameter]->name());
  bucket.pending.wait();
  bucket.settled = true;
  if (options_.shards > 0) {
    settle_shards(b);
  } else if (bucket.sent.defined()) {
    kernels::cast(bucket.sent, bucket.data);
  }
  bucket.sent = bucket.gathered = Tensor();
  for (const Bucket::Slot& slot : buckets_[b].slots) {
    settle_parameter(slot.parameter, divisor());
  }
}

void Reducer::settle_parameter(std::size_t i, double divisor) {
  ParameterState& state = states_[i];
  Parameter& p = *parameters_[i];
  if (used_anywhere(i)) {
    if (state.carried && divisor != communicator_.size()) {
      fail("reducer",
           "the gradient of {} of an earlier reduction was not zeroed: it can be added to only "
           "where sums over {} ranks are divided by {}, not by {}",
           p.name(), communicator_.size(), communicator_.size(), divisor);
    }
    divide(slot_of(i), divisor);
    p.set_gradient_present();
  } else if (state.before.defined()) {
    slot_of(i).copy_from(state.before);
  }
  state.before = Tensor();
  state.reduced = true;
  state.touched = false;
}

void Reducer::update_what_can_be() {
  while (update_ && next_update_ < next_bucket_ && bucket_states_[next_update_].read == 0 &&
         bucket_states_[next_update_].pending.done()) {
    settle(next_update_);
    update(next_update_++);
  }
}

void Reducer::update(std::size_t b) {
  std::vector<Parameter*> parameters;
  for (const Bucket::Slot& slot : buckets_[b].slots) {
    parameters.push_back(parameters_[slot.parameter]);
  }
  update_(parameters);
  log(ReducerEvent::Kind::update, b);
}

void Reducer::finish() {
  if (phase_ != Phase::sweeping) {
    fail("reducer", "finish() belongs after a backward with the options of attach()");
  }
  log(ReducerEvent::Kind::swept, 0);
  expect_all_ready();
  finish_reduction();
}

void Reducer::expect_all_ready() const {
  for (std::size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].active && states_[i].ready != 1) {
      ensure(false, "reducer: {} of {} parameters became ready in step {}; {}", ready_count_,
             active_count_, step_, describe(i));
    }
  }
  ensure(ready_count_ == active_count_, "reducer: {} of {} parameters became ready in step {}",
         ready_count_, active_count_, step_);
}

void Reducer::finish_reduction() {
  finish_agreement();
  launch_ready();
  ensure(next_bucket_ == buckets_.size(), "reducer: {} of {} buckets were launched", next_bucket_,
         buckets_.size());
  for (; next_update_ < buckets_.size(); ++next_update_) {
    settle(next_update_);
    if (update_) {
      update(next_update_);
    }
  }
  for (const BucketState& bucket : bucket_states_) {
    ensure(bucket.settled && bucket.pending.done(), "reducer: a bucket is in flight after step {}",
           step_);
  }
  collect_events();
  choose_order();
  contributions_.clear();
  own_tokens_ = 0;
  tokens_counted_ = false;
  shards_done_ = 0;
  shard_sums_.clear();
  phase_ = Phase::idle;
  ++step_;
}

bool Reducer::join() {
  bool live = false;
  guarded([&] {
    expect_idle();
    if (options_.shards > 0) {
      fail("reducer", "with shards every rank has data in every step");
    }
    events_.clear();
    plan_ = 0;
    plan_order_.clear();
    if (!ensure_layout(nullptr)) {
      return;
    }
    for (ParameterState& state : states_) {
      state.expected = 0;
    }
    // Micro-batches that were accumulated still count.
    const bool none = std::ranges::none_of(states_, &ParameterState::touched);
    start_reduction(none && own_tokens_ == 0);
    finish_agreement();
    live = live_ > 0;
    if (!live) {
      phase_ = Phase::idle;
      return;
    }
    for (std::size_t i = 0; i < states_.size(); ++i) {
      if (states_[i].active) {
        count_ready(i);
      }
    }
    finish_reduction();
  });
  return live;
}

void Reducer::collect_events() {
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    events_.push_back(
        {ReducerEvent::Kind::complete, 0, b, bucket_states_[b].pending.finished_at()});
  }
  std::ranges::stable_sort(events_, {}, &ReducerEvent::time);
  for (std::size_t i = 0; i < events_.size(); ++i) {
    events_[i].sequence = static_cast<std::int64_t>(i);
  }
}

}  // namespace reprise::distributed

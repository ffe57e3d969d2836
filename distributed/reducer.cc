#include "distributed/reducer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "core/parallel.h"
#include "distributed/disagreement.h"

namespace reprise::distributed {
namespace {

// FNV-1a: the same on every machine.
class Hash {
 public:
  Hash& add(std::string_view text) {
    for (const char c : text) {
      byte(static_cast<unsigned char>(c));
    }
    return add(text.size());
  }
  Hash& add(std::uint64_t x) {
    for (int i = 0; i < 8; ++i) {
      byte(static_cast<unsigned char>(x >> (8 * i)));
    }
    return *this;
  }
  std::uint64_t value() const { return value_; }

 private:
  void byte(unsigned char b) { value_ = (value_ ^ b) * 0x100000001b3u; }
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

void divide(const Tensor& data, double divisor) {
  if (divisor == 1.0 || data.is_meta()) {
    return;
  }
  const auto by = static_cast<float>(divisor);
  auto each = [&](auto* x, auto&& f) {
    parallel_for(data.numel(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        x[i] = f(x[i]);
      }
    });
  };
  if (data.dtype() == DType::f32) {
    each(data.data<float>(), [by](float x) { return x / by; });
  } else {
    each(data.data<bfloat16>(), [by](bfloat16 x) { return to_bfloat16(to_float(x) / by); });
  }
}

Tensor host_words(std::int64_t count) {
  return Tensor::zeros({count}, DType::i64, cpu, MemoryKind::communication);
}

// The or of all ranks' hashes and the or of all complements are complements of each other only when
// all hashes are equal.
void set_hash(const Tensor& words, std::uint64_t hash) {
  words.data<std::int64_t>()[0] = std::bit_cast<std::int64_t>(hash);
  words.data<std::int64_t>()[1] = std::bit_cast<std::int64_t>(~hash);
}
bool same_hash(const Tensor& words) {
  return words.data<std::int64_t>()[0] == ~words.data<std::int64_t>()[1];
}

// What every rank has, at the place of its number.
std::vector<std::int64_t> gather(Communicator& communicator, std::span<const std::int64_t> mine,
                                 const char* what) {
  const auto count = static_cast<std::int64_t>(mine.size());
  const Tensor in = host_words(count), out = host_words(count * communicator.size());
  std::ranges::copy(mine, in.data<std::int64_t>());
  communicator.all_gather(in, out, {what}).wait();
  return out.to_vector<std::int64_t>();
}

// values[r] of a text that fits into 160 bytes.
std::vector<std::string> gather_text(Communicator& communicator, const std::string& mine) {
  std::array<std::int64_t, 20> words{};
  std::memcpy(words.data(), mine.data(), std::min(mine.size(), sizeof words - 1));
  const std::vector<std::int64_t> all = gather(communicator, words, "explain a difference: text");
  std::vector<std::string> texts;
  for (int r = 0; r < communicator.size(); ++r) {
    texts.emplace_back(
        reinterpret_cast<const char*>(all.data() + static_cast<std::size_t>(r) * words.size()));
  }
  return texts;
}

}  // namespace

Reducer::Reducer(Communicator& communicator, std::vector<Parameter*> parameters,
                 ReducerOptions options)
    : communicator_(communicator),
      parameters_(std::move(parameters)),
      options_(options),
      states_(parameters_.size()) {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (!index_.emplace(parameters_[i], i).second) {
      fail("reducer", "parameter {} is in the list twice", parameters_[i]->name());
    }
    if (const DType dtype = parameters_[i]->grad_dtype();
        dtype != DType::f32 && dtype != DType::bf16) {
      fail("reducer", "the gradient of {} must be f32 or bf16, got {}", parameters_[i]->name(),
           reprise::name(dtype));
    }
  }
  // The length of later agreements depends on the list, so that this one has a fixed length.
  const std::uint64_t hash = state_hash();
  words_ = host_words(2);
  set_hash(words_, hash);
  communicator_.agree(words_, {"parameters of the reducer"}).wait();
  if (!same_hash(words_)) {
    explain("making the reducer");
  }
}

Reducer::~Reducer() = default;

std::string Reducer::signature(std::size_t i) const {
  const Parameter& p = *parameters_[i];
  return fmt::format("{} {} {}{}", p.name(), reprise::name(p.grad_dtype()), to_string(p.shape()),
                     p.trainable() ? "" : " frozen");
}

std::uint64_t Reducer::signatures_hash() const {
  Hash hash;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    hash.add(signature(i));
  }
  return hash.value();
}

std::uint64_t Reducer::state_hash() const {
  return Hash()
      .add(static_cast<std::uint64_t>(step_))
      .add(signatures_hash())
      .add(static_cast<std::uint64_t>(options_.buckets.first_bucket_bytes))
      .add(static_cast<std::uint64_t>(options_.buckets.bucket_bytes))
      .add(std::bit_cast<std::uint64_t>(options_.divisor))
      .value();
}

void Reducer::explain(const char* when) {
  const std::array<const char*, 5> names{"step", "first bucket's bytes", "bucket bytes", "divisor",
                                         "number of parameters"};
  const std::array<std::int64_t, 5> mine{
      step_, options_.buckets.first_bucket_bytes, options_.buckets.bucket_bytes,
      std::bit_cast<std::int64_t>(options_.divisor), static_cast<std::int64_t>(parameters_.size())};
  const auto ranks = static_cast<std::size_t>(communicator_.size());
  const std::vector<std::int64_t> all = gather(communicator_, mine, "explain a difference");
  auto stop = [&](const std::string& what, const std::string& text) {
    const std::string why = fmt::format("[reducer] ranks disagree at {}: {}: {}", when, what, text);
    communicator_.disagree(why);
    throw CommunicatorError(why);
  };
  for (std::size_t field = 0; field < names.size(); ++field) {
    std::vector<std::string> values;
    for (std::size_t r = 0; r < ranks; ++r) {
      const std::int64_t value = all[r * names.size() + field];
      values.push_back(field == 3 ? fmt::format("{}", std::bit_cast<double>(value))
                                  : std::to_string(value));
    }
    if (const std::string text = disagreement(values); !text.empty()) {
      stop(names[field], text);
    }
  }
  std::vector<std::int64_t> hashes;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    hashes.push_back(std::bit_cast<std::int64_t>(Hash().add(signature(i)).value()));
  }
  const std::vector<std::int64_t> all_hashes =
      gather(communicator_, hashes, "explain a difference: parameters");
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    bool equal = true;
    for (std::size_t r = 1; r < ranks; ++r) {
      equal = equal && all_hashes[r * hashes.size() + i] == all_hashes[i];
    }
    if (!equal) {
      const std::vector<std::string> texts = gather_text(communicator_, signature(i));
      stop(fmt::format("parameter {}", i), disagreement(texts));
    }
  }
  throw InternalError("reducer: hashes of the ranks differ, but nothing that they cover");
}

std::size_t Reducer::index_of(const Parameter& p) const {
  const auto it = index_.find(&p);
  if (it == index_.end()) {
    fail("reducer", "the losses reach parameter {}, which is not in the reducer's list", p.name());
  }
  return it->second;
}

void Reducer::log(ReducerEvent::Kind kind, std::size_t index) {
  events_.push_back({kind, 0, index, Clock::now()});
}

void Reducer::attach(BackwardOptions& options) {
  if (phase_ == Phase::sweeping) {
    fail("reducer", "finish() was not called after the backward of step {}, or that one failed",
         step_);
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
    became_ready(p);
    if (next) {
      next(p);
    }
  };
}

void Reducer::attach_accumulation(BackwardOptions& options) {
  if (phase_ == Phase::sweeping) {
    fail("reducer", "finish() was not called after the backward of step {}, or that one failed",
         step_);
  }
  if (options.parameters.empty()) {
    options.parameters = parameters_;
  }
  options.on_plan = [this, next = std::move(options.on_plan)](const Plan& plan) {
    ensure_layout(plan);
    note_uses(plan);
    if (next) {
      next(plan);
    }
  };
}

void Reducer::backward(std::span<const Variable> losses, BackwardOptions options) {
  try {
    attach(options);
    reprise::backward(losses, options);
    finish();
  } catch (const std::exception& e) {
    communicator_.abort(fmt::format("exception in backward: {}", e.what()));
    throw;
  }
}

void Reducer::backward(const Variable& loss, BackwardOptions options) {
  backward({&loss, 1}, std::move(options));
}

void Reducer::accumulate(std::span<const Variable> losses, BackwardOptions options) {
  try {
    attach_accumulation(options);
    reprise::backward(losses, options);
  } catch (const std::exception& e) {
    communicator_.abort(fmt::format("exception in backward: {}", e.what()));
    throw;
  }
}

void Reducer::accumulate(const Variable& loss, BackwardOptions options) {
  accumulate({&loss, 1}, std::move(options));
}

void Reducer::note_uses(const Plan& plan) {
  for (const Ready& ready : plan.order) {
    ParameterState& state = states_[index_of(*ready.parameter)];
    state.expected = ready.expected;
    state.touched = state.touched || ready.expected > 0;
  }
}

void Reducer::begin(const Plan& plan) {
  events_.clear();
  log(ReducerEvent::Kind::plan, 0);
  for (ParameterState& state : states_) {
    state.expected = state.ready = 0;
  }
  for (BucketState& bucket : bucket_states_) {
    bucket.pending = {};
  }
  ensure_layout(plan);
  note_uses(plan);
  for (std::size_t i = 0; i < states_.size(); ++i) {
    ParameterState& state = states_[i];
    const bool left = parameters_[i]->has_gradient() && !state.reduced;
    state.used = state.active && (state.touched || left);
  }
  start_agreement();
  contribute_unused();
  next_bucket_ = ready_count_ = 0;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    bucket_states_[b].left = buckets_[b].slots.size();
  }
  phase_ = Phase::sweeping;
}

void Reducer::ensure_layout(const Plan& plan) {
  for (const Ready& ready : plan.order) {
    index_of(*ready.parameter);
  }
  const std::uint64_t signature = signatures_hash();
  if (layout_signature_ == signature) {
    return;
  }
  // Other ranks must be here too before the order is sent.
  for (ParameterState& state : states_) {
    state.used = false;
  }
  start_agreement();
  finish_agreement();
  std::vector<std::int32_t> order;
  std::vector<char> placed(parameters_.size());
  for (const Ready& ready : plan.order) {
    const std::size_t i = index_of(*ready.parameter);
    if (ready.parameter->trainable()) {
      order.push_back(static_cast<std::int32_t>(i));
      placed[i] = 1;
    }
  }
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (placed[i] == 0 && parameters_[i]->trainable()) {
      order.push_back(static_cast<std::int32_t>(i));
    }
  }
  const Tensor shared = Tensor::from(order, {static_cast<std::int64_t>(order.size())});
  communicator_.broadcast(shared, 0, {"order of the buckets"}).wait();
  bind_buckets(shared.to_vector<std::int32_t>());
  layout_signature_ = signature;
}

void Reducer::bind_buckets(std::span<const std::int32_t> order) {
  std::vector<BucketEntry> entries;
  for (const std::int32_t i : order) {
    const auto index = static_cast<std::size_t>(i);
    entries.push_back(
        {index, parameters_[index]->value().numel(), parameters_[index]->grad_dtype()});
  }
  buckets_ = lay_out(entries, options_.buckets);
  bucket_states_.assign(buckets_.size(), {});
  for (ParameterState& state : states_) {
    state.active = false;
  }
  active_count_ = order.size();
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    const Device device = parameters_[bucket.slots[0].parameter]->value().device();
    bucket_states_[b].data =
        Tensor::zeros({bucket.numel}, bucket.dtype, device, MemoryKind::gradients);
    for (std::size_t s = 0; s < bucket.slots.size(); ++s) {
      const std::size_t i = bucket.slots[s].parameter;
      states_[i].active = true;
      states_[i].bucket = b;
      states_[i].slot = s;
      parameters_[i]->bind_gradient(slot_of(i));
    }
  }
}

Tensor Reducer::slot_of(std::size_t i) const {
  const ParameterState& state = states_[i];
  const Bucket::Slot& slot = buckets_[state.bucket].slots[state.slot];
  return bucket_states_[state.bucket]
      .data.slice(0, slot.offset, slot.offset + slot.numel)
      .reshape(parameters_[i]->shape());
}

void Reducer::start_agreement() {
  const std::uint64_t hash = state_hash();
  words_ = host_words(2 + (std::ssize(parameters_) + 63) / 64);
  set_hash(words_, hash);
  std::int64_t* bits = words_.data<std::int64_t>() + 2;
  for (std::size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].used) {
      bits[i / 64] |= std::int64_t{1} << (i % 64);
    }
  }
  agreed_ = false;
  agreement_ = communicator_.agree(words_, {"state before a step"});
}

void Reducer::finish_agreement() {
  if (std::exchange(agreed_, true)) {
    return;
  }
  agreement_.wait();
  if (!same_hash(words_)) {
    explain(fmt::format("step {}", step_).c_str());
  }
}

bool Reducer::used_anywhere(std::size_t i) const {
  return (words_.data<std::int64_t>()[2 + i / 64] >> (i % 64) & 1) != 0;
}

void Reducer::contribute_unused() {
  for (std::size_t i = 0; i < states_.size(); ++i) {
    ParameterState& state = states_[i];
    state.before = Tensor();
    if (!state.active || state.used) {
      continue;
    }
    const Parameter& p = *parameters_[i];
    if (p.has_gradient()) {
      state.before = p.gradient().clone(MemoryKind::gradients);
    } else {
      slot_of(i).zero();
    }
  }
}

void Reducer::became_ready(Parameter& p) {
  const std::size_t i = index_of(p);
  ParameterState& state = states_[i];
  ensure(phase_ == Phase::sweeping && state.active,
         "reducer: parameter {} became ready outside of a reduced backward", p.name());
  ++state.ready;
  ensure(state.ready == 1, "reducer: parameter {} became ready {} times in one backward", p.name(),
         state.ready);
  log(ReducerEvent::Kind::ready, i);
  ++ready_count_;
  BucketState& bucket = bucket_states_[state.bucket];
  ensure(bucket.left > 0, "reducer: bucket {} has no parameter left to become ready", state.bucket);
  --bucket.left;
  launch_ready();
}

void Reducer::launch_ready() {
  while (next_bucket_ < buckets_.size() && bucket_states_[next_bucket_].left == 0) {
    finish_agreement();  // nothing is sent before the ranks are known to agree
    BucketState& bucket = bucket_states_[next_bucket_];
    log(ReducerEvent::Kind::launch, next_bucket_);
    bucket.pending = communicator_.all_reduce(bucket.data, Reduce::sum,
                                              {"gradients", static_cast<int>(next_bucket_)});
    ++next_bucket_;
  }
}

void Reducer::finish() {
  if (phase_ != Phase::sweeping) {
    fail("reducer", "finish() belongs after a backward with the options of attach()");
  }
  log(ReducerEvent::Kind::swept, 0);
  ensure(ready_count_ == active_count_, "reducer: {} of {} parameters became ready", ready_count_,
         active_count_);
  ensure(next_bucket_ == buckets_.size(), "reducer: {} of {} buckets were launched", next_bucket_,
         buckets_.size());
  finish_agreement();
  const double divisor =
      options_.divisor != 0 ? options_.divisor : static_cast<double>(communicator_.size());
  for (BucketState& bucket : bucket_states_) {
    bucket.pending.wait();
  }
  for (std::size_t i = 0; i < states_.size(); ++i) {
    settle(i, divisor);
  }
  collect_events();
  phase_ = Phase::idle;
  ++step_;
}

void Reducer::settle(std::size_t i, double divisor) {
  ParameterState& state = states_[i];
  if (!state.active) {
    return;
  }
  Parameter& p = *parameters_[i];
  if (used_anywhere(i)) {
    divide(slot_of(i), divisor);
    p.set_gradient_present();
  } else if (state.before.defined()) {
    slot_of(i).copy_from(state.before);
  }
  state.before = Tensor();
  state.reduced = true;
  state.touched = false;
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

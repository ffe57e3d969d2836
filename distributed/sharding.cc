#include "distributed/sharding.h"

#include <algorithm>
#include <array>
#include <bit>

#include "core/error.h"
#include "distributed/disagreement.h"
#include "distributed/hash.h"
#include "nn/optimizer/clip.h"

namespace reprise::distributed {
namespace {

std::string signature(const Parameter& p) {
  return fmt::format("{} {} {} {}{}", p.name(), name(p.dtype()), name(p.grad_dtype()),
                     to_string(p.shape()), p.trainable() ? "" : " frozen");
}

}  // namespace

Sharding::Sharding(Communicator& communicator, std::vector<Parameter*> parameters,
                   const ForwardReads& reads, const ShardingOptions& options)
    : communicator_(communicator), parameters_(std::move(parameters)), options_(options) {
  if (options.stage < 1 || options.stage > 3) {
    fail("sharding", "stage must be 1, 2 or 3, got {}", options.stage);
  }
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = *parameters_[i];
    if (p.host() != nullptr || std::ranges::count(parameters_, parameters_[i]) > 1) {
      fail("sharding", "parameter {} is {}", p.name(),
           p.host() != nullptr ? "sharded already" : "in the list twice");
    }
    if (p.has_gradient()) {
      fail("sharding", "parameter {} has a gradient: zero it first", p.name());
    }
  }
  units_ = shard_units(parameters_, reads, communicator.size());
  agree_on_layout();
  const std::vector<std::size_t> order = unit_order(units_, reads);
  for (std::size_t u = 0; u < units_.size(); ++u) {
    for (std::size_t s = 0; s < units_[u].slots.size(); ++s) {
      if (options.stage == 3 || units_[u].trainable) {
        slots_[parameters_[units_[u].slots[s].parameter]] = {u, s};
      }
    }
  }
  if (options.stage == 1) {
    std::vector<Parameter*> trainable;
    std::ranges::copy_if(parameters_, std::back_inserter(trainable), &Parameter::trainable);
    reducer_ = std::make_unique<Reducer>(communicator, std::move(trainable), options.reduction);
  } else {
    gradients_ =
        std::make_unique<ShardedGradients>(communicator, parameters_, units_, options.reduction);
  }
  if (options.stage == 3) {
    values_ = std::make_unique<ShardedValues>(communicator, parameters_, units_, order, *gradients_,
                                              options.gather_again);
  } else {
    hold_whole_values();
  }
  make_shards();
  for (const auto& [p, place] : slots_) {
    const_cast<Parameter*>(p)->set_host(this);
  }
}

Sharding::~Sharding() {
  for (const auto& [p, place] : slots_) {
    const_cast<Parameter*>(p)->set_host(nullptr);
    if (values_ != nullptr) {
      const_cast<Parameter*>(p)->release_value();
    }
  }
}

// The first thing that differs is named; all ranks see the same.
void Sharding::agree_on_layout() const {
  std::string layout;
  for (const ShardUnit& unit : units_) {
    layout += fmt::format("{}:", unit.slice);
    for (const ShardUnit::Slot& slot : unit.slots) {
      layout += fmt::format("{}@{},", slot.parameter, slot.offset);
    }
  }
  std::string parameters;
  for (const Parameter* p : parameters_) {
    parameters += signature(*p) + "\n";
  }
  const auto word = [](std::uint64_t x) { return std::bit_cast<std::int64_t>(x); };
  const ReducerOptions& reduction = options_.reduction;
  const std::array mine{std::int64_t{options_.stage},
                        std::int64_t{std::ssize(parameters_)},
                        word(Hash().add(parameters).value()),
                        word(Hash().add(layout).value()),
                        std::bit_cast<std::int64_t>(reduction.divisor),
                        static_cast<std::int64_t>(reduction.mean),
                        std::int64_t{reduction.divide_by_live},
                        std::int64_t{reduction.compress},
                        std::int64_t{reduction.shards},
                        static_cast<std::int64_t>(options_.gather_again)};
  const std::array<const char*, mine.size()> names{"stage",
                                                   "number of parameters",
                                                   "parameters (hash)",
                                                   "units, as recorded reads make them (hash)",
                                                   "divisor",
                                                   "mean (0: over ranks, 1: over tokens)",
                                                   "division by live ranks",
                                                   "compression",
                                                   "shards",
                                                   "gathering again"};
  const auto fields = std::ssize(mine);
  const Tensor in = Tensor::zeros({fields}, DType::i64, cpu, MemoryKind::communication);
  const Tensor all =
      Tensor::zeros({fields * communicator_.size()}, DType::i64, cpu, MemoryKind::communication);
  std::ranges::copy(mine, in.data<std::int64_t>());
  communicator_.all_gather(in, all, {"layout of the sharding"}).wait();
  for (std::size_t field = 0; field < names.size(); ++field) {
    std::vector<std::string> values;
    for (int r = 0; r < communicator_.size(); ++r) {
      const std::int64_t value =
          all.data<std::int64_t>()[mine.size() * static_cast<std::size_t>(r) + field];
      values.push_back(field == 4 ? fmt::format("{}", std::bit_cast<double>(value))
                                  : std::to_string(value));
    }
    if (const std::string text = disagreement(values); !text.empty()) {
      throw CommunicatorError(
          fmt::format("[sharding] ranks disagree about the {}: {}", names[field], text));
    }
  }
}

void Sharding::hold_whole_values() {
  whole_.resize(units_.size());
  for (std::size_t u = 0; u < units_.size(); ++u) {
    const ShardUnit& unit = units_[u];
    if (!unit.trainable) {
      continue;
    }
    const Device device = parameters_[unit.slots[0].parameter]->value().device();
    whole_[u] = Tensor::zeros({unit.slice * communicator_.size()}, unit.dtype, device,
                              MemoryKind::parameters);
    for (const ShardUnit::Slot& slot : unit.slots) {
      Parameter& p = *parameters_[slot.parameter];
      const Tensor value =
          whole_[u].slice(0, slot.offset, slot.offset + slot.numel).reshape(p.shape());
      if (p.value().has_storage()) {
        value.copy_from(p.value());
      }
      p.bind_value(value);
    }
  }
}

Tensor Sharding::shard_values(std::size_t unit) const {
  if (values_ != nullptr) {
    return values_->shard(unit);
  }
  const std::int64_t slice = units_[unit].slice;
  return whole_[unit].slice(0, communicator_.rank() * slice, (communicator_.rank() + 1) * slice);
}

void Sharding::make_shards() {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = *parameters_[i];
    const auto found = slots_.find(&p);
    if (found == slots_.end() || !units_[found->second.unit].trainable) {
      continue;
    }
    const ShardUnit& unit = units_[found->second.unit];
    const ShardUnit::Slot& slot = unit.slots[found->second.slot];
    const auto [first, last] = unit.part_of(slot, communicator_.rank());
    if (first >= last) {
      continue;
    }
    const std::int64_t at = slot.offset + first - communicator_.rank() * unit.slice;
    Shard shard;
    shard.source = i;
    shard.unit = found->second.unit;
    shard.at = at;
    shard.first = first;
    shard.parameter = std::make_unique<Parameter>(
        p.name(), shard_values(shard.unit).slice(0, at, at + last - first));
    shard.parameter->set_grad_dtype(p.grad_dtype());
    shards_.push_back(shard.parameter.get());
    owned_.push_back(std::move(shard));
  }
}

std::vector<Sharding::Part> Sharding::parts_of(const Parameter& p) const {
  const auto found = slots_.find(&p);
  if (found == slots_.end()) {
    return {};
  }
  const ShardUnit& unit = units_[found->second.unit];
  const ShardUnit::Slot& slot = unit.slots[found->second.slot];
  const auto [first, last] = unit.part_of(slot, communicator_.rank());
  if (first >= last) {
    return {};
  }
  const std::int64_t at = slot.offset + first - communicator_.rank() * unit.slice;
  return {{first, shard_values(found->second.unit).slice(0, at, at + last - first)}};
}

void Sharding::values_written() {
  if (values_ != nullptr) {
    values_->release_all();
  }
  std::vector<Pending> gathers;
  for (std::size_t u = 0; u < whole_.size(); ++u) {
    if (whole_[u].defined()) {
      gathers.push_back(communicator_.all_gather(shard_values(u), whole_[u],
                                                 {"written values", static_cast<int>(u)}));
    }
  }
  for (const Pending& gather : gathers) {
    gather.wait();
  }
  for (const auto& [p, place] : slots_) {
    (void)const_cast<Parameter*>(p)->write();
  }
  for (const Shard& shard : owned_) {
    (void)shard.parameter->write();
  }
}

void Sharding::updated() {
  std::vector<Pending> gathers;
  for (std::size_t u = 0; u < units_.size(); ++u) {
    bool changed = false;
    for (const ShardUnit::Slot& slot : units_[u].slots) {
      if (units_[u].trainable && used(slot.parameter)) {
        (void)parameters_[slot.parameter]->write();
        changed = true;
      }
    }
    if (changed && values_ == nullptr) {
      gathers.push_back(communicator_.all_gather(shard_values(u), whole_[u],
                                                 {"updated values", static_cast<int>(u)}));
    }
  }
  for (const Pending& gather : gathers) {
    gather.wait();
  }
}

bool Sharding::used(std::size_t parameter) const {
  return gradients_ != nullptr ? gradients_->used(parameter)
                               : parameters_[parameter]->has_gradient();
}

void Sharding::zero_gradients() {
  if (gradients_ != nullptr) {
    gradients_->zero();
  } else {
    for (Parameter* p : parameters_) {
      p->zero_gradient();
    }
  }
  for (Parameter* shard : shards_) {
    shard->zero_gradient();
    shard->unbind_gradient();
  }
}

void Sharding::bind_gradient_of(const Shard& shard) {
  Parameter& part = *shard.parameter;
  part.zero_gradient();
  part.unbind_gradient();
  if (!used(shard.source)) {
    return;
  }
  const std::int64_t n = part.shape().numel();
  part.bind_gradient(gradients_ != nullptr
                         ? gradients_->shard(shard.unit).slice(0, shard.at, shard.at + n)
                         : parameters_[shard.source]
                               ->gradient()
                               .reshape({parameters_[shard.source]->shape().numel()})
                               .slice(0, shard.first, shard.first + n));
  part.set_gradient_present();
}

void Sharding::bind_shard_gradients() {
  for (const Shard& shard : owned_) {
    if (updated_early_.empty() || updated_early_[shard.unit] == 0) {
      bind_gradient_of(shard);
    }
  }
}

void Sharding::hook(BackwardOptions& options, bool reduce) {
  if (gradients_ == nullptr) {
    return reduce ? reducer_->attach(options) : reducer_->attach_accumulation(options);
  }
  if (update_ && reduce && options.keep) {
    fail("sharding", "a tape that is kept reads values that an early update would change");
  }
  if (options.parameters.empty()) {
    options.parameters = parameters_;
  }
  options.list_reads = options.list_reads || values_ != nullptr;
  options.on_plan = [this, reduce, next = std::move(options.on_plan)](const Plan& plan) {
    begin(plan, reduce);
    if (next) {
      next(plan);
    }
  };
  options.on_ready = [this, next = std::move(options.on_ready)](Parameter& p) {
    gradients_->ready(p);
    if (next) {
      next(p);
    }
    update_what_can_be();
  };
  options.on_last_read = [this, next = std::move(options.on_last_read)](Parameter& p) {
    not_read_any_more(p);
    if (next) {
      next(p);
    }
  };
}

void Sharding::begin(const Plan& plan, bool reduce) {
  gradients_->prepare(plan, reduce);
  if (values_ != nullptr) {
    const AfterForward kind =
        values_->begin_sweep(plan, reduce ? GatherWords::reduces : GatherWords::accumulates);
    waits_ = reduce && kind == GatherWords::accumulates;
    reduce = kind == GatherWords::reduces;
    gradients_->wait_for_all(values_->in_step());
  }
  if (reduce) {
    gradients_->start();
  }
  if (values_ != nullptr) {
    values_->start_sweep();
  }
  updates_ = reduce && update_;
  updated_early_.assign(units_.size(), 0);
  reads_left_.assign(units_.size(), 0);
  for (const Ready& ready : plan.order) {
    if (const auto found = slots_.find(ready.parameter); found != slots_.end()) {
      ++reads_left_[found->second.unit];
    }
  }
}

void Sharding::attach(BackwardOptions& options) {
  hook(options, true);
}

void Sharding::attach_accumulation(BackwardOptions& options) {
  hook(options, false);
}

void Sharding::finish_accumulation() {
  if (gradients_ == nullptr) {
    return reducer_->finish_accumulation();
  }
  if (values_ != nullptr) {
    values_->end_sweep();
  }
  gradients_->finish_accumulation();
}

void Sharding::finish() {
  if (gradients_ == nullptr) {
    reducer_->finish();
  } else {
    if (values_ != nullptr) {
      values_->end_sweep();
    }
    if (std::exchange(waits_, false)) {
      (void)join_sharded();
    } else {
      gradients_->finish();
    }
  }
  end_reduction();
}

void Sharding::end_forward() {
  if (values_ != nullptr) {
    values_->end_forward();
  }
}

void Sharding::add_tokens(std::int64_t count) {
  gradients_ != nullptr ? gradients_->add_tokens(count) : reducer_->add_tokens(count);
}

template <class F>
void Sharding::guarded(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    communicator_.abort(fmt::format("exception in backward: {}", e.what()));
    throw;
  }
}

bool Sharding::join() {
  bool live = false;
  guarded([&] {
    live = gradients_ != nullptr ? join_sharded() : reducer_->join();
    if (live) {
      end_reduction();
    }
  });
  return live;
}

bool Sharding::join_sharded() {
  gradients_->prepare_join();
  updated_early_.assign(units_.size(), 0);
  if (values_ != nullptr) {
    for (;;) {  // micro-batches of the others
      const std::optional<AfterForward> kind = values_->join_forward();
      if (!kind) {
        return false;
      }
      if (*kind == GatherWords::reduces) {
        break;
      }
      values_->end_sweep();
    }
    gradients_->wait_for_all(true);
  }
  gradients_->start();
  if (values_ != nullptr) {
    values_->end_sweep();
  }
  gradients_->finish();
  return gradients_->live() > 0;
}

void Sharding::backward(const Variable& loss, BackwardOptions options) {
  guarded([&] {
    attach(options);
    reprise::backward(loss, options);
    finish();
  });
}

void Sharding::accumulate(const Variable& loss, BackwardOptions options) {
  guarded([&] {
    attach_accumulation(options);
    reprise::backward(loss, options);
    finish_accumulation();
  });
}

void Sharding::before_read(const Parameter& p) {
  if (values_ != nullptr) {
    values_->before_read(p);
  }
}

Tensor Sharding::gradient_storage(const Parameter& p) {
  return gradients_ != nullptr ? gradients_->storage(p) : Tensor();
}

std::span<const GatherEvent> Sharding::gathers() const {
  return values_ != nullptr ? std::span<const GatherEvent>(values_->gathers())
                            : std::span<const GatherEvent>();
}

std::span<const std::size_t> Sharding::scattered() const {
  return gradients_ != nullptr ? std::span<const std::size_t>(gradients_->launched())
                               : std::span<const std::size_t>();
}

void Sharding::clear_gathers() {
  if (values_ != nullptr) {
    values_->clear_gathers();
  }
}

Tensor Sharding::gathered(const Parameter& p) const {
  if (values_ == nullptr || !is_sharded(p)) {
    return p.value();
  }
  const std::vector<Part> parts = parts_of(p);
  return assembled(p, parts.empty() ? Tensor() : parts.front().values, p.dtype());
}

Tensor Sharding::gathered_gradient(const Parameter& p) const {
  if (gradients_ == nullptr) {
    return p.has_gradient() ? p.gradient() : Tensor();
  }
  const auto found = slots_.find(&p);
  if (found == slots_.end()) {
    return {};
  }
  const Place place = found->second;
  const ShardUnit& unit = units_[place.unit];
  const ShardUnit::Slot& slot = unit.slots[place.slot];
  if (!unit.trainable || !gradients_->settled(place.unit) || !used(slot.parameter)) {
    return {};
  }
  const auto [first, last] = unit.part_of(slot, communicator_.rank());
  const std::int64_t at = slot.offset + first - communicator_.rank() * unit.slice;
  const Tensor own =
      first < last ? gradients_->shard(place.unit).slice(0, at, at + last - first) : Tensor();
  return assembled(p, own, unit.grad_dtype);
}

// Every rank sends its part straight to its place: no rank has more than its shards and this.
Tensor Sharding::assembled(const Parameter& p, const Tensor& own, DType dtype) const {
  const Place place = slots_.at(&p);
  const ShardUnit& unit = units_[place.unit];
  const ShardUnit::Slot& slot = unit.slots[place.slot];
  const Tensor whole =
      Tensor::empty({slot.numel}, dtype, p.value().device(), MemoryKind::workspace);
  std::vector<Pending> sends;
  for (int r = 0; r < communicator_.size(); ++r) {
    const auto [first, last] = unit.part_of(slot, r);
    if (first >= last) {
      continue;
    }
    const Tensor part = whole.slice(0, first, last);
    if (r == communicator_.rank()) {
      part.copy_from(own);
    }
    sends.push_back(communicator_.broadcast(part, r, {"part of a parameter"}));
  }
  for (const Pending& send : sends) {
    send.wait();
  }
  return whole.reshape(p.shape());
}

}  // namespace reprise::distributed

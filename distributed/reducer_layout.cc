// In which order gradients lie in buckets.
#include <algorithm>

#include "distributed/hash.h"
#include "distributed/reducer.h"

namespace reprise::distributed {
namespace {

constexpr std::size_t kOrdersKept = 64;

}  // namespace

// The plan's parameters as it makes them ready, then the other trainable ones.
std::vector<std::int32_t> Reducer::order_of(const Plan* plan) const {
  std::vector<std::int32_t> order;
  std::vector<char> placed(parameters_.size());
  auto place = [&](std::size_t i) {
    if (placed[i] == 0 && parameters_[i]->trainable()) {
      order.push_back(static_cast<std::int32_t>(i));
      placed[i] = 1;
    }
  };
  if (plan != nullptr) {
    for (const Ready& ready : plan->order) {
      place(index_of(*ready.parameter));
    }
  }
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    place(i);
  }
  return order;
}

std::uint64_t Reducer::plan_hash(const Plan& plan) const {
  Hash hash;
  for (const Ready& ready : plan.order) {
    hash.add(index_of(*ready.parameter)).add(static_cast<std::uint64_t>(ready.expected));
  }
  return hash.value();
}

void Reducer::remember_order(std::uint64_t plan, std::vector<std::int32_t> order) {
  if (orders_.size() >= kOrdersKept) {
    orders_.clear();  // on all ranks at once: they have the same
  }
  orders_[plan] = std::move(order);
}

// False when a layout is missing and no rank has data.
bool Reducer::ensure_layout(const Plan* plan) {
  if (plan != nullptr) {
    plan_ = plan_hash(*plan);
    plan_order_ = order_of(plan);
  }
  if (layout_signature_ == signatures_hash()) {
    if (!next_order_.empty()) {
      bind_buckets(next_order_);
      next_order_.clear();
    }
    return true;
  }
  // Other ranks must be here too before the order is sent.
  for (ParameterState& state : states_) {
    state.used = false;
  }
  start_agreement(/*done=*/plan == nullptr);
  finish_agreement();
  if (lead() < 0) {
    return false;
  }
  layout_plan_ = last_lead_plan_ = rank_word(lead()).plan;
  const Tensor shared =
      Tensor::from(order_of(plan), {std::ranges::count_if(parameters_, &Parameter::trainable)});
  communicator_.broadcast(shared, lead(), {"order of the buckets"}).wait();
  orders_.clear();
  next_order_.clear();
  remember_order(layout_plan_, shared.to_vector<std::int32_t>());
  bind_buckets(orders_[layout_plan_]);
  layout_signature_ = signatures_hash();
  return true;
}

std::vector<Tensor> Reducer::make_set() const {
  std::vector<Tensor> set;
  for (const Bucket& bucket : buckets_) {
    const Device device = parameters_[bucket.slots[0].parameter]->value().device();
    set.push_back(Tensor::zeros({bucket.numel}, bucket.dtype, device, MemoryKind::gradients));
  }
  return set;
}

void Reducer::bind_buckets(std::span<const std::int32_t> order) {
  std::vector<BucketEntry> entries;
  for (const std::int32_t i : order) {
    const auto index = static_cast<std::size_t>(i);
    entries.push_back(
        {index, parameters_[index]->value().numel(), parameters_[index]->grad_dtype()});
  }
  for (std::size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].active && !parameters_[i]->has_gradient() && !parameters_[i]->stale()) {
      parameters_[i]->unbind_gradient();  // so that only what is there is held twice
    }
  }
  buckets_ = lay_out(entries, options_.buckets);
  shard_sums_.release();
  shard_sets_ = 0;
  bucket_states_.assign(buckets_.size(), {});
  for (ParameterState& state : states_) {
    state.active = false;
  }
  active_count_ = order.size();
  std::vector<Tensor> set = make_set();
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    bucket_states_[b].data = std::move(set[b]);
    for (std::size_t s = 0; s < buckets_[b].slots.size(); ++s) {
      const std::size_t i = buckets_[b].slots[s].parameter;
      states_[i].active = true;
      states_[i].bucket = b;
      states_[i].slot = s;
      parameters_[i]->bind_gradient(slot_of(i));
    }
  }
}

// At the end of a step: a plan that comes back is worth its own order. One step alone is not, so
// that branches which alternate do not move the gradients about in every step.
void Reducer::choose_order() {
  const std::uint64_t plan = rank_word(lead()).plan;
  const bool stays = std::exchange(last_lead_plan_, plan) == plan;
  if (!stays || plan == layout_plan_) {
    return;
  }
  if (!orders_.contains(plan)) {
    std::vector<std::int32_t> order = plan_order_;
    order.resize(active_count_);  // a rank that has run out has no plan
    const Tensor shared = Tensor::from(order, {static_cast<std::int64_t>(order.size())});
    communicator_.broadcast(shared, lead(), {"order of the buckets"}).wait();
    remember_order(plan, shared.to_vector<std::int32_t>());
  }
  next_order_ = orders_[plan];
  layout_plan_ = plan;
  ++reorders_;
}

}  // namespace reprise::distributed

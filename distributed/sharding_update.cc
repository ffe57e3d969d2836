// When this rank's optimizer may step: at the end of a reduction, or early, as gradients arrive.
#include <algorithm>
#include <utility>

#include "distributed/sharding.h"

namespace reprise::distributed {

void Sharding::not_read_any_more(const Parameter& p) {
  if (values_ != nullptr) {
    values_->last_read(p);
  }
  const auto found = slots_.find(&p);
  if (updates_ && found != slots_.end() && units_[found->second.unit].trainable) {
    --reads_left_[found->second.unit];
    update_what_can_be();
  }
}

void Sharding::update_what_can_be() {
  if (!updates_ || (values_ != nullptr && values_->in_step())) {
    return;
  }
  gradients_->settle_arrived();
  for (const std::size_t unit : gradients_->launched()) {
    if (updated_early_[unit] == 0 && reads_left_[unit] == 0 && gradients_->settled(unit)) {
      update_unit(unit);
    }
  }
}

void Sharding::update_unit(std::size_t unit) {
  updated_early_[unit] = 1;
  std::vector<Parameter*> parts;
  for (const Shard& shard : owned_) {
    if (shard.unit == unit) {
      bind_gradient_of(shard);
      parts.push_back(shard.parameter.get());
    }
  }
  if (!parts.empty()) {
    update_(parts);
  }
}

void Sharding::update_early(std::function<void(std::span<Parameter* const>)> update) {
  update_ = std::move(update);
  if (reducer_ == nullptr) {
    return;
  }
  if (!update_) {
    return reducer_->update_early({});
  }
  reducer_->update_early([this](std::span<Parameter* const> bucket) {
    std::vector<Parameter*> parts;
    for (const Shard& shard : owned_) {
      if (std::ranges::find(bucket, parameters_[shard.source]) != bucket.end()) {
        bind_gradient_of(shard);
        parts.push_back(shard.parameter.get());
      }
    }
    if (!parts.empty()) {
      update_(parts);
    }
  });
}

void Sharding::end_reduction() {
  for (std::size_t u = 0; gradients_ != nullptr && update_ && u < units_.size(); ++u) {
    if (gradients_->settled(u) && updated_early_[u] == 0) {
      update_unit(u);
    }
  }
  updates_ = false;
  if (!(reducer_ != nullptr && update_)) {  // else it was done bucket by bucket
    bind_shard_gradients();
  }
}

}  // namespace reprise::distributed

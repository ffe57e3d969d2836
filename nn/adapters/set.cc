#include "nn/adapters/set.h"

#include <algorithm>
#include <utility>

#include "nn/embedding.h"
#include "nn/linear.h"

namespace reprise::nn {

NamedAdapter* AdapterSet::find(std::string_view name) const {
  const auto found =
      std::ranges::find_if(adapters_, [&](const auto& adapter) { return adapter->name == name; });
  return found == adapters_.end() ? nullptr : found->get();
}

NamedAdapter& AdapterSet::add(std::unique_ptr<NamedAdapter> adapter) {
  return *adapters_.emplace_back(std::move(adapter));
}

void AdapterSet::attach(NamedAdapter& adapter, bool on) {
  for (const PlacedAdapter& placed : adapter.layers) {
    if (placed.linear != nullptr) {
      placed.linear->set_lora(on ? static_cast<Lora*>(placed.lora.get()) : nullptr);
    } else {
      placed.embedding->set_lora(on ? static_cast<LoraEmbedding*>(placed.lora.get()) : nullptr);
    }
    for (Parameter* parameter : placed.lora->parameters()) {
      parameter->set_trainable(on);
    }
  }
  for (OwnValue& own : adapter.values) {
    Tensor now = own.parameter->value();
    own.parameter->bind_value(std::exchange(own.other, std::move(now)));
    own.parameter->set_trainable(on);
    if (own.parameter->has_gradient() || own.parameter->stale()) {
      own.parameter->zero_gradient();  // it was that of the other value
    }
  }
}

void AdapterSet::activate(NamedAdapter& adapter) {
  if (active_ == &adapter) {
    return;
  }
  deactivate();
  attach(adapter, true);
  active_ = &adapter;
}

void AdapterSet::deactivate() {
  if (active_ != nullptr) {
    attach(*active_, false);
    active_ = nullptr;
  }
}

void AdapterSet::remove(NamedAdapter& adapter) {
  if (active_ == &adapter) {
    deactivate();
  }
  std::erase_if(adapters_, [&](const auto& entry) { return entry.get() == &adapter; });
}

Tensor AdapterSet::base_value(const Parameter& parameter) const {
  if (active_ != nullptr && !active_->merged) {
    for (const OwnValue& own : active_->values) {
      if (own.parameter == &parameter) {
        return own.other;
      }
    }
  }
  return parameter.value();
}

}  // namespace reprise::nn

#include "train/what_fits.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>

#include "core/allocator.h"
#include "core/error.h"
#include "nn/adapters/set.h"
#include "nn/lora.h"
#include "nn/weights/json.h"
#include "train/memory.h"
#include "train/on_device.h"
#include "train/progress.h"

namespace reprise::train {
namespace {

// Which are trained, and the dtypes of their gradients.
void copy_training(nn::Model& from, nn::Model& to) {
  std::unordered_map<std::string_view, Parameter*> by_name;
  for (Parameter* p : from.parameters()) {
    by_name.emplace(p->name(), p);
  }
  for (Parameter* p : to.parameters()) {
    const auto found = by_name.find(p->name());
    if (found == by_name.end()) {
      fail("what_fits", "no parameter {}", p->name());
    }
    p->set_trainable(found->second->trainable());
    if (p->grad_dtype() != found->second->grad_dtype()) {
      p->set_grad_dtype(found->second->grad_dtype());
    }
  }
}

std::string said(const PolicyBytes& policy) {
  return fmt::format("{} with {} ({} bytes)", policy.policy, human_bytes(policy.peak_bytes),
                     policy.peak_bytes);
}

}  // namespace

absl::StatusOr<std::unique_ptr<nn::Model>> model_on_meta(nn::Model& model) {
  absl::StatusOr<nn::JsonReader> config = nn::JsonReader::parse(model.config_json(), "config");
  if (!config.ok()) {
    return config.status();
  }
  const DType dtype = model.parameters().front()->value().dtype();
  absl::StatusOr<std::unique_ptr<nn::Model>> shadow = nn::build_model(*config, {meta, dtype});
  if (!shadow.ok()) {
    return shadow.status();
  }
  try {
    Generator generator;
    for (const auto& adapter : model.adapters().all()) {
      nn::add_lora(**shadow, adapter->config, generator, adapter->name);
    }
    const std::string active = nn::active_adapter(model);
    if (!active.empty()) {
      nn::activate_adapter(**shadow, active);
    }
    copy_training(model, **shadow);
  } catch (const Error& mistake) {
    return absl::FailedPreconditionError(mistake.what());
  }
  return shadow;
}

std::vector<PolicyBytes> bytes_of_policies(nn::Model& on_meta, const TrainerOptions& options,
                                           std::span<const nn::Batch> micro_batches, StepKind kind,
                                           DeviceKind device, std::int64_t others_bytes) {
  const DryRunFor stands_for(device);
  std::vector<nn::Batch> batches;
  for (const nn::Batch& batch : micro_batches) {
    batches.push_back(on(batch, meta));
  }
  Generator generator;
  TrainerOptions dry = options;
  dry.policies = Policies::named("inputs-only");
  Trainer trainer(on_meta, generator, std::move(dry));
  trainer.hooks.unreached = [](const std::vector<Parameter*>&) {};
  if (kind.updates || kind.states) {
    (void)trainer.step(batches, 1e-4, 1);  // the optimizer has its states from here on
  }
  std::vector<PolicyBytes> rows;
  for (const std::string& policy : Policies::names()) {
    trainer.set_policies(Policies::named(policy));
    allocator(meta).reset_peak();
    (void)(kind.updates ? trainer.step(batches, 1e-4, 1) : trainer.forward_backward(batches, 1));
    rows.push_back({policy, allocator(meta).report().peak_bytes - others_bytes});
  }
  std::ranges::stable_sort(rows, {}, &PolicyBytes::peak_bytes);
  return rows;
}

std::string what_fits(nn::Model& model, const TrainerOptions& options,
                      std::span<const nn::Batch> micro_batches, StepKind kind,
                      std::int64_t available_bytes) {
  const Device device = model.parameters().front()->value().device();
  const std::int64_t others_bytes = allocator(meta).report().live_bytes;
  std::vector<PolicyBytes> rows;
  try {
    const auto shadow = model_on_meta(model);
    if (!shadow.ok()) {
      return "";
    }
    rows = bytes_of_policies(**shadow, options, micro_batches, kind, device.kind, others_bytes);
  } catch (const Error&) {
    return "";  // the error that is being explained matters more
  }
  const std::string limit =
      fmt::format("{} ({} bytes)", human_bytes(available_bytes), available_bytes);
  std::string text;
  for (const PolicyBytes& row : rows) {
    if (row.peak_bytes <= available_bytes) {
      text += fmt::format("{}{}", text.empty() ? "" : ", ", said(row));
    }
  }
  if (text.empty()) {
    return fmt::format(
        "; under no policy does this step fit in the {} that {} has: the least is {}", limit,
        to_string(device), said(rows.front()));
  }
  return fmt::format("; in the {} that {} has this step fits under: {}", limit, to_string(device),
                     text);
}

}  // namespace reprise::train

#include "train/policy_table.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include <fmt/format.h>

#include "autograd/dry_run.h"
#include "train/digest.h"
#include "train/on_device.h"
#include "train/progress.h"

namespace reprise::train {
namespace {

void zero_gradients(nn::Model& model) {
  for (Parameter* p : model.parameters()) {
    p->zero_gradient();
  }
}

}  // namespace

std::string gradient_digest(const std::vector<Parameter*>& parameters) {
  Digest digest;
  for (const Parameter* p : parameters) {
    if (p->has_gradient()) {
      digest.add(p->name(), p->gradient());
    }
  }
  return digest.text();
}

std::vector<PolicyRow> policy_table(nn::Model& model, nn::Model& meta_model, const nn::Batch& batch,
                                    int repeats, const SweepHooks& hooks) {
  const nn::Batch meta_batch = on(batch, meta);
  const Device device = model.parameters().front()->value().device();
  const DryRunFor stands_for(device.kind);
  std::vector<PolicyRow> rows;
  for (const std::string& name : Policies::names()) {
    PolicyRow row;
    row.policy = name;
    zero_gradients(meta_model);
    const StepReport predicted =
        dry_run([&] { return meta_model.loss(meta_batch); }, Policies::named(name));
    row.predicted_bytes = predicted.peak_transient_bytes;
    row.predicted_host_bytes = predicted.host_peak_bytes;
    zero_gradients(meta_model);
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
      hooks.zero_gradients ? hooks.zero_gradients() : zero_gradients(model);
      wait_for(device);
      const auto start = std::chrono::steady_clock::now();
      BackwardOptions options;
      if (hooks.before) {
        hooks.before(options);
      }
      const StepReport step =
          measure_step([&] { return model.loss(batch); }, Policies::named(name), device, options);
      if (hooks.after) {
        hooks.after();
      }
      wait_for(device);
      times.push_back(
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
              .count());
      row.measured_bytes = step.peak_transient_bytes;
      row.measured_host_bytes = step.host_peak_bytes;
      row.replayed_records = step.tape.replayed_records;
    }
    std::ranges::sort(times);
    row.step_ms = times[times.size() / 2];
    row.digest = hooks.digest ? hooks.digest() : gradient_digest(model.parameters());
    rows.push_back(std::move(row));
  }
  hooks.zero_gradients ? hooks.zero_gradients() : zero_gradients(model);
  return rows;
}

std::string to_string(const std::vector<PolicyRow>& rows) {
  std::string text =
      fmt::format("{:<21} {:>12} {:>12} {:>12} {:>10} {:>10}  {}\n", "policy", "predicted",
                  "measured", "in host", "step", "replayed", "digest of all gradients");
  for (const PolicyRow& row : rows) {
    text += fmt::format("{:<21} {:>12} {:>12} {:>12} {:>7.1f} ms {:>10}  {}\n", row.policy,
                        human_bytes(row.predicted_bytes), human_bytes(row.measured_bytes),
                        human_bytes(row.measured_host_bytes), row.step_ms, row.replayed_records,
                        row.digest);
  }
  return text;
}

bool agree(const std::vector<PolicyRow>& rows) {
  return std::ranges::all_of(rows, [&](const PolicyRow& row) {
    const auto difference = static_cast<double>(std::abs(row.predicted_bytes - row.measured_bytes));
    return row.digest == rows.front().digest &&
           row.predicted_host_bytes == row.measured_host_bytes &&
           difference <= 0.01 * static_cast<double>(row.measured_bytes);
  });
}

}  // namespace reprise::train

#include "train/memory.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "autograd/dry_run.h"
#include "core/error.h"
#include "distributed/predicted_world.h"
#include "distributed/reducer.h"
#include "distributed/sharding.h"
#include "nn/lora.h"
#include "nn/optimizer/adamw.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "train/progress.h"

namespace reprise::train {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::unique_ptr<nn::Model>> build(const std::string& config, nn::Place place) {
  const std::string file =
      fs::is_directory(config) ? (fs::path(config) / "config.json").string() : config;
  absl::StatusOr<nn::JsonReader> json = nn::JsonReader::open(file);
  return json.ok() ? nn::build_model(*json, place) : json.status();
}

absl::Status add_adapter(nn::Model& model, const DryRunOptions& options) {
  if (options.lora_rank == 0) {
    return absl::OkStatus();
  }
  Generator generator;
  try {
    nn::add_lora(model,
                 {.rank = options.lora_rank,
                  .alpha = static_cast<double>(options.lora_rank),
                  .weight_decomposed = options.weight_decomposed,
                  .targets = {options.targets, ""},
                  .all_linear = options.targets.empty()},
                 generator);
  } catch (const Error& mistake) {
    return absl::InvalidArgumentError(mistake.what());
  }
  return absl::OkStatus();
}

// A model on meta that would train, and a batch of text for it.
struct Subject {
  std::unique_ptr<nn::Model> model;
  nn::Batch batch;
};

Subject with_text(std::unique_ptr<nn::Model> model, const DryRunOptions& options) {
  Subject subject{std::move(model), {}};
  const Shape shape{options.batch, options.tokens};
  subject.batch.ids = Tensor::zeros(shape, DType::i64, meta);
  subject.batch.labels = subject.batch.ids;
  return subject;
}

absl::StatusOr<Subject> subject_of(const std::string& config, const DryRunOptions& options) {
  absl::StatusOr<std::unique_ptr<nn::Model>> model = build(config, {meta, options.dtype});
  if (!model.ok()) {
    return model.status();
  }
  const absl::Status added = add_adapter(**model, options);
  if (!added.ok()) {
    return added;
  }
  return with_text(*std::move(model), options);
}

std::int64_t count(const std::vector<Parameter*>& parameters) {
  std::int64_t total = 0;
  for (const Parameter* p : parameters) {
    total += p->shape().numel();
  }
  return total;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

MemoryRow measure(Subject& subject, const std::string& policy) {
  const auto start = std::chrono::steady_clock::now();
  const StepReport step =
      dry_run([&] { return subject.model->loss(subject.batch); }, Policies::named(policy));
  return {.policy = policy,
          .peak_bytes = step.peak_bytes,
          .at_peak = step.at_peak,
          .peak_transient_bytes = step.peak_transient_bytes,
          .host_peak_bytes = step.host_peak_bytes,
          .forward_flops = step.forward_flops,
          .backward_flops = step.backward_flops,
          .replay_flops = step.replay_flops,
          .seconds = seconds_since(start)};
}

std::vector<std::string> policies_of(const DryRunOptions& options) {
  return options.policy.empty() ? Policies::names() : std::vector<std::string>{options.policy};
}

// Steps of a first rank whose others are not there. The first step makes the optimizer's states;
// later ones are measured.
std::vector<MemoryRow> measure_rank(Subject& subject, const DryRunOptions& options,
                                    Generator& generator) {
  const auto world = distributed::predicted_world(0, options.ranks);
  std::optional<distributed::Sharding> sharding;
  std::optional<distributed::Reducer> reducer;
  nn::Model& model = *subject.model;
  if (options.stage > 0) {
    const std::vector<Parameter*> parameters = model.parameters();
    const distributed::ForwardReads reads =
        distributed::record_reads(parameters, [&] { (void)model.loss(subject.batch); });
    sharding.emplace(*world, parameters, reads,
                     distributed::ShardingOptions{
                         .stage = options.stage,
                         .gather_again = static_cast<std::size_t>(options.gather_again)});
  } else {
    reducer.emplace(*world, model.trainable_parameters());
  }
  Trainer trainer(model, generator, {}, sharding ? &*sharding : nullptr);
  if (reducer) {
    trainer.hooks.before = [&](BackwardOptions& backward) { reducer->attach(backward); };
    trainer.hooks.after = [&] { reducer->finish(); };
  }
  std::vector<MemoryRow> rows;
  (void)trainer.step(subject.batch, 1e-4);
  for (const std::string& policy : policies_of(options)) {
    rows.push_back(measured_step(trainer, subject.batch, policy, meta));
  }
  return rows;
}

std::string adapter_text(const MemoryTable& table) {
  const DryRunOptions& o = table.options;
  if (o.lora_rank == 0) {
    return "";
  }
  return fmt::format(
      ", {} of rank {} on {} ({} parameters)", o.weight_decomposed ? "DoRA" : "LoRA", o.lora_rank,
      o.targets.empty() ? "every linear layer" : fmt::format("{}", fmt::join(o.targets, ", ")),
      table.trainable);
}

MemoryTable table_of(Subject& subject, const DryRunOptions& options) {
  const DryRunFor stands_for(options.device);
  nn::Model& model = *subject.model;
  MemoryTable table{.model = std::string(model.type()), .options = options};
  const std::vector<Parameter*> trainable = model.trainable_parameters();
  table.trainable = count(trainable);
  table.parameters = count(model.parameters()) - (options.lora_rank > 0 ? table.trainable : 0);
  Generator generator;
  model.train(generator);
  if (options.ranks > 1 || options.stage > 0) {
    table.rows = measure_rank(subject, options, generator);
    return table;
  }
  nn::AdamW optimizer(trainable);
  // The optimizer has its states from the first step on; the second is measured.
  (void)measure(subject, "inputs-only");
  optimizer.step(1e-4);
  for (const std::string& policy : policies_of(options)) {
    optimizer.zero_gradients();
    table.rows.push_back(measure(subject, policy));
  }
  return table;
}

}  // namespace

absl::StatusOr<MemoryTable> predict_memory(const std::string& config,
                                           const DryRunOptions& options) {
  absl::StatusOr<Subject> subject = subject_of(config, options);
  if (!subject.ok()) {
    return subject.status();
  }
  try {
    return table_of(*subject, options);
  } catch (const Error& mistake) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", config, mistake.what()));
  }
}

MemoryTable predict_memory(std::unique_ptr<nn::Model> on_meta, const DryRunOptions& options) {
  Subject subject = with_text(std::move(on_meta), options);
  return table_of(subject, options);
}

MemoryRow measured_step(Trainer& trainer, const nn::Batch& batch, const std::string& policy,
                        Device device) {
  const auto start = std::chrono::steady_clock::now();
  trainer.set_policies(Policies::named(policy));
  allocator(device).reset_peak();
  allocator(host_of(device)).reset_peak();
  (void)trainer.step(batch, 1e-4);
  const MemoryReport used = allocator(device).report();
  const TapeReport& tape = trainer.tape_report();
  return {.policy = policy,
          .peak_bytes = used.peak_bytes,
          .at_peak = used.at_peak,
          .peak_transient_bytes = used.peak_transient_bytes,
          .host_peak_bytes = allocator(host_of(device)).report().peak_bytes,
          .forward_flops = tape.forward_flops,
          .backward_flops = tape.backward_flops,
          .replay_flops = tape.replay_flops,
          .seconds = seconds_since(start)};
}

std::string to_text(const MemoryTable& table) {
  const DryRunOptions& o = table.options;
  const std::string job =
      o.ranks == 1 && o.stage == 0
          ? ""
          : fmt::format("; a rank of {}, {}", o.ranks,
                        o.stage == 0 ? "not sharded" : fmt::format("sharding stage {}", o.stage)) +
                (o.gather_again == 0 ? ""
                                     : fmt::format(", gathering again after {}", o.gather_again));
  std::string text =
      fmt::format("{}, {} parameters in {}{}{}; {} x {} tokens, AdamW{}\n\n", table.model,
                  table.parameters, name(o.dtype), o.device == DeviceKind::cuda ? " on cuda" : "",
                  adapter_text(table), o.batch, o.tokens, job);
  text += fmt::format("{:<21} {:>11}", "policy", "peak");
  const auto column = [](std::size_t kind) {
    return std::max<std::size_t>(11, name(static_cast<MemoryKind>(kind)).size());
  };
  const auto shown = [&](std::size_t kind) {
    return static_cast<MemoryKind>(kind) != MemoryKind::communication || o.ranks > 1;
  };
  for (std::size_t kind = 0; kind < kMemoryKinds; ++kind) {
    if (shown(kind)) {
      text += fmt::format(" {:>{}}", name(static_cast<MemoryKind>(kind)), column(kind));
    }
  }
  text += fmt::format(" {:>11} {:>9}\n", "in host", "replayed");
  for (const MemoryRow& row : table.rows) {
    text += fmt::format("{:<21} {:>11}", row.policy, human_bytes(row.peak_bytes));
    for (std::size_t kind = 0; kind < kMemoryKinds; ++kind) {
      if (shown(kind)) {
        text += fmt::format(" {:>{}}", human_bytes(row.at_peak[kind]), column(kind));
      }
    }
    const auto once = static_cast<double>(row.forward_flops + row.backward_flops);
    text += fmt::format(" {:>11} {:>8.1f}%\n", human_bytes(row.host_peak_bytes),
                        100 * static_cast<double>(row.replay_flops) / once);
  }
  return text;
}

std::string to_json(const MemoryTable& table) {
  const DryRunOptions& o = table.options;
  nlohmann::ordered_json json = {{"model", table.model},
                                 {"parameters", table.parameters},
                                 {"trainable", table.trainable},
                                 {"device", o.device == DeviceKind::cuda ? "cuda" : "cpu"},
                                 {"dtype", name(o.dtype)},
                                 {"batch", o.batch},
                                 {"tokens", o.tokens},
                                 {"lora_rank", o.lora_rank},
                                 {"ranks", o.ranks},
                                 {"stage", o.stage},
                                 {"rows", nlohmann::ordered_json::array()}};
  for (const MemoryRow& row : table.rows) {
    nlohmann::ordered_json entry = {{"policy", row.policy},
                                    {"peak_bytes", row.peak_bytes},
                                    {"peak_transient_bytes", row.peak_transient_bytes},
                                    {"host_peak_bytes", row.host_peak_bytes}};
    for (std::size_t kind = 0; kind < kMemoryKinds; ++kind) {
      entry["at_peak"][std::string(name(static_cast<MemoryKind>(kind)))] = row.at_peak[kind];
    }
    entry["forward_flops"] = row.forward_flops;
    entry["backward_flops"] = row.backward_flops;
    entry["replay_flops"] = row.replay_flops;
    entry["seconds"] = row.seconds;
    json["rows"].push_back(std::move(entry));
  }
  return json.dump(2) + "\n";
}

absl::StatusOr<std::string> explain_config(const std::string& config,
                                           const DryRunOptions& options) {
  absl::StatusOr<Subject> subject = subject_of(config, options);
  if (!subject.ok()) {
    return subject.status();
  }
  std::string text;
  try {
    (void)dry_run([&] { return subject->model->loss(subject->batch); },
                  Policies::named(options.policy.empty() ? "inputs-only" : options.policy),
                  [&](const Tape& tape) { text = explain(tape); });
  } catch (const Error& mistake) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", config, mistake.what()));
  }
  return text;
}

absl::StatusOr<std::string> init_folder(const std::string& config, const std::string& folder,
                                        const InitOptions& options) {
  for (const char* file : {"model.safetensors", "model.safetensors.index.json"}) {
    if (fs::exists(fs::path(folder) / file)) {
      return absl::FailedPreconditionError(
          fmt::format("{}: there are weights already: name another folder", folder));
    }
  }
  absl::StatusOr<std::unique_ptr<nn::Model>> model = build(config, {cpu, options.dtype});
  if (!model.ok()) {
    return model.status();
  }
  Generator generator{options.seed};
  (*model)->initialize(generator);
  const absl::Status saved =
      nn::save_model(**model, folder, {.max_shard_bytes = options.max_shard_bytes});
  if (!saved.ok()) {
    return saved;
  }
  const std::int64_t parameters = count((*model)->parameters());
  return fmt::format(
      "{}: {} with {} parameters, {}\n", folder, (*model)->type(), parameters,
      human_bytes(parameters * static_cast<std::int64_t>(size_bytes(options.dtype))));
}

}  // namespace reprise::train

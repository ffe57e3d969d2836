// Training steps of a model under a policy: tokens/s, peak bytes by kind, resident set, what the
// driver has given out. Prints one JSON object, in the form of bench/peers/torch_step.py.
//
//   step --model gpt2 --policy inputs-only --dtype f32 --batch 4 --tokens 512
//   step --folder DIR --adapter DIR --lora 16 --device cuda --fresh   weights that a peer has too
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include <fmt/format.h>

#include "autograd/dry_run.h"
#include "core/cuda_device.h"
#include "core/error.h"
#include "core/parallel.h"
#include "nn/lora.h"
#include "nn/models/language_model.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "train/on_device.h"
#include "train/progress.h"
#include "train/trainer.h"

namespace reprise::bench {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string model = "gpt2", config, folder, adapter;
  std::string policy = "keep-all", dtype = "f32", place = "cpu";
  std::int64_t batch = 4, tokens = 512, layers = 0, lora = 0;
  int threads = 2, warmup = 2, steps = 5, keep_first = 0;
  double learning_rate = 1e-4;
  bool masters = false, dry_run = false, all_linear = false, fresh = false, graph = false;
  Device device = cpu;  // of --device, or meta

  DType type() const { return dtype == "bf16" ? DType::bf16 : DType::f32; }
};

[[noreturn]] void refuse(const absl::Status& status) {
  fail("bench", "{}", std::string(status.message()));
}
template <class T>
T taken(absl::StatusOr<T> result) {
  if (!result.ok()) {
    refuse(result.status());
  }
  return *std::move(result);
}

std::string config_of(const Options& options) {
  nlohmann::json config;
  if (options.model == "gpt2") {
    config = {{"model_type", "gpt2"}, {"vocab_size", 50257}, {"n_positions", 1024},
              {"n_embd", 768},        {"n_layer", 12},       {"n_head", 12},
              {"resid_pdrop", 0.0},   {"embd_pdrop", 0.0},   {"attn_pdrop", 0.0}};
    if (options.layers > 0) {
      config["n_layer"] = options.layers;
    }
  } else if (options.model == "qwen2-0.5b") {
    config = {{"model_type", "qwen2"},
              {"vocab_size", 151936},
              {"hidden_size", 896},
              {"intermediate_size", 4864},
              {"num_hidden_layers", 24},
              {"num_attention_heads", 14},
              {"num_key_value_heads", 2},
              {"rms_norm_eps", 1e-6},
              {"rope_theta", 1e6},
              {"tie_word_embeddings", true},
              {"max_position_embeddings", 32768}};
    if (options.layers > 0) {
      config["num_hidden_layers"] = options.layers;
    }
  } else {
    fail("bench", "model must be gpt2 or qwen2-0.5b, got {}", options.model);
  }
  return config.dump();
}

std::unique_ptr<nn::LanguageModel> built(nn::JsonReader json, const Options& options,
                                         Generator& generator) {
  auto model = taken(nn::build_language_model(json, {options.device, options.type()}));
  model->initialize(generator);
  return model;
}

// An adapter of its own, or one of a folder, which is written when it is not there: with it and
// the weights a peer starts from the same numbers.
void adapt(nn::LanguageModel& model, const Options& options, Generator& generator) {
  if (options.lora == 0) {
    return;
  }
  const bool kept = !options.adapter.empty();
  if (kept && std::filesystem::exists(options.adapter)) {
    (void)taken(nn::load_adapter(model, options.adapter));
    return;
  }
  nn::LoraConfig config;  // its targets are those PEFT has for the model: q_proj and v_proj
  config.rank = options.lora;
  config.alpha = 2.0 * static_cast<double>(options.lora);
  config.all_linear = options.all_linear;
  nn::add_lora(model, config, generator);
  if (const absl::Status saved = kept ? nn::save_adapter(model, options.adapter) : absl::OkStatus();
      !saved.ok()) {
    refuse(saved);
  }
}

std::unique_ptr<nn::LanguageModel> subject(const Options& options, Generator& generator) {
  std::unique_ptr<nn::LanguageModel> model;
  if (!options.folder.empty() && options.device != meta) {
    auto loaded = taken(
        nn::load_model(options.folder, {.place = {options.device, options.type()}, .map = false}));
    ensure(dynamic_cast<nn::LanguageModel*>(loaded.get()) != nullptr, "{} is no language model",
           options.folder);
    model.reset(static_cast<nn::LanguageModel*>(loaded.release()));
  } else if (!options.folder.empty() || !options.config.empty()) {
    const std::string file =
        options.folder.empty() ? options.config : options.folder + "/config.json";
    model = built(taken(nn::JsonReader::open(file)), options, generator);
  } else {
    model = built(taken(nn::JsonReader::parse(config_of(options), "bench")), options, generator);
  }
  adapt(*model, options, generator);
  return model;
}

// SplitMix64 of the place in the run, which a peer can draw too.
std::int64_t token(std::uint64_t place, std::int64_t vocabulary) {
  std::uint64_t z = (place + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<std::int64_t>((z ^ (z >> 31)) % static_cast<std::uint64_t>(vocabulary));
}

nn::Batch batch_of(const nn::LanguageModel& model, const Options& options, int step) {
  std::vector<std::int64_t> ids(static_cast<std::size_t>(options.batch * options.tokens));
  const std::uint64_t first = options.fresh ? static_cast<std::uint64_t>(step) * ids.size() : 0;
  // Of tokens that are few there is something to be learned, though each batch is another.
  const std::int64_t most = options.fresh ? 256 : model.vocabulary();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = token(first + i, std::min(model.vocabulary(), most));
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {options.batch, options.tokens}, options.device);
  return batch;
}

nlohmann::json by_kind(const BytesByKind& bytes) {
  nlohmann::json json;
  for (std::size_t kind = 0; kind < kMemoryKinds; ++kind) {
    json[std::string(name(static_cast<MemoryKind>(kind)))] = bytes[kind];
  }
  return json;
}

std::int64_t count(const std::vector<Parameter*>& parameters) {
  std::int64_t total = 0;
  for (const Parameter* p : parameters) {
    total += p->shape().numel();
  }
  return total;
}

// What the driver has given out on the device, to everybody; 0 where there is none.
std::int64_t driver_bytes(Device device) {
  if (device.kind != DeviceKind::cuda) {
    return 0;
  }
  const CudaBytes memory = cuda_bytes(device);
  return memory.total_bytes - memory.free_bytes;
}

Policies policies_of(const Options& options) {
  if (options.keep_first == 0) {
    return Policies::named(options.policy);
  }
  Policies policies;
  for (int block = 0; block < options.keep_first; ++block) {
    policies.set(fmt::format("*.{}", block), keep_all());
  }
  if (options.policy == "keep-products") {
    policies.set("*", keep_products());
  } else if (options.policy != "inputs-only") {
    fail("bench", "--keep-first goes with keep-products or inputs-only, got {}", options.policy);
  }
  return policies;
}

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

nlohmann::json described(const Options& options) {
  return {{"peer", "reprise"},
          {"model", options.folder.empty() && options.config.empty() ? options.model
                    : options.folder.empty()                         ? options.config
                                                                     : options.folder},
          {"mode", options.policy},
          {"keep_first", options.keep_first},
          {"device", to_string(options.device)},
          {"dtype", options.dtype},
          {"lora", options.lora},
          {"master_weights", options.masters},
          {"batch", options.batch},
          {"tokens", options.tokens},
          {"threads", options.threads}};
}

nlohmann::json run(Options options) {
  set_threads(options.threads);
  const Device place = taken(train::parse_device(options.place));
  const DryRunFor stands_for(place.kind);
  options.device = options.dry_run ? meta : place;
  if (const absl::Status usable = train::expect_usable(options.device); !usable.ok()) {
    refuse(usable);
  }
  const Device device = options.device;
  const std::int64_t resident_before = train::resident_bytes();
  const std::int64_t driver_before = driver_bytes(device);
  Generator generator{1, 0};
  const auto model = subject(options, generator);
  train::wait_for(device);
  const auto ready = Clock::now();  // its weights are on the device
  train::TrainerOptions trainer_options;
  trainer_options.max_norm = 0;
  trainer_options.adamw.weight_decay = 0.1;
  trainer_options.adamw.master_weights = options.masters;
  trainer_options.policies = policies_of(options);
  trainer_options.graph = options.graph ? train::StepGraphs::on : train::StepGraphs::off;
  train::Trainer trainer(*model, generator, trainer_options);
  std::vector<double> times, losses;
  double first_ms = 0;
  for (int i = 0; i < options.warmup + options.steps; ++i) {
    const nn::Batch batch = batch_of(*model, options, i);
    train::wait_for(device);
    if (i == options.warmup) {
      allocator(device).reset_peak();
    }
    const auto start = Clock::now();
    losses.push_back(trainer.step(batch, options.learning_rate));
    train::wait_for(device);
    times.push_back(ms_since(start));
    if (i == 0) {
      first_ms = ms_since(ready);
    }
  }
  times.erase(times.begin(), times.begin() + options.warmup);
  std::vector<double> sorted = times;
  std::ranges::sort(sorted);
  const MemoryReport memory = allocator(device).report();
  const TapeReport& tape = trainer.tape_report();
  const double median_s = sorted[sorted.size() / 2] / 1e3;
  nlohmann::json json = described(options);
  json.update({{"parameters", count(model->parameters())},
               {"trained", count(model->trainable_parameters())},
               {"tokens_per_s", static_cast<double>(options.batch * options.tokens) / median_s},
               {"step_ms", times},
               {"first_step_ms", first_ms},
               {"peak_bytes", memory.peak_bytes},
               {"peak_by_kind", by_kind(memory.at_peak)},
               {"driver_bytes", driver_bytes(device)},
               {"driver_bytes_before", driver_before},
               {"peak_resident_mib", static_cast<double>(train::peak_resident_bytes()) / (1 << 20)},
               {"resident_before_mib", static_cast<double>(resident_before) / (1 << 20)},
               {"replayed_records", tape.replayed_records},
               {"flops", tape.forward_flops + tape.backward_flops},
               {"replay_flops", tape.replay_flops},
               {"graph_launches", trainer.launches()},
               {"losses", losses}});
  return json;
}

}  // namespace
}  // namespace reprise::bench

int main(int argc, char** argv) {
  reprise::bench::Options options;
  CLI::App app("Training steps under a policy, as JSON.", "step");
  app.add_option("--model", options.model, "gpt2 or qwen2-0.5b");
  app.add_option("--config", options.config, "Another model: a config.json; random weights");
  app.add_option("--folder", options.folder, "A model folder, whose weights are read");
  app.add_option("--adapter", options.adapter,
                 "Of --lora: a folder to read, or to write when it is not there");
  app.add_option("--policy", options.policy)->check(CLI::IsMember(reprise::Policies::names()));
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--device", options.place, "cpu, cuda or cuda:N");
  app.add_flag("--masters", options.masters, "float32 master weights");
  app.add_flag("--dry-run", options.dry_run, "On meta: peak bytes predicted, no time or loss");
  app.add_flag("--graph", options.graph,
               "Steps are launches of a captured graph, from the third on (cuda)");
  app.add_flag("--fresh", options.fresh, "Another batch at every step");
  app.add_flag("--all-linear", options.all_linear, "The adapter on every linear layer");
  app.add_option("--keep-first", options.keep_first, "Blocks from the first on that keep all");
  app.add_option("--learning-rate", options.learning_rate);
  app.add_option("--batch", options.batch);
  app.add_option("--tokens", options.tokens);
  app.add_option("--layers", options.layers, "Instead of the model's own number");
  app.add_option("--lora", options.lora, "Rank of an adapter; the rest is frozen");
  app.add_option("--threads", options.threads);
  app.add_option("--warmup", options.warmup)->check(CLI::PositiveNumber);
  app.add_option("--steps", options.steps)->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    fmt::print("{}\n", reprise::bench::run(options).dump());
  } catch (const std::exception& error) {
    fmt::print(stderr, "step: {}\n", error.what());
    return 2;
  }
  return 0;
}

// One training step of a model under a policy: tokens/s, peak bytes by kind, resident set. Prints
// one JSON object, in the form of bench/peers/torch_step.py.
//
//   step --model gpt2 --policy inputs-only --dtype f32 --batch 4 --tokens 512
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include <fmt/format.h>

#include "autograd/dry_run.h"
#include "core/error.h"
#include "core/parallel.h"
#include "nn/lora.h"
#include "nn/models/language_model.h"
#include "nn/weights/json.h"
#include "train/progress.h"
#include "train/trainer.h"

namespace reprise::bench {
namespace {

struct Options {
  std::string model = "gpt2", policy = "keep-all", dtype = "f32";
  std::int64_t batch = 4, tokens = 512, layers = 0, lora = 0;
  int threads = 2, warmup = 2, steps = 5;
  bool masters = false, dry_run = false;
};

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

std::unique_ptr<nn::LanguageModel> build(const Options& options, Device device) {
  auto config = nn::JsonReader::parse(config_of(options), "bench");
  if (!config.ok()) {
    fail("bench", "{}", std::string(config.status().message()));
  }
  const DType dtype = options.dtype == "bf16" ? DType::bf16 : DType::f32;
  auto model = nn::build_language_model(*config, {device, dtype});
  if (!model.ok()) {
    fail("bench", "{}", std::string(model.status().message()));
  }
  return *std::move(model);
}

nn::Batch random_batch(const nn::LanguageModel& model, const Options& options) {
  Generator generator{7, 0};
  std::vector<std::int64_t> ids(static_cast<std::size_t>(options.batch * options.tokens));
  for (std::int64_t& id : ids) {
    id = philox(generator.seed, generator.reserve(4))[0] % model.vocabulary();
  }
  nn::Batch batch;
  const Device device = options.dry_run ? meta : cpu;
  batch.ids = batch.labels = Tensor::from(ids, {options.batch, options.tokens}, device);
  return batch;
}

nlohmann::json by_kind(const BytesByKind& bytes) {
  nlohmann::json json;
  for (std::size_t kind = 0; kind < kMemoryKinds; ++kind) {
    json[std::string(name(static_cast<MemoryKind>(kind)))] = bytes[kind];
  }
  return json;
}

nlohmann::json run(const Options& options) {
  set_threads(options.threads);
  const Device device = options.dry_run ? meta : cpu;
  const std::int64_t resident_before = train::resident_bytes();
  const auto model = build(options, device);
  Generator generator{1, 0};
  model->initialize(generator);
  if (options.lora > 0) {
    nn::LoraConfig config;  // its targets are those PEFT has for the model: q_proj and v_proj
    config.rank = options.lora;
    config.alpha = 2.0 * static_cast<double>(options.lora);
    nn::add_lora(*model, config, generator);
  }
  train::TrainerOptions trainer_options;
  trainer_options.max_norm = 0;
  trainer_options.adamw.weight_decay = 0.1;
  trainer_options.adamw.master_weights = options.masters;
  trainer_options.policies = Policies::named(options.policy);
  train::Trainer trainer(*model, generator, trainer_options);
  const nn::Batch batch = random_batch(*model, options);
  std::vector<double> times, losses;
  for (int i = 0; i < options.warmup + options.steps; ++i) {
    if (i == options.warmup) {
      allocator(device).reset_peak();
    }
    const auto start = std::chrono::steady_clock::now();
    losses.push_back(trainer.step(batch, 1e-4));
    times.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
            .count());
  }
  const double first_ms = times.front();
  times.erase(times.begin(), times.begin() + options.warmup);
  std::vector<double> sorted = times;
  std::ranges::sort(sorted);
  const MemoryReport memory = allocator(device).report();
  const TapeReport& tape = trainer.tape_report();
  const double median_s = sorted[sorted.size() / 2] / 1e3;
  return {{"peer", "reprise"},
          {"model", options.model},
          {"mode", options.policy},
          {"dtype", options.dtype},
          {"lora", options.lora},
          {"master_weights", options.masters},
          {"batch", options.batch},
          {"tokens", options.tokens},
          {"threads", options.threads},
          {"tokens_per_s", static_cast<double>(options.batch * options.tokens) / median_s},
          {"step_ms", times},
          {"first_step_ms", first_ms},
          {"peak_bytes", memory.peak_bytes},
          {"peak_by_kind", by_kind(memory.at_peak)},
          {"peak_resident_mib", static_cast<double>(train::peak_resident_bytes()) / (1 << 20)},
          {"resident_before_mib", static_cast<double>(resident_before) / (1 << 20)},
          {"replayed_records", tape.replayed_records},
          {"flops", tape.forward_flops + tape.backward_flops},
          {"replay_flops", tape.replay_flops},
          {"losses", losses}};
}

}  // namespace
}  // namespace reprise::bench

int main(int argc, char** argv) {
  reprise::bench::Options options;
  CLI::App app("One training step under a policy, as JSON.", "step");
  app.add_option("--model", options.model, "gpt2 or qwen2-0.5b");
  app.add_option("--policy", options.policy)->check(CLI::IsMember(reprise::Policies::names()));
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16"}));
  app.add_flag("--masters", options.masters, "float32 master weights");
  app.add_flag("--dry-run", options.dry_run, "On meta: peak bytes predicted, no time or loss");
  app.add_option("--batch", options.batch);
  app.add_option("--tokens", options.tokens);
  app.add_option("--layers", options.layers, "Instead of the model's own number");
  app.add_option("--lora", options.lora, "Rank of an adapter; the rest is frozen");
  app.add_option("--threads", options.threads);
  app.add_option("--warmup", options.warmup);
  app.add_option("--steps", options.steps);
  CLI11_PARSE(app, argc, argv);
  try {
    fmt::print("{}\n", reprise::bench::run(options).dump());
  } catch (const std::exception& error) {
    fmt::print(stderr, "step: {}\n", error.what());
    return 1;
  }
  return 0;
}

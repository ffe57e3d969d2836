#include "train/demo.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <optional>
#include <utility>

#include <absl/status/statusor.h>
#include <fmt/format.h>

#include "core/error.h"
#include "core/parallel.h"
#include "distributed/disagreement.h"
#include "distributed/header.h"
#include "distributed/reducer.h"
#include "distributed/sharding.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "train/digest.h"
#include "train/on_device.h"
#include "train/policy_table.h"
#include "train/progress.h"
#include "train/sample.h"
#include "train/text.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

constexpr std::int64_t kBatch = 8;
constexpr std::int64_t kTokens = 128;
constexpr double kWarmup = 0.03;  // of the run
constexpr int kValidationBatches = 8;
constexpr std::string_view kPrompt = "The ";

constexpr const char* kConfig = R"({
  "model_type": "llama", "vocab_size": 256, "hidden_size": 320, "intermediate_size": 864,
  "num_hidden_layers": 8, "num_attention_heads": 5, "num_key_value_heads": 5,
  "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  "tie_word_embeddings": true, "initializer_range": 0.02
})";

double elapsed_s(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

// Warmup, then a cosine to a tenth, over the share of the run that is done.
double learning_rate(double highest, double fraction) {
  if (fraction < kWarmup) {
    return highest * (0.05 + 0.95 * fraction / kWarmup);
  }
  const double along = std::min(1.0, (fraction - kWarmup) / (1 - kWarmup));
  return highest * (0.1 + 0.45 * (1 + std::cos(std::numbers::pi * along)));
}

double validation_loss(Trainer& trainer, const ByteData& data, Device device) {
  double sum = 0;
  const auto count = std::min<std::int64_t>(kValidationBatches, data.validation_batches());
  for (std::int64_t i = 0; i < count; ++i) {
    sum += trainer.evaluate(data.validation(i, device));
  }
  return sum / static_cast<double>(count);
}

// On rank 0, or with values that are cut on all ranks, of which rank 0 prints.
void print_sample(nn::LanguageModel& model, const char* when, std::uint64_t seed, bool prints,
                  distributed::Sharding* sharding) {
  if (!prints && (sharding == nullptr || sharding->stage() < 3)) {
    return;
  }
  Generator generator{seed + 100, 0};
  model.evaluate();
  const std::string text = sample_text(
      model, kPrompt, 200, kTokens, 0.8, generator,
      sharding == nullptr ? std::function<void()>() : [=] { sharding->end_forward(); });
  if (!prints) {
    return;
  }
  fmt::print("\nSampled text {}:\n| ", when);
  for (char c : text) {
    fmt::print("{}{}", c, c == '\n' ? "| " : "");
  }
  fmt::print("\n\n");
}

// A forward of what the ranks train, without values.
distributed::ForwardReads reads_of(nn::LanguageModel& meta_model, const ByteData& data) {
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::zeros({data.batch(), kTokens}, DType::i64, meta);
  return distributed::record_reads(meta_model.parameters(), [&] { (void)meta_model.loss(batch); });
}

// For sweeps besides the trainer's.
SweepHooks hooks_of(distributed::Sharding& sharding) {
  SweepHooks hooks;
  hooks.before = [&](BackwardOptions& backward) { sharding.attach(backward); };
  hooks.after = [&] { sharding.finish(); };
  hooks.zero_gradients = [&] { sharding.zero_gradients(); };
  hooks.digest = [&] {
    Digest digest;
    for (const Parameter* p : sharding.parameters()) {
      if (const Tensor gradient = sharding.gathered_gradient(*p); gradient.defined()) {
        digest.add(p->name(), gradient);
      }
    }
    return digest.text();
  };
  return hooks;
}

// What a rank draws from: one generator a shard, or its own.
class Shards {
 public:
  Shards(const DemoOptions& options, const distributed::Communicator& ranks)
      : device_(options.device) {
    const int count = options.shards > 0 ? options.shards / ranks.size() : 1;
    for (int s = 0; s < count; ++s) {  // at places of the stream that are far apart
      generators_.push_back(
          {options.seed + 1, static_cast<std::uint64_t>(ranks.rank() * count + s) << 40});
    }
  }
  std::vector<nn::Batch> draw(const ByteData& data) {
    std::vector<nn::Batch> batches;
    for (Generator& generator : generators_) {
      batches.push_back(data.draw(generator, device_));
    }
    return batches;
  }

 private:
  Device device_;
  std::vector<Generator> generators_;
};

void learn(Trainer& trainer, const ByteData& data, const DemoOptions& options,
           distributed::Communicator& ranks) {
  Shards shards(options, ranks);
  // Rank 0 has printed meanwhile: the others' clocks start when it is here.
  all_reduce_value(ranks, 0, distributed::Reduce::max, "start of training");
  Progress progress(options.quiet || ranks.rank() != 0);
  const auto start = std::chrono::steady_clock::now();
  double smooth = 0;
  std::int64_t tokens = 0;
  for (double fraction = 0; fraction < 1;) {
    const double own =
        trainer.step(shards.draw(data), learning_rate(options.learning_rate, fraction), 1);
    const double loss =
        all_reduce_value(ranks, own, distributed::Reduce::sum, "loss") / ranks.size();
    tokens += kBatch * kTokens;
    smooth = trainer.steps() == 1 ? loss : 0.95 * smooth + 0.05 * loss;
    // The ranks' clocks differ; they must stop together.
    fraction = all_reduce_value(ranks, std::min(1.0, elapsed_s(start) / options.seconds),
                                distributed::Reduce::max, "time");
    progress.show({trainer.steps(), smooth, tokens, fraction}, fraction >= 1);
  }
  if (ranks.rank() != 0) {
    return;
  }
  fmt::print("Trained {} steps, {} bytes of text, {:.0f} tokens/s.\n", trainer.steps(), tokens,
             static_cast<double>(tokens) / elapsed_s(start));
}

absl::Status write_gradients(const std::vector<Parameter*>& parameters,
                             const distributed::Sharding* sharding, const std::string& path,
                             bool writes) {
  std::vector<nn::NamedTensor> tensors;
  for (const Parameter* p : parameters) {
    if (sharding != nullptr) {
      if (Tensor gradient = sharding->gathered_gradient(*p); gradient.defined() && writes) {
        tensors.push_back({p->name(), std::move(gradient)});
      }
    } else if (p->has_gradient()) {
      tensors.push_back({p->name(), p->gradient()});
    }
  }
  return writes ? nn::write_safetensors(path, tensors) : absl::OkStatus();
}

void print_head(nn::LanguageModel& model, std::string_view text, const ByteData& data,
                const DemoOptions& options, const distributed::Communicator& ranks) {
  std::int64_t count = 0;
  for (const Parameter* p : model.parameters()) {
    count += p->value().numel();
  }
  fmt::print(
      "A decoder of {:.1f} M parameters on {}, {} of text ({} to train on), {} rank{} of {} "
      "thread{}{}, policy {}.\n",
      static_cast<double>(count) / 1e6, to_string(options.device),
      human_bytes(static_cast<std::int64_t>(text.size())), human_bytes(data.train_bytes()),
      ranks.size(), ranks.size() == 1 ? "" : "s", threads(), threads() == 1 ? "" : "s",
      options.stage == 0 ? "" : fmt::format(", sharding stage {}", options.stage), options.policy);
}

}  // namespace

std::unique_ptr<nn::LanguageModel> demo_model(Device device) {
  auto config = nn::JsonReader::parse(kConfig, "demo");
  ensure(config.ok(), "the demo's config does not parse: {}", config.status().ToString());
  auto model = nn::build_language_model(*config, {device, DType::f32});
  ensure(model.ok(), "the demo's model cannot be built: {}", model.status().ToString());
  return *std::move(model);
}

namespace {

absl::Status check_ranks(const DemoOptions& options, int ranks) {
  if (kBatch % ranks != 0) {
    return absl::InvalidArgumentError(
        fmt::format("--ranks must divide the batch of {}, got {}", kBatch, ranks));
  }
  if (options.shards != 0 && (kBatch % options.shards != 0 || options.shards % ranks != 0)) {
    return absl::InvalidArgumentError(fmt::format(
        "--shards must divide the batch of {} and be a multiple of the {} rank{}, got {}", kBatch,
        ranks, ranks == 1 ? "" : "s", options.shards));
  }
  if (options.shards != 0 && options.stage != 0) {
    return absl::InvalidArgumentError(
        "--shards and --stage are for one of them at a time: the table sweeps once a step");
  }
  if (options.device != cpu && ranks > 1) {
    return absl::InvalidArgumentError(
        "--ranks trains on the CPUs of its processes: leave out --device");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<MemoryTable> predict_demo(const DemoOptions& options, int ranks) {
  if (const absl::Status checked = check_ranks(options, ranks); !checked.ok()) {
    return checked;
  }
  if (options.shards != 0) {
    return absl::InvalidArgumentError("--dry-run does not count the sums of --shards");
  }
  return predict_memory(demo_model(meta), {.batch = kBatch / ranks,
                                           .tokens = kTokens,
                                           .dtype = DType::f32,
                                           .ranks = ranks,
                                           .stage = options.stage});
}

absl::StatusOr<std::string> demo_text(const DemoOptions& options, int ranks) {
  if (const absl::Status checked = check_ranks(options, ranks); !checked.ok()) {
    return checked;
  }
  if (const absl::Status usable = expect_usable(options.device); !usable.ok()) {
    return usable;
  }
  const std::int64_t least_bytes = ByteData::least_bytes(kTokens);
  return options.text.empty() ? read_fortunes(least_bytes) : read_text(options.text, least_bytes);
}

namespace {

void require_same_demo(distributed::Communicator& ranks, const DemoOptions& options,
                       const std::string& text) {
  const distributed::Setting settings[] = {
      {"seed", std::to_string(options.seed)},
      {"learning rate", fmt::format("{}", options.learning_rate)},
      {"bytes of text", std::to_string(text.size())},
      {"hash of the text", std::to_string(distributed::Hash().add(text).value())},
      {"shards", std::to_string(options.shards)},
      {"stage", std::to_string(options.stage)},
      {"a file for gradients", options.gradients_out.empty() ? "no" : "yes"}};
  require_same(ranks, settings, "the start of the demo");
}

}  // namespace

absl::Status run_demo(const DemoOptions& options, distributed::Communicator& ranks) {
  const auto text = demo_text(options, ranks.size());
  if (!text.ok()) {
    return text.status();
  }
  require_same_demo(ranks, options, *text);
  const ByteData data(*text, kBatch / std::max(ranks.size(), options.shards), kTokens);
  const auto model = demo_model(options.device);
  const auto meta_model = demo_model(meta);
  Generator generator{options.seed, 0};
  model->initialize(generator);
  std::optional<distributed::Sharding> cut;
  if (options.stage > 0) {
    cut.emplace(ranks, model->parameters(), reads_of(*meta_model, data),
                distributed::ShardingOptions{.stage = options.stage});
  }
  distributed::Sharding* const sharding = cut ? &*cut : nullptr;
  Trainer trainer(*model, generator,
                  {{}, 1.0, Policies::named(options.policy), StepGraphs::automatic}, sharding);
  std::optional<distributed::Reducer> reducer;
  auto reduce = [&](int shards) {
    reducer.emplace(ranks, trainer.parameters(), distributed::ReducerOptions{.shards = shards});
    trainer.hooks.before = [&](BackwardOptions& backward) { reducer->attach(backward); };
    trainer.hooks.after = [&] { reducer->finish(); };
    trainer.hooks.before_accumulation = [&](BackwardOptions& backward) {
      reducer->attach_accumulation(backward);
    };
    trainer.hooks.after_accumulation = [&] { reducer->finish_accumulation(); };
  };
  if (sharding == nullptr && (ranks.size() > 1 || options.shards > 0)) {
    reduce(options.shards);
  }
  const bool prints = ranks.rank() == 0;
  if (!prints) {
    trainer.hooks.unreached = [](const std::vector<Parameter*>&) {};  // rank 0 says it
  }
  if (!options.gradients_out.empty()) {
    trainer.forward_backward(Shards(options, ranks).draw(data), 1);
    return write_gradients(trainer.parameters(), sharding, options.gradients_out, prints);
  }
  const double before = validation_loss(trainer, data, options.device);
  if (prints) {
    print_head(*model, *text, data, options, ranks);
  }
  print_sample(*model, "before training", options.seed, prints, sharding);
  if (prints) {
    fmt::print("Validation loss before: {:.4f} (a byte chosen blindly: {:.4f})\n", before,
               std::log(static_cast<double>(kByteVocabulary)));
    std::fflush(stdout);
  }
  learn(trainer, data, options, ranks);
  if (options.shards > 0) {
    if (prints) {
      fmt::print("{} shards, {} on each rank: {} more memory for their sums.\n", options.shards,
                 options.shards / ranks.size(), human_bytes(reducer->shard_bytes()));
    }
    reduce(0);  // the table's sweeps are single ones
  }
  const double after = validation_loss(trainer, data, options.device);
  if (prints) {
    fmt::print("Validation loss after: {:.4f}\n", after);
  }
  print_sample(*model, "after training", options.seed, prints, sharding);
  if (prints) {
    fmt::print("The same step under each policy, {} rank{} x {} x {} tokens:\n\n", ranks.size(),
               ranks.size() == 1 ? "" : "s", data.batch(), kTokens);
    std::fflush(stdout);
  }
  model->evaluate();
  const auto rows = policy_table(*model, *meta_model, data.validation(ranks.rank(), options.device),
                                 3, sharding != nullptr ? hooks_of(*sharding) : trainer.hooks);
  if (prints) {
    fmt::print("{}\n", to_string(rows));
  }
  if (!agree(rows)) {
    return absl::InternalError("the rows above must have one digest and measured bytes within 1%");
  }
  if (prints) {
    fmt::print("All gradients are bitwise equal under every policy. Peak resident: {}.\n",
               human_bytes(peak_resident_bytes()));
  }
  return absl::OkStatus();
}

}  // namespace reprise::train

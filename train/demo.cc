#include "train/demo.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <utility>

#include <absl/status/statusor.h>
#include <fmt/format.h>

#include "core/error.h"
#include "core/parallel.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "train/policy_table.h"
#include "train/progress.h"
#include "train/sample.h"
#include "train/text.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

constexpr std::int64_t kBatch = 8;
constexpr std::int64_t kTokens = 128;
constexpr double kLearningRate = 1e-3;
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
double learning_rate(double fraction) {
  if (fraction < kWarmup) {
    return kLearningRate * (0.05 + 0.95 * fraction / kWarmup);
  }
  const double along = std::min(1.0, (fraction - kWarmup) / (1 - kWarmup));
  return kLearningRate * (0.1 + 0.45 * (1 + std::cos(std::numbers::pi * along)));
}

double validation_loss(Trainer& trainer, const ByteData& data) {
  double sum = 0;
  const auto count = std::min<std::int64_t>(kValidationBatches, data.validation_batches());
  for (std::int64_t i = 0; i < count; ++i) {
    sum += trainer.evaluate(data.validation(i));
  }
  return sum / static_cast<double>(count);
}

void print_sample(nn::Model& model, const char* when, std::uint64_t seed) {
  Generator generator{seed + 100, 0};
  model.evaluate();
  fmt::print("\nSampled text {}:\n| ", when);
  for (char c : sample_text(model, kPrompt, 200, kTokens, 0.8, generator)) {
    fmt::print("{}{}", c, c == '\n' ? "| " : "");
  }
  fmt::print("\n\n");
}

void learn(Trainer& trainer, const ByteData& data, const DemoOptions& options) {
  Generator data_generator{options.seed + 1, 0};
  Progress progress(options.quiet);
  const auto start = std::chrono::steady_clock::now();
  double smooth = 0;
  std::int64_t tokens = 0;
  for (double fraction = 0; fraction < 1;) {
    const double loss = trainer.step(data.draw(data_generator), learning_rate(fraction));
    tokens += kBatch * kTokens;
    smooth = trainer.steps() == 1 ? loss : 0.95 * smooth + 0.05 * loss;
    fraction = std::min(1.0, elapsed_s(start) / options.seconds);
    progress.show({trainer.steps(), smooth, tokens, fraction}, fraction >= 1);
  }
  fmt::print("Trained {} steps, {} bytes of text, {:.0f} tokens/s.\n", trainer.steps(), tokens,
             static_cast<double>(tokens) / elapsed_s(start));
}

absl::Status write_gradients(const std::vector<Parameter*>& parameters, const std::string& path) {
  std::vector<nn::NamedTensor> tensors;
  for (const Parameter* p : parameters) {
    if (p->has_gradient()) {
      tensors.push_back({p->name(), p->gradient()});
    }
  }
  return nn::write_safetensors(path, tensors);
}

}  // namespace

std::unique_ptr<nn::Model> demo_model(Device device) {
  auto config = nn::JsonReader::parse(kConfig, "demo");
  ensure(config.ok(), "the demo's config does not parse: {}", config.status().ToString());
  auto model = nn::build_model(*config, {device, DType::f32});
  ensure(model.ok(), "the demo's model cannot be built: {}", model.status().ToString());
  return *std::move(model);
}

absl::Status run_demo(const DemoOptions& options) {
  const auto text = options.text.empty() ? read_fortunes() : read_text(options.text);
  if (!text.ok()) {
    return text.status();
  }
  if (text->size() < 20 * kTokens) {
    return absl::InvalidArgumentError(fmt::format("{}: at least {} bytes are needed, got {}",
                                                  options.text, 20 * kTokens, text->size()));
  }
  const ByteData data(*text, kBatch, kTokens);
  const auto model = demo_model(cpu);
  const auto meta_model = demo_model(meta);
  Generator generator{options.seed, 0};
  model->initialize(generator);
  std::int64_t count = 0;
  for (const Parameter* p : model->parameters()) {
    count += p->value().numel();
  }
  Trainer trainer(*model, generator, {{}, 1.0, Policies::named(options.policy)});
  if (!options.gradients_out.empty()) {
    Generator data_generator{options.seed + 1, 0};
    trainer.forward_backward(data.draw(data_generator));
    return write_gradients(trainer.parameters(), options.gradients_out);
  }
  fmt::print(
      "A decoder of {:.1f} M parameters, {} of text ({} to train on), {} threads, policy {}.\n",
      static_cast<double>(count) / 1e6, human_bytes(static_cast<std::int64_t>(text->size())),
      human_bytes(data.train_bytes()), threads(), options.policy);
  print_sample(*model, "before training", options.seed);
  const double before = validation_loss(trainer, data);
  fmt::print("Validation loss before: {:.4f} (a byte chosen blindly: {:.4f})\n", before,
             std::log(256.0));
  std::fflush(stdout);
  learn(trainer, data, options);
  fmt::print("Validation loss after: {:.4f}\n", validation_loss(trainer, data));
  print_sample(*model, "after training", options.seed);

  fmt::print("The same step under each policy, {} x {} tokens:\n\n", kBatch, kTokens);
  std::fflush(stdout);
  const auto rows = policy_table(*model, *meta_model, data.validation(0));
  fmt::print("{}\n", to_string(rows));
  if (!agree(rows)) {
    return absl::InternalError("the rows above must have one digest and measured bytes within 1%");
  }
  fmt::print("All gradients are bitwise equal under every policy. Peak resident: {}.\n",
             human_bytes(peak_resident_bytes()));
  return absl::OkStatus();
}

}  // namespace reprise::train

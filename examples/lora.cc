// LoRA on a model folder: adapters on some layers, the rest frozen, every block a segment. Nothing
// has to be "enabled" for the gradients to arrive through a frozen embedding.
//
//   lora [--model DIR] [--text FILE] [--out DIR] [--steps N] [--targets NAME,NAME]
//
// Tokens are bytes here, so the model needs a vocabulary of at least 256; without --model a small
// random one is made and saved first.
#include "nn/lora.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <unistd.h>

#include "nn/models/llama.h"
#include "nn/weights/folder.h"
#include "train/text.h"
#include "train/trainer.h"

using namespace reprise;

namespace {

int complain(const absl::Status& status) {
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return 2;
}

absl::Status make_small_model(const std::string& folder) {
  nn::LlamaConfig config{.vocabulary = 256, .width = 64, .inner = 172, .layers = 3, .heads = 4};
  config.kv_heads = 2;
  config.head_size = config.rope.dim = 16;
  nn::Llama model(config, {cpu, DType::f32});
  Generator generator{/*seed=*/3};
  model.initialize(generator);
  return nn::save_model(model, folder);
}

}  // namespace

int main(int argc, char** argv) {
  std::string folder, file, out;
  int steps = 30;
  std::vector<std::string> targets{"q_proj", "v_proj", "down_proj"};
  CLI::App app("Fine-tune a model folder with LoRA.");
  app.add_option("--model", folder, "A model folder (config.json and safetensors)");
  app.add_option("--text", file, "A UTF-8 text");
  app.add_option("--out", out, "Where the adapter goes, in PEFT's form");
  app.add_option("--steps", steps);
  app.add_option("--targets", targets, "Layers that get an adapter")->delimiter(',');
  CLI11_PARSE(app, argc, argv);

  const auto scratch =
      std::filesystem::temp_directory_path() / ("reprise_lora_" + std::to_string(getpid()));
  if (folder.empty()) {
    folder = (scratch / "model").string();
    if (absl::Status made = make_small_model(folder); !made.ok()) {
      return complain(made);
    }
  }
  if (out.empty()) {
    out = (scratch / "adapter").string();
  }
  std::string text;
  while (text.size() < 20000) {
    text += "the quick brown fox jumps over the lazy dog. ";
  }
  if (!file.empty()) {
    auto read = train::read_text(file, train::ByteData::least_bytes(64));
    if (!read.ok()) {
      return complain(read.status());
    }
    text = *std::move(read);
  }

  auto model = nn::load_model(folder);
  if (!model.ok()) {
    return complain(model.status());
  }
  Generator generator{/*seed=*/1};
  const nn::LoraConfig config{.rank = 8, .alpha = 16, .targets = {targets, ""}};
  nn::add_lora(**model, config, generator);
  const train::ByteData data(text, /*batch=*/4, /*tokens=*/64);
  train::TrainerOptions options;
  options.policies = Policies::named("inputs-only");
  train::Trainer trainer(**model, generator, options);
  std::int64_t trained = 0;
  for (const Parameter* p : trainer.parameters()) {
    trained += p->value().numel();
  }
  std::printf("%lld trainable parameters in %zu tensors\n", static_cast<long long>(trained),
              trainer.parameters().size());
  const double before = trainer.evaluate(data.validation(0));
  Generator order{/*seed=*/2};
  for (int step = 1; step <= steps; ++step) {
    const double loss = trainer.step(data.draw(order), 1e-2);
    if (step % 10 == 0) {
      std::printf("step %d loss %.4f\n", step, loss);
    }
  }
  const double after = trainer.evaluate(data.validation(0));
  std::printf("validation loss %.4f -> %.4f\n", before, after);
  if (absl::Status saved = nn::save_adapter(**model, out); !saved.ok()) {
    return complain(saved);
  }

  // What was written gives the same model again.
  auto again = nn::load_model(folder);
  if (!again.ok()) {
    return complain(again.status());
  }
  if (auto loaded = nn::load_adapter(**again, out); !loaded.ok()) {
    return complain(loaded.status());
  }
  const double reloaded = (*again)->loss(data.validation(0)).tensor().item<float>();
  std::filesystem::remove_all(scratch);
  std::printf("reloaded: %.6f (was %.6f)\n", reloaded, after);
  return after < before && reloaded == after ? 0 : 1;
}

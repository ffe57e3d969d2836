// Training from scratch: a model of your own shape on text of your own (or generated text), with a
// validation loss, segments, and a model folder at the end that loads back.
//
//   train_from_scratch [--text FILE] [--steps N] [--out DIR]
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "nn/models/llama.h"
#include "nn/weights/folder.h"
#include "train/text.h"
#include "train/trainer.h"

using namespace reprise;

namespace {

std::string counting_text() {
  std::string text;
  for (int i = 0; text.size() < 40000; ++i) {
    text += std::to_string(i) + " comes before " + std::to_string(i + 1) + ".\n";
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  std::string file, out;
  int steps = 60;
  CLI::App app("Train a small decoder from scratch.");
  app.add_option("--text", file, "A UTF-8 text; otherwise sentences that count");
  app.add_option("--steps", steps);
  app.add_option("--out", out, "Save the model there");
  CLI11_PARSE(app, argc, argv);

  std::string text = counting_text();
  if (!file.empty()) {
    auto read = train::read_text(file, train::ByteData::least_bytes(64));
    if (!read.ok()) {
      std::fprintf(stderr, "%s\n", std::string(read.status().message()).c_str());
      return 2;
    }
    text = *std::move(read);
  }
  nn::LlamaConfig config{
      .vocabulary = train::kByteVocabulary, .width = 128, .inner = 344, .layers = 4, .heads = 4};
  config.kv_heads = 2;
  config.head_size = config.rope.dim = 32;
  config.tied = true;
  nn::Llama model(config, {cpu, DType::f32});
  Generator generator{/*seed=*/1};
  model.initialize(generator);

  const train::ByteData data(text, /*batch=*/8, /*tokens=*/64);
  train::TrainerOptions options;
  options.policies = Policies::named("inputs-only");
  train::Trainer trainer(model, generator, options);
  const double before = trainer.evaluate(data.validation(0));
  Generator order{/*seed=*/2};
  for (int step = 1; step <= steps; ++step) {
    const double loss = trainer.step(data.draw(order), 3e-3);
    if (step % 10 == 0) {
      std::printf("step %d loss %.4f\n", step, loss);
    }
  }
  const double after = trainer.evaluate(data.validation(0));
  std::printf("validation loss %.4f -> %.4f\n", before, after);
  if (!out.empty()) {
    const absl::Status saved = nn::save_model(model, out);
    if (!saved.ok()) {
      std::fprintf(stderr, "%s\n", std::string(saved.message()).c_str());
      return 1;
    }
  }
  return after < before - 1 ? 0 : 1;
}

// Training steps and ops at the sizes that people train on a device: every launch is one that a
// device takes, and the blocks at the corners of its grid stay within their tensors. No values: the
// other blocks do not run.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "nn/lora.h"
#include "nn/models/model.h"
#include "nn/weights/json.h"
#include "tests/simt/simt.h"
#include "train/text.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

constexpr Device kDevice{DeviceKind::cuda, 0};

class Sizes : public ::testing::Test {
 protected:
  void SetUp() override { simt::options().corners = true; }
  void TearDown() override { simt::options().corners = false; }
};

struct Shape {
  const char* config;  // of bench/configs/
  const char* layers;  // the config's line of them, and another
  const char* fewer;
  DType dtype;
  std::int64_t rows, tokens;
  bool lora = false;
};

void train(const Shape& shape) {
  std::string text =
      *read_text(std::string(REPRISE_SOURCE_DIR "/bench/configs/") + shape.config, 1);
  const std::size_t at = text.find(shape.layers);
  ASSERT_NE(at, std::string::npos);
  text.replace(at, std::string(shape.layers).size(), shape.fewer);
  auto json = nn::JsonReader::parse(text, shape.config);
  ASSERT_TRUE(json.ok()) << json.status();
  auto built = nn::build_model(*json, {kDevice, shape.dtype});
  ASSERT_TRUE(built.ok()) << built.status();
  nn::Model& model = **built;
  Generator generator{5, 0};
  if (shape.lora) {
    nn::LoraConfig lora;
    lora.rank = 16;
    lora.dropout = 0.1;
    lora.all_linear = true;
    nn::add_lora(model, lora, generator);
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::zeros({shape.rows, shape.tokens}, DType::i64, kDevice);
  TrainerOptions options{.adamw = {}, .max_norm = 1, .policies = Policies::named("inputs-only")};
  options.adamw.master_weights = shape.dtype == DType::bf16;
  Trainer trainer(model, generator, std::move(options));
  (void)trainer.step(batch, 1e-4);
}

TEST_F(Sizes, Gpt2Of124MOn32Rows) {
  train({"gpt2-124m.json", "\"n_layer\": 12", "\"n_layer\": 1", DType::bf16, 32, 1024});
}
TEST_F(Sizes, Gpt2Of124MInF32) {
  train({"gpt2-124m.json", "\"n_layer\": 12", "\"n_layer\": 1", DType::f32, 32, 1024});
}
TEST_F(Sizes, LlamaOf8BFull) {
  train({"llama-8b.json", "\"num_hidden_layers\": 32", "\"num_hidden_layers\": 1", DType::bf16, 8,
         8192});
}
TEST_F(Sizes, LlamaOf8BWithLora) {
  train({"llama-8b.json", "\"num_hidden_layers\": 32", "\"num_hidden_layers\": 1", DType::bf16, 8,
         8192, true});
}

}  // namespace
}  // namespace reprise::train

// Training steps and ops at the sizes that people train on a device: every launch is one that a
// device takes, and the blocks at the corners of its grid stay within their tensors. No values: the
// other blocks do not run.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/accumulate.h"
#include "kernels/activation.h"
#include "kernels/adamw.h"
#include "kernels/dropout.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/reduce.h"
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

struct Job {
  const char* config;  // of bench/configs/
  const char* layers;  // the config's line of them, and another
  const char* fewer;
  DType dtype;
  std::int64_t rows, tokens;
  bool lora = false;
};

void train(const Job& job) {
  std::string text = *read_text(std::string(REPRISE_SOURCE_DIR "/bench/configs/") + job.config, 1);
  const std::size_t at = text.find(job.layers);
  ASSERT_NE(at, std::string::npos);
  text.replace(at, std::string(job.layers).size(), job.fewer);
  auto json = nn::JsonReader::parse(text, job.config);
  ASSERT_TRUE(json.ok()) << json.status();
  auto built = nn::build_model(*json, {kDevice, job.dtype});
  ASSERT_TRUE(built.ok()) << built.status();
  nn::Model& model = **built;
  Generator generator{5, 0};
  if (job.lora) {
    nn::LoraConfig lora;
    lora.rank = 16;
    lora.dropout = 0.1;
    lora.all_linear = true;
    nn::add_lora(model, lora, generator);
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::zeros({job.rows, job.tokens}, DType::i64, kDevice);
  TrainerOptions options{.adamw = {}, .max_norm = 1, .policies = Policies::named("inputs-only")};
  options.adamw.master_weights = job.dtype == DType::bf16;
  Trainer trainer(model, generator, std::move(options));
  (void)trainer.step(batch, 1e-4);
}

// 2^31 and some elements in 32800 rows; gradients of a table of as many.
TEST_F(Sizes, MoreElementsThan32BitsCount) {
  const Shape shape{32800, 65536};
  const auto tensor = [&](DType dtype) { return Tensor::empty(shape, dtype, kDevice); };
  const Tensor x = tensor(DType::bf16), y = tensor(DType::bf16), wide = tensor(DType::f32);
  kernels::dropout(x, 0.1, 1, 2, y);
  kernels::cast(x, wide);
  kernels::accumulate(wide, x);
  kernels::mul(x, y, y);
  kernels::activation(kernels::Activation::gelu_tanh, x, y);
  kernels::gated_silu(x, x, y);
  const Tensor weight = Tensor::empty({shape[1]}, DType::bf16, kDevice);
  const Tensor scales = Tensor::empty({shape[0]}, DType::f32, kDevice);
  kernels::rms_norm(x, weight, 1e-5, y, scales);
  kernels::bias_gradient(x, weight, false);
  const Tensor total = Tensor::empty({1}, DType::f32, kDevice);
  kernels::squared_norms({&wide, 1}, total);
  kernels::scale_all({&wide, 1}, 0.5);
  const kernels::AdamWTensor step{.value = x, .gradient = y, .m = wide, .v = wide, .master = wide};
  kernels::adamw({&step, 1}, kernels::AdamWSettings());
  const Tensor ids = Tensor::zeros({100}, DType::i64, kDevice);
  const Tensor rows = Tensor::empty({100, shape[1]}, DType::bf16, kDevice);
  kernels::embedding(ids, x, rows);
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

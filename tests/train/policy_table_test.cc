// Every model under every policy: predicted bytes are measured bytes, and one digest of gradients.
#include "train/policy_table.h"

#include <gtest/gtest.h>

#include "nn/lora.h"
#include "nn/weights/json.h"

namespace reprise::train {
namespace {

struct Case {
  const char* name;
  const char* config;
  bool lora;
};

const Case kCases[] = {
    {"Gpt2WithDropout",
     R"({"model_type": "gpt2", "vocab_size": 67, "n_positions": 32, "n_embd": 24, "n_layer": 3,
         "n_head": 3, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.2})",
     false},
    {"Llama",
     R"({"model_type": "llama", "vocab_size": 67, "hidden_size": 24, "intermediate_size": 40,
         "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "max_position_embeddings": 64})",
     false},
    {"Qwen2Tied",
     R"({"model_type": "qwen2", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 40,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
         "tie_word_embeddings": true, "use_sliding_window": true, "sliding_window": 5,
         "max_window_layers": 2, "max_position_embeddings": 64})",
     false},
    {"Qwen2Lora",
     R"({"model_type": "qwen2", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 40,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64})",
     true},
};

std::unique_ptr<nn::Model> build(const Case& at, Device device, DType dtype, Generator& generator) {
  auto config = nn::JsonReader::parse(at.config, at.name);
  EXPECT_TRUE(config.ok());
  auto model = nn::build_model(*config, {device, dtype});
  EXPECT_TRUE(model.ok()) << model.status();
  (*model)->initialize(generator);
  (*model)->name_parameters();
  if (at.lora) {
    nn::add_lora(**model,
                 {.rank = 4, .alpha = 8, .dropout = 0.1, .targets = {{"q_proj", "v_proj"}, ""}},
                 generator);
  }
  return *std::move(model);
}

class Models : public ::testing::TestWithParam<std::tuple<Case, DType>> {};

TEST_P(Models, PredictedIsMeasuredAndGradientsAreBitwiseEqual) {
  const auto& [at, dtype] = GetParam();
  std::vector<std::int64_t> ids(2 * 19);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int64_t>((i * i + 3) % 67);
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {2, 19});
  std::vector<PolicyRow> rows;
  Generator real{1, 0}, dry{1, 0};
  const auto model = build(at, cpu, dtype, real);
  const auto meta_model = build(at, meta, dtype, dry);
  EXPECT_EQ(real.next_offset, dry.next_offset);
  rows = policy_table(*model, *meta_model, batch, 1);
  ASSERT_EQ(rows.size(), 5u);
  for (const PolicyRow& row : rows) {
    EXPECT_EQ(row.predicted_bytes, row.measured_bytes) << row.policy;
    EXPECT_EQ(row.predicted_host_bytes, row.measured_host_bytes) << row.policy;
    EXPECT_EQ(row.digest, rows[0].digest) << row.policy;
  }
  EXPECT_EQ(rows[0].replayed_records, 0);
  EXPECT_GT(rows[2].replayed_records, 0);
  EXPECT_LT(rows[2].measured_bytes, rows[0].measured_bytes);
  EXPECT_TRUE(agree(rows));
}

// Dropout draws anew at each call: the same offsets for each policy come from a generator set back.
TEST_P(Models, InTrainingModeToo) {
  const auto& [at, dtype] = GetParam();
  std::vector<std::int64_t> ids(2 * 19);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int64_t>((5 * i * i + 1) % 67);
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {2, 19});
  Generator generator{9, 0};
  const auto model = build(at, cpu, dtype, generator);
  model->train(generator);
  const std::uint64_t start = generator.next_offset;
  std::string first;
  for (const std::string& policy : Policies::names()) {
    generator.next_offset = start;
    for (Parameter* p : model->parameters()) {
      p->zero_gradient();
    }
    Tape tape;
    Tape::Scope scope(tape, Policies::named(policy));
    backward(model->loss(batch));
    const std::string digest = gradient_digest(model->parameters());
    first = first.empty() ? digest : first;
    EXPECT_EQ(digest, first) << policy;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Models,
                         ::testing::Combine(::testing::ValuesIn(kCases),
                                            ::testing::Values(DType::f32, DType::bf16)),
                         [](const auto& at) {
                           return std::string(std::get<0>(at.param).name) + "_" +
                                  std::string(name(std::get<1>(at.param)));
                         });

}  // namespace
}  // namespace reprise::train

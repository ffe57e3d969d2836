// `reprise memory`, `explain` and `init`, and the activation bytes of LoRA at real sizes.
#include "train/memory.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "nn/lora.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "tests/nn/files.h"
#include "tests/train/process.h"
#include "train/demo.h"

namespace reprise::train {
namespace {

using ::testing::HasSubstr;

std::string config(const std::string& name) {
  return std::string(REPRISE_SOURCE_DIR) + "/docs/configs/" + name + ".json";
}

struct Sizes {
  std::int64_t width, inner, layers, heads, kv_heads, head_size;
};

// What a layer has to keep for each token, in bytes (bf16): the inputs of both norms, q, k, v and
// the output of attention with its row statistics, gate and up; of what only frozen weights would
// need nothing.
std::int64_t lora_bytes(const Sizes& s, std::int64_t rank, bool every_linear) {
  std::int64_t elements =
      2 * s.width + 2 * s.heads * s.head_size + 2 * s.kv_heads * s.head_size + 2 * s.inner;
  elements += s.width + 2 * rank;  // q and v share their input; U of each
  if (every_linear) {
    elements += s.width + s.inner + 5 * rank;  // gate and up share theirs; down's
  }
  return 2 * elements + 4 * s.heads + 8;
}

std::int64_t saved_bytes(const std::string& name, const nn::LoraConfig& lora, std::int64_t tokens) {
  nn::JsonReader json = *nn::JsonReader::open(config(name));
  const auto model = *nn::build_model(json, {meta, DType::bf16});
  Generator generator;
  nn::add_lora(*model, lora, generator);
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::zeros({1, tokens}, DType::i64, meta);
  std::int64_t bytes = 0;
  (void)dry_run([&] { return model->loss(batch); }, Policies::named("keep-all"),
                [&](const Tape&) {
                  const MemoryReport report = allocator(meta).report();
                  bytes = report.live[static_cast<std::size_t>(MemoryKind::saved)] +
                          report.live[static_cast<std::size_t>(MemoryKind::activations)];
                });
  return bytes;
}

TEST(Memory, ActivationsOfLoraAreThoseThatTheMathsNeeds) {
  const std::pair<const char*, Sizes> models[] = {{"llama-3-8b", {4096, 14336, 32, 32, 8, 128}},
                                                  {"qwen2-0.5b", {896, 4864, 24, 14, 2, 64}}};
  for (const auto& [name, sizes] : models) {
    for (const bool every : {false, true}) {
      nn::LoraConfig lora{.rank = 8, .all_linear = every, .widen = false};
      if (!every) {
        lora.targets = {{"q_proj", "v_proj"}, ""};
      }
      for (const std::int64_t tokens : {512, 4096}) {
        const auto expected =
            static_cast<double>(sizes.layers * tokens * lora_bytes(sizes, 8, every));
        const auto measured = static_cast<double>(saved_bytes(name, lora, tokens));
        EXPECT_NEAR(measured / expected, 1, 0.05) << name << " " << every << " " << tokens;
        // Dropout and f32 adapters keep no copy of their inputs.
        nn::LoraConfig other = lora;
        other.widen = true;
        other.dropout = 0.1;
        EXPECT_NEAR(static_cast<double>(saved_bytes(name, other, tokens)) / expected, 1, 0.05);
      }
    }
  }
}

TEST(Memory, TablesOfRealSizesTakeLessThanASecondAPolicy) {
  for (const std::string name : {"llama-3-8b", "qwen2-0.5b"}) {
    for (const std::int64_t rank : {0, 8}) {
      const auto table = predict_memory(config(name), {.tokens = 8192, .lora_rank = rank});
      ASSERT_TRUE(table.ok()) << table.status();
      ASSERT_EQ(table->rows.size(), 5u);
      for (const MemoryRow& row : table->rows) {
        EXPECT_LT(row.seconds, 1) << row.policy;
        std::int64_t sum = 0;
        for (const std::int64_t bytes : row.at_peak) {
          sum += bytes;
        }
        EXPECT_EQ(sum, row.peak_bytes);
        const auto of = [&](MemoryKind kind) {
          return row.at_peak[static_cast<std::size_t>(kind)];
        };
        EXPECT_EQ(of(MemoryKind::parameters),
                  2 * table->parameters + (rank > 0 ? 4 * table->trainable : 0));
        EXPECT_EQ(of(MemoryKind::optimizer), (rank > 0 ? 8 : 4) * table->trainable);
      }
      EXPECT_GT(table->rows[0].peak_transient_bytes, 2 * table->rows[2].peak_transient_bytes);
      EXPECT_EQ(table->rows[0].replay_flops, 0);
      EXPECT_EQ(table->rows[1].host_peak_bytes, 0);
      EXPECT_GT(table->rows[4].host_peak_bytes, 0);
      EXPECT_LT(table->rows[4].peak_transient_bytes, table->rows[1].peak_transient_bytes);
      EXPECT_GT(table->rows[2].replay_flops, 0);
    }
  }
  EXPECT_EQ(predict_memory(config("llama-3-8b"), {.lora_rank = 8})->parameters, 8'030'261'248);
}

TEST(Memory, OfACommandLine) {
  const auto outcome =
      testing::run_program("memory " + config("qwen2-0.5b") + " --tokens 256 --lora 4");
  EXPECT_EQ(outcome.code, 0) << outcome.text;
  EXPECT_THAT(outcome.text,
              ::testing::StartsWith("qwen2, 494032768 parameters in bf16, LoRA of rank 4 on every "
                                    "linear layer (2199552 parameters); 1 x 256 tokens, AdamW\n"));
  for (const char* policy :
       {"keep-all", "keep-products", "inputs-only", "nested", "keep-products+offload"}) {
    EXPECT_THAT(outcome.text, HasSubstr(std::string("\n") + policy));
  }
  const auto json = testing::run_program("memory " + config("qwen2-0.5b") +
                                         " --json --policy nested --dtype f32 --lora 2 --targets "
                                         "q_proj,v_proj --dora");
  EXPECT_EQ(json.code, 0) << json.text;
  const auto parsed = nlohmann::json::parse(json.text);
  EXPECT_EQ(parsed["rows"].size(), 1u);
  EXPECT_EQ(parsed["rows"][0]["policy"], "nested");
  EXPECT_EQ(parsed["trainable"], 24 * (2 * (896 + 896) + 896 + 2 * (896 + 128) + 128));
  EXPECT_EQ(parsed["rows"][0]["at_peak"]["optimizer"], 8 * parsed["trainable"].get<int>());
  testing::expect_refused("memory /nowhere.json", "/nowhere.json: No such file or directory");
  testing::expect_refused("memory " + config("qwen2-0.5b") + " --tokens 0",
                          "--tokens: must be a whole number from 1 to 1048576, got \"0\"");
  testing::expect_refused("memory " + config("qwen2-0.5b") + " --dora", "--dora requires --lora");
  testing::expect_refused("explain " + config("qwen2-0.5b") + " --targets q_proj",
                          "--targets requires --lora");
  testing::expect_refused("memory " + testing::golden("gpt2").string() + " --tokens 25",
                          testing::golden("gpt2").string() +
                              ": [model] a row may have n_positions = 24 tokens, got 25");
  testing::expect_refused("memory " + config("qwen2-0.5b") + " --lora 4 --targets wqkv",
                          "[lora] no module of this qwen2 matches target_modules [wqkv]");
}

// The demo's own dry run: what a step then takes, and of a job of ranks that are not started.
TEST(Memory, ADryRunOfTheDemo) {
  const auto model = demo_model(cpu);
  Generator generator;
  model->initialize(generator);
  Trainer trainer(*model, generator, {{}, 1.0, Policies::named("inputs-only")});
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::zeros({8, 128}, DType::i64);
  const std::int64_t live = allocator(cpu).report().live_bytes - batch.ids.bytes();
  std::int64_t weights = 0;
  for (const Parameter* p : model->parameters()) {
    weights += p->value().bytes();
  }
  (void)trainer.step(batch, 1e-4);
  const absl::StatusOr<MemoryTable> alone = predict_demo({}, 1);
  ASSERT_TRUE(alone.ok()) << alone.status();
  ASSERT_EQ(alone->rows.size(), Policies::names().size());
  for (const MemoryRow& row : alone->rows) {
    const MemoryRow measured = measured_step(trainer, batch, row.policy, cpu);
    const auto bytes = static_cast<double>(measured.peak_bytes - (live - weights));
    EXPECT_NEAR(static_cast<double>(row.peak_bytes), bytes, 0.01 * bytes) << row.policy;
  }

  const auto outcome = testing::run_program("--ranks 4 demo --dry-run --stage 3");
  EXPECT_EQ(outcome.code, 0) << outcome.text;
  EXPECT_THAT(outcome.text,
              ::testing::StartsWith("llama, 9999680 parameters in f32; 2 x 128 tokens, "
                                    "AdamW; a rank of 4, sharding stage 3\n"));
  EXPECT_THAT(outcome.text, HasSubstr("\nnested"));
  EXPECT_LT(predict_demo({.stage = 3}, 4)->rows[0].peak_bytes, alone->rows[0].peak_bytes / 2);
  testing::expect_refused(
      "--ranks 2 memory " + config("qwen2-0.5b") + " --stage 2 --gather-again 2",
      "--gather-again is of --stage 3, got 2");
  testing::expect_refused("--ranks 3 demo --dry-run", "--ranks must divide the batch of 8, got 3");
  testing::expect_refused("--ranks 2 demo --dry-run --shards 4",
                          "--dry-run does not count the sums of --shards");
}

TEST(Memory, ExplainOfACommandLine) {
  const auto outcome = testing::run_program("explain " + config("qwen2-0.5b") + " --lora 4");
  EXPECT_EQ(outcome.code, 0) << outcome.text;
  for (const char* text :
       {"held bytes", "\nlayers.23 ", "lora_B.weight", "(frozen)", "pinned by handles: "}) {
    EXPECT_THAT(outcome.text, HasSubstr(text));
  }
  const auto nested =
      testing::run_program("explain " + config("qwen2-0.5b") + " --policy nested --tokens 64");
  EXPECT_THAT(nested.text, HasSubstr("\n  layers.0-5 "));
}

TEST(Init, WritesAFolderThatLoads) {
  const testing::Folder folder;
  testing::write(folder.at("config.json"), R"({"model_type": "qwen2", "vocab_size": 67,
      "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
      "num_key_value_heads": 2, "max_position_embeddings": 64, "future_key": [1]})");
  const std::string from = folder.at("config.json"), one = folder.at("one"), two = folder.at("two");
  EXPECT_EQ(testing::run_program("init " + from + " " + one + " --seed 3").text,
            one + ": qwen2 with 18400 parameters, 71.9 KiB\n");
  EXPECT_EQ(testing::run_program("init " + folder.path().string() + " " + two +
                                 " --seed 3 --dtype bf16 --max-shard-bytes 9000")
                .code,
            0);
  const auto a = nn::load_model(one), b = nn::load_model(two);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_GT(std::distance(std::filesystem::directory_iterator(two), {}), 4);
  for (std::size_t i = 0; i < (*a)->parameters().size(); ++i) {
    const auto x = (*a)->parameters()[i]->value().to_vector<float>();
    const auto y = (*b)->parameters()[i]->value().to_vector<float>();
    for (std::size_t j = 0; j < x.size(); ++j) {
      ASSERT_EQ(y[j], to_float(to_bfloat16(x[j])));
    }
  }
  // What the config holds besides is passed on.
  EXPECT_EQ(nlohmann::json::parse(testing::contents(two + "/config.json"))["future_key"][0], 1);
  testing::expect_refused("init " + from + " " + one,
                          one + ": there are weights already: name another folder");
  testing::expect_refused("init " + one + " " + one,
                          one + ": there are weights already: name another folder");
}

}  // namespace
}  // namespace reprise::train

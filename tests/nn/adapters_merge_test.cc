// Adapters merged into the weights, taken out again and exported.
#include <cmath>
#include <cstring>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autograd/reduce.h"
#include "autograd/tape.h"
#include "nn/embedding.h"
#include "nn/initialize.h"
#include "nn/linear.h"
#include "nn/lora.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "tests/error_of.h"
#include "tests/nn/adapter_models.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::backward_of;
using testing::batch_of;
using testing::bytes_of;
using testing::error_of;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;
using testing::load;
using testing::logits;
using testing::relative;

TEST(Adapters, MergeAndUnmerge) {
  for (const std::string name :
       {"qwen2_lora", "gpt2_lora", "qwen2_dora", "gpt2_dora", "llama_lora_embedding",
        "llama_dora_embedding", "llama_lora_head", "gpt2_lora_saved", "qwen2_lora_bias_all"}) {
    SCOPED_TRACE(name);
    const auto model = load(name);
    const Batch batch = batch_of(name);
    ASSERT_TRUE(load_adapter(*model, (golden(name) / "adapter").string()).ok());
    const auto before = bytes_of(*model);
    const auto apart = logits(*model, batch);
    merge_adapter(*model);
    EXPECT_LT(relative(logits(*model, batch), apart), 1e-5);
    for (const NamedParameter& entry : model->named_parameters()) {
      EXPECT_FALSE(entry.adapter);
    }
    EXPECT_THAT(error_of([&] { merge_adapter(*model); }), HasSubstr("is merged already"));
    EXPECT_THAT(error_of([&] { deactivate_adapters(*model); }), HasSubstr("unmerge it first"));
    unmerge_adapter(*model);
    EXPECT_THAT(error_of([&] { unmerge_adapter(*model); }), HasSubstr("is not merged"));
    EXPECT_LT(relative(logits(*model, batch), apart), 1e-5);
    EXPECT_EQ(bytes_of(*model).size(), before.size());
  }
  const auto model = load("qwen2");
  EXPECT_EQ(error_of([&] { merge_adapter(*model); }), "[lora] the model has no active adapter");
}

TEST(Adapters, ABiasOfBIsAddedScaledTrainedAndMerged) {
  const auto model = load("qwen2");
  const Batch batch = batch_of("qwen2");
  const auto base = logits(*model, batch);
  LoraConfig config{.rank = 2, .alpha = 6, .b_bias = true, .targets = {{"q_proj", "v_proj"}, ""}};
  Generator generator{9, 0};
  add_lora(*model, config, generator);
  EXPECT_EQ(logits(*model, batch), base);
  Linear& layer = dynamic_cast<Linear&>(*model->find_module("model.layers.1.self_attn.q_proj"));
  for (Parameter* p : model->trainable_parameters()) {
    if (p->name().ends_with("lora_B.bias")) {
      fill_normal(p->write(), 1, generator);
    }
  }
  // B is zero still: what is added is 6 / 2 of its bias.
  const Tensor x = Tensor::full({1, layer.in()}, DType::f32, 0.25);
  const auto y = no_grad([&] { return layer(x); }).tensor().to_vector<float>();
  const auto bias = layer.lora()->b_bias.value().to_vector<float>();
  deactivate_adapters(*model);
  const auto own = no_grad([&] { return layer(x); }).tensor().to_vector<float>();
  activate_adapter(*model, "default");
  for (std::size_t i = 0; i < y.size(); ++i) {
    EXPECT_NEAR(y[i], own[i] + 3 * bias[i], 1e-5);
  }
  fill_normal(layer.lora()->b.write(), 1, generator);
  backward_of(*model, batch);
  for (const Parameter* p : model->trainable_parameters()) {
    const bool reached = p->name().find("lora_A") == std::string::npos || p == &layer.lora()->a;
    EXPECT_EQ(p->gradient().to_vector<float>() !=
                  std::vector<float>(static_cast<std::size_t>(p->value().numel())),
              reached)
        << p->name();
  }
  const auto adapted = logits(*model, batch);
  const Folder out;
  ASSERT_TRUE(save_adapter(*model, out.at("adapter")).ok());
  EXPECT_THAT(testing::contents(out.at("adapter/adapter_config.json")),
              HasSubstr("\"lora_bias\": true"));
  ASSERT_TRUE(export_merged(*model, out.at("merged")).ok());
  EXPECT_LT(relative(logits(**load_model(out.at("merged")), batch), adapted), 1e-5);
  const auto again = load("qwen2");
  ASSERT_TRUE(load_adapter(*again, out.at("adapter")).ok());
  EXPECT_EQ(logits(*again, batch), adapted);
  merge_adapter(*again);
  EXPECT_LT(relative(logits(*again, batch), adapted), 1e-5);
  unmerge_adapter(*again);
  EXPECT_LT(relative(logits(*again, batch), adapted), 1e-5);
}

TEST(Adapters, ABiasOfBHasItsPlaces) {
  const auto model = load("qwen2");
  Generator generator;
  LoraConfig config{.b_bias = true, .targets = {{"o_proj"}, ""}};
  add_lora(*model, config, generator);
  EXPECT_EQ(error_of([&] { merge_adapter(*model); }),
            "[lora] the adapter on model.layers.0.self_attn.o_proj cannot be merged: it has a bias "
            "and the layer has none");
  config.targets.names = {"embed_tokens"};
  EXPECT_EQ(error_of([&] { add_lora(*model, config, generator, "other"); }),
            "[lora] lora_bias is for linear layers: model.embed_tokens is an embedding");
  config.weight_decomposed = true;
  EXPECT_EQ(error_of([&] { add_lora(*model, config, generator, "other"); }),
            "[lora] lora_bias cannot be on together with use_dora");
}

TEST(Adapters, ATableThatIsTheHeadTooCannotBeMerged) {
  const auto model = load("llama_lora_tied_embedding");
  ASSERT_TRUE(
      load_adapter(*model, (golden("llama_lora_tied_embedding") / "adapter").string()).ok());
  EXPECT_EQ(
      error_of([&] { merge_adapter(*model); }),
      "[lora] the adapter on model.embed_tokens cannot be merged: this table is the head too, "
      "which the adapter does not change");
}

TEST(Adapters, AnotherTableThanTheTiedOneCanBeMerged) {
  const auto model = load("gpt2");
  const Batch batch = batch_of("gpt2");
  Generator generator;
  add_lora(*model, {.init = LoraInit::random, .targets = {{"wpe"}, ""}}, generator);
  const auto apart = logits(*model, batch);
  merge_adapter(*model);
  EXPECT_LT(relative(logits(*model, batch), apart), 1e-5);
}

// A model that computes with a merged adapter is saved as it computes, with what was trained
// beside.
TEST(Adapters, AMergedModelIsSavedWhole) {
  const auto model = load("gpt2_lora_saved");
  const Batch batch = batch_of("gpt2_lora_saved");
  ASSERT_TRUE(load_adapter(*model, (golden("gpt2_lora_saved") / "adapter").string()).ok());
  merge_adapter(*model);
  const Folder out;
  ASSERT_TRUE(save_model(*model, out.path().string()).ok());
  const auto again = load_model(out.path().string());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(logits(**again, batch), logits(*model, batch));
}

// PEFT's file of a model that generates no text has no task, and the paths of today's code.
TEST(Adapters, ExportWritesTheMergedModelAndLeavesThisOne) {
  for (const std::string name : {"qwen2_dora", "gpt2_lora", "qwen2_lora_extras"}) {
    SCOPED_TRACE(name);
    const auto model = load(name);
    const Batch batch = batch_of(name);
    ASSERT_TRUE(load_adapter(*model, (golden(name) / "adapter").string()).ok());
    const auto apart = logits(*model, batch);
    const auto before = bytes_of(*model);
    const Folder out, shards;
    const absl::Status status = export_merged(*model, out.path().string());
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_TRUE(export_merged(*model, shards.path().string(), {.max_shard_bytes = 9000}).ok());
    EXPECT_TRUE(bytes_of(*model) == before);
    EXPECT_EQ(logits(*model, batch), apart);
    merge_lora(*model);
    for (const Folder* folder : {&out, &shards}) {
      const auto again = load_model(folder->path().string());
      ASSERT_TRUE(again.ok()) << again.status();
      EXPECT_TRUE(bytes_of(**again) == bytes_of(*model));
    }
    EXPECT_LT(relative(logits(*model, batch), apart), 1e-5);
  }
}

TEST(Adapters, ExportRefusesAMergeThatChangesNothing) {
  const auto model = load("qwen2_lora");
  Generator generator;
  add_lora(*model, {.rank = 2}, generator, "new");
  const Folder out;
  const absl::Status status = export_merged(*model, out.at("merged"));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(std::string(status.message()),
            out.at("merged") +
                ": adapter \"new\" merged into 4 layers changes nothing in f32: its B is zero, or "
                "its changes are below the rounding");
  EXPECT_FALSE(std::filesystem::exists(out.at("merged")));
  model->find_parameter("model.layers.1.self_attn.v_proj.lora_B.weight")->write().data<float>()[0] =
      1;
  EXPECT_TRUE(export_merged(*model, out.at("merged")).ok());
}

// Nothing has to be enabled for gradients to arrive behind a frozen embedding, with every block a
// segment; a frozen base has no memory for gradients.

}  // namespace
}  // namespace reprise::nn

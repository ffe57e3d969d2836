#include "nn/lora.h"

#include <cmath>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::contents;
using ::testing::ElementsAre;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;

std::unique_ptr<Model> load(const std::string& name) {
  auto model = load_model(golden(name).string());
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

Batch batch_of(const std::string& name) {
  const auto file = SafetensorsFile::open((golden(name) / "parity.safetensors").string());
  Batch batch{.ids = *file->read("in.input_ids"),
              .labels = *file->read("in.labels"),
              .mask = {},
              .positions = {},
              .starts = {}};
  if (file->find("in.attention_mask") != nullptr) {
    batch.mask = *file->read("in.attention_mask");
  }
  return batch;
}

void backward_of(Model& model, const Batch& batch) {
  Tape tape;
  Tape::Scope scope(tape);
  backward(model.loss(batch));
}

TEST(Lora, TargetsAsPeftMatchesThem) {
  const auto model = load("qwen2_lora");
  const auto targets = [&](const LoraConfig& config) { return lora_targets(*model, config); };
  EXPECT_THAT(targets({}),
              ElementsAre("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
                          "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"));
  EXPECT_THAT(targets({.targets = {{"0.self_attn.q_proj"}, ""}}),
              ElementsAre("model.layers.0.self_attn.q_proj"));
  // An entry is the end of a path after a dot, not any end.
  EXPECT_THROW(targets({.targets = {{"_proj"}, ""}}), Error);
  EXPECT_THAT(targets({.targets = {{}, R"(.*\.1\..*(up|down)_proj)"}}),
              ElementsAre("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"));
  EXPECT_THROW(targets({.targets = {{}, R"(\.1\..*up_proj)"}}), Error);  // not the whole path
  EXPECT_THAT(
      targets({.targets = {{"q_proj", "v_proj"}, ""}, .exclude = {{"v_proj"}, ""}, .layers = {1}}),
      ElementsAre("model.layers.1.self_attn.q_proj"));
  EXPECT_THAT(targets({.targets = {{"q_proj"}, ""}, .layers = {0}, .layer_lists = {"layers"}}),
              ElementsAre("model.layers.0.self_attn.q_proj"));
  EXPECT_THROW(targets({.targets = {{"q_proj"}, ""}, .layers = {0}, .layer_lists = {"h"}}), Error);
  // Everything but the head; what is saved along is never a target.
  EXPECT_EQ(targets({.all_linear = true}).size(), 14u);
  EXPECT_EQ(targets({.all_linear = true, .modules_to_save = {"0.mlp"}}).size(), 11u);
  EXPECT_THAT(targets({.targets = {{"lm_head"}, ""}}), ElementsAre("lm_head"));
  EXPECT_EQ(lora_targets(*load("gpt2"), {}).size(), 2u);  // c_attn
}

TEST(Lora, AtFirstTheModelIsUnchangedAndOnlyBHasAGradient) {
  const auto model = load("qwen2_lora");
  const Batch batch = batch_of("qwen2_lora");
  const std::vector<float> before = model->outputs(batch)[0].value.tensor().to_vector<float>();
  Generator generator{3, 0};
  const LoraConfig config{.rank = 4, .alpha = 8, .all_linear = true};
  add_lora(*model, config, generator);
  EXPECT_EQ(model->outputs(batch)[0].value.tensor().to_vector<float>(), before);
  backward_of(*model, batch);
  for (const NamedParameter& entry : model->named_parameters()) {
    EXPECT_EQ(entry.parameter->trainable(), entry.adapter) << entry.path;
    EXPECT_EQ(entry.parameter->name(), entry.path);
    EXPECT_EQ(entry.parameter->has_gradient(), entry.adapter) << entry.path;
    if (!entry.adapter) {
      continue;
    }
    double sum = 0;
    for (const float g : entry.parameter->gradient().to_vector<float>()) {
      sum += std::abs(g);
    }
    if (entry.path.ends_with("lora_A.weight")) {
      EXPECT_EQ(sum, 0) << entry.path;
      const double bound = 1 / std::sqrt(static_cast<double>(entry.parameter->shape()[1]));
      for (const float a : entry.parameter->value().to_vector<float>()) {
        EXPECT_LE(std::abs(a), bound);
      }
    } else {
      EXPECT_GT(sum, 0) << entry.path;
    }
  }
}

TEST(Lora, AFrozenLayerKeepsNoInput) {
  Linear layer(64, 64, {}, Place{});
  layer.weight.write().zero();
  const auto held_bytes = [&](bool trainable) {
    layer.weight.set_trainable(trainable);
    Tape tape;
    Tape::Scope scope(tape);
    const std::int64_t before = allocator(cpu).report().live_bytes;
    const Variable y = layer(Variable::leaf(Tensor::zeros(Shape{128, 64}, DType::f32)));
    return allocator(cpu).report().live_bytes - before;
  };
  EXPECT_EQ(held_bytes(true), 2 * 128 * 64 * 4);  // x and y
  EXPECT_EQ(held_bytes(false), 128 * 64 * 4);     // y alone
}

TEST(Lora, RanksAlphasAndScales) {
  const auto model = load("qwen2_lora_extras");
  const auto config = load_adapter(*model, (golden("qwen2_lora_extras") / "adapter").string());
  ASSERT_TRUE(config.ok()) << config.status();
  const auto lora = [&](const std::string& path) {
    return dynamic_cast<Linear&>(*model->find_module(path)).lora();
  };
  EXPECT_EQ(lora("model.layers.0.self_attn.q_proj")->rank(), 2);
  EXPECT_EQ(lora("model.layers.1.mlp.down_proj")->rank(), 6);
  EXPECT_EQ(lora("model.layers.0.mlp.down_proj")->rank(), 4);
  EXPECT_DOUBLE_EQ(lora("model.layers.0.mlp.down_proj")->scale(), 6 / std::sqrt(4.0));
  EXPECT_DOUBLE_EQ(lora("model.layers.1.mlp.down_proj")->scale(), 6 / std::sqrt(6.0));
  EXPECT_DOUBLE_EQ(lora("model.layers.0.self_attn.v_proj")->scale(), 3 / std::sqrt(4.0));
  EXPECT_DOUBLE_EQ(lora("model.layers.1.self_attn.v_proj")->scale(), 6 / std::sqrt(4.0));
  EXPECT_DOUBLE_EQ(lora("model.layers.1.mlp.up_proj")->scale(), 10 / std::sqrt(4.0));
  EXPECT_EQ(lora("lm_head"), nullptr);
  EXPECT_TRUE(model->find_parameter("lm_head.weight")->trainable());
}

TEST(Lora, ASavedAdapterLoadsBackBitwiseUnderPeftsKeys) {
  for (const std::string name : {"qwen2_lora", "gpt2_lora", "qwen2_lora_extras"}) {
    SCOPED_TRACE(name);
    const auto model = load(name);
    const auto config = load_adapter(*model, (golden(name) / "adapter").string());
    ASSERT_TRUE(config.ok()) << config.status();
    const Folder out;
    const absl::Status saved = save_adapter(*model, out.at("adapter"));
    ASSERT_TRUE(saved.ok()) << saved;
    EXPECT_TRUE(contents(out.at("adapter/adapter_model.safetensors")) ==
                contents(golden(name) / "adapter/adapter_model.safetensors"));

    // Whatever is written of the config is what PEFT wrote, in sorted order.
    const auto ours = nlohmann::json::parse(contents(out.at("adapter/adapter_config.json")));
    const auto theirs =
        nlohmann::json::parse(contents(golden(name) / "adapter/adapter_config.json"));
    for (const auto& [key, value] : ours.items()) {
      EXPECT_EQ(value, theirs.at(key)) << key;
    }
    for (const std::string key : {"peft_type", "r", "lora_alpha", "target_modules", "bias",
                                  "task_type", "lora_dropout", "inference_mode"}) {
      EXPECT_TRUE(ours.contains(key)) << key;
    }
    const auto again = load(name);
    ASSERT_TRUE(load_adapter(*again, out.at("adapter")).ok());
    const Batch batch = batch_of(name);
    EXPECT_EQ(again->outputs(batch)[0].value.tensor().to_vector<float>(),
              model->outputs(batch)[0].value.tensor().to_vector<float>());
  }
}

TEST(Lora, MergedEqualsUnmerged) {
  for (const std::string name : {"qwen2_lora", "gpt2_lora"}) {
    const auto model = load(name);
    ASSERT_TRUE(load_adapter(*model, (golden(name) / "adapter").string()).ok());
    const Batch batch = batch_of(name);
    const std::vector<float> apart = model->outputs(batch)[0].value.tensor().to_vector<float>();
    merge_lora(*model);
    for (const NamedParameter& entry : model->named_parameters()) {
      EXPECT_FALSE(entry.adapter) << entry.path;
    }
    const std::vector<float> merged = model->outputs(batch)[0].value.tensor().to_vector<float>();
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < apart.size(); ++i) {
      difference += std::pow(apart[i] - merged[i], 2);
      norm += std::pow(apart[i], 2);
    }
    EXPECT_LT(std::sqrt(difference / norm), 1e-5);
    EXPECT_NE(apart, load(name)->outputs(batch)[0].value.tensor().to_vector<float>());
    // And it is an ordinary model again.
    const Folder out;
    ASSERT_TRUE(save_model(*model, out.path().string()).ok());
    EXPECT_EQ(
        (*load_model(out.path().string()))->outputs(batch)[0].value.tensor().to_vector<float>(),
        merged);
  }
}

TEST(Lora, AModelIsSavedWithoutItsAdapters) {
  const auto model = load("qwen2_lora");
  Generator generator;
  add_lora(*model, {}, generator);
  const Folder out;
  ASSERT_TRUE(save_model(*model, out.path().string()).ok());
  EXPECT_EQ(SafetensorsFile::open(out.at("model.safetensors"))->tensors().size(),
            SafetensorsFile::open((golden("qwen2_lora") / "model.safetensors").string())
                ->tensors()
                .size());
}

TEST(Lora, DropoutDrawsForEachLayerInTrainingOnly) {
  const auto model = load("qwen2_lora");
  LoraConfig config = *load_adapter(*model, (golden("qwen2_lora") / "adapter").string());
  EXPECT_EQ(config.dropout, 0.05);
  const Batch batch = batch_of("qwen2_lora");
  const auto still = model->outputs(batch)[0].value.tensor().to_vector<float>();
  Generator generator{1, 0};
  model->train(generator);
  const auto one = model->outputs(batch)[0].value.tensor().to_vector<float>();
  const std::uint64_t rows = static_cast<std::uint64_t>(batch.ids.numel());
  // Per block: q, k, v, o, gate, up of width 32, down of width 48.
  EXPECT_EQ(generator.next_offset, 2 * (6 * rows * 32 + rows * 48) / 4);
  EXPECT_NE(one, still);
  generator.next_offset = 0;
  EXPECT_EQ(model->outputs(batch)[0].value.tensor().to_vector<float>(), one);
  model->evaluate();
  EXPECT_EQ(model->outputs(batch)[0].value.tensor().to_vector<float>(), still);
}

TEST(Lora, BiasesMayBeTrainedBesides) {
  const auto trained = [](const std::string& bias) {
    const auto model = load("qwen2_lora");
    Generator generator;
    const LoraConfig config{.targets = {{"q_proj"}, ""}, .bias = bias};
    add_lora(*model, config, generator);
    std::set<std::string> keys;
    for (const NamedParameter& entry : adapter_parameters(*model)) {
      EXPECT_TRUE(entry.parameter->trainable());
      if (entry.path.ends_with("bias")) {
        keys.insert(entry.path);
      }
    }
    return keys;
  };
  EXPECT_TRUE(trained("none").empty());
  EXPECT_THAT(trained("lora_only"),
              ElementsAre("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
                          "base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias"));
  EXPECT_EQ(trained("all").size(), 6u);
  EXPECT_EQ(trained("all").count("base_model.model.model.layers.0.self_attn.k_proj.bias"), 1u);
}

std::string mistake(const std::string& name, const LoraConfig& config) {
  const auto model = load(name);
  Generator generator;
  try {
    add_lora(*model, config, generator);
  } catch (const Error& error) {
    for (const Parameter* parameter : model->parameters()) {
      EXPECT_TRUE(parameter->trainable());  // nothing was done
    }
    return error.what();
  }
  return "";
}

TEST(Lora, Mistakes) {
  EXPECT_EQ(
      mistake("qwen2", {.targets = {{"c_attn"}, ""}}),
      "[lora] no module of this qwen2 matches target_modules [c_attn]: did you mean self_attn?");
  EXPECT_EQ(mistake("qwen2", {.targets = {{}, "x"}}),
            "[lora] no module of this qwen2 matches target_modules [] or \"x\"");
  EXPECT_EQ(mistake("qwen2", {.targets = {{}, "("}}),
            "[lora] target_modules holds \"(\", which is not a regular expression");
  EXPECT_EQ(mistake("llama", {.targets = {{"norm"}, ""}}),
            "[lora] target_modules matches model.norm, which is neither a Linear nor an Embedding");
  EXPECT_EQ(mistake("qwen2", {.rank = 0}), "[lora] rank must be at least 1, got 0");
  EXPECT_EQ(mistake("qwen2", {.dropout = 1}), "[lora] dropout must be from 0 to below 1, got 1");
  EXPECT_EQ(mistake("qwen2", {.bias = "some"}),
            "[lora] bias must be none, all or lora_only, got \"some\"");
  EXPECT_EQ(
      mistake("qwen2", {.all_linear = true, .layers = {1}}),
      "[lora] layers_to_transform must be absent with target_modules \"all-linear\", which is "
      "no list");
  EXPECT_EQ(mistake("qwen2", {.targets = {{}, ".*q_proj"}, .layers = {1}}),
            "[lora] layers_to_transform must be absent with target_modules \".*q_proj\", which is "
            "no list");
  EXPECT_EQ(mistake("qwen2", {.ranks = {{"q_proj", 0}}}),
            "[lora] rank_pattern gives model.layers.0.self_attn.q_proj the rank 0, 1 is the least");
  EXPECT_EQ(mistake("qwen2", {.modules_to_save = {"score"}}),
            "[lora] modules_to_save names score, which this qwen2 does not have");
  EXPECT_EQ(
      mistake("qwen2", {.targets = {{"q_proj", "v_porj"}, ""}}),
      "[lora] target_modules names v_porj, which this qwen2 does not have: did you mean v_proj?");
  EXPECT_EQ(mistake("qwen2", {.alphas = {{"1.mlp", 3}}}),
            "[lora] alpha_pattern names \"1.mlp\", which matches none of the 4 targets: "
            "model.layers.0.self_attn.q_proj, ...");
  EXPECT_EQ(
      mistake("qwen2", {.modules_to_save = {"lm_head"}}),
      "[lora] modules_to_save names lm_head, but the head of this model is tied to its embedding "
      "table");
  EXPECT_EQ(
      mistake("qwen2", {.targets = {{"q_proj", "lm_head"}, ""}}),
      "[lora] target_modules names lm_head, but the head of this model is tied to its embedding "
      "table");
  const auto model = load("qwen2");
  Generator generator;
  add_lora(*model, {}, generator);
  EXPECT_THROW(add_lora(*model, {}, generator), Error);
  Linear layer(4, 3, {}, Place{});
  Lora turned({.in = 3, .out = 4, .rank = 1}, Place{});
  EXPECT_THROW(layer.set_lora(&turned), Error);
  EXPECT_EQ(layer.lora(), nullptr);
  Embedding table(7, 3, std::nullopt, Place{});
  LoraEmbedding other({.in = 6, .out = 3, .rank = 1}, Place{});
  EXPECT_THROW(table.set_lora(&other), Error);
}

struct Adapter {
  Folder folder;
  nlohmann::json config;
  std::vector<NamedTensor> tensors;
  Adapter() {
    const auto from = golden("qwen2_lora") / "adapter";
    config = nlohmann::json::parse(contents(from / "adapter_config.json"));
    const auto file = SafetensorsFile::open((from / "adapter_model.safetensors").string());
    for (const StoredTensor& tensor : file->tensors()) {
      tensors.push_back({tensor.name, *file->read(tensor.name)});
    }
  }
  std::string problem() {
    testing::write(folder.at("adapter_config.json"), config.dump());
    EXPECT_TRUE(write_safetensors(folder.at("adapter_model.safetensors"), tensors).ok());
    const auto model = load("qwen2_lora");
    std::string text(load_adapter(*model, folder.path().string()).status().message());
    const std::string prefix = folder.path().string() + "/";
    return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
  }
};

TEST(Lora, AdapterFilesThatAreWrong) {
  Adapter adapter;
  EXPECT_EQ(adapter.problem(), "");
  const nlohmann::json good = adapter.config;
  const auto with = [&](const std::string& key, const nlohmann::json& value) {
    adapter.config = good;
    adapter.config[key] = value;
    return adapter.problem();
  };
  EXPECT_EQ(with("peft_type", "IA3"),
            "adapter_config.json: peft_type must be \"LORA\", got \"IA3\"");
  EXPECT_EQ(with("peft_type", nullptr), "adapter_config.json: peft_type is missing");
  EXPECT_EQ(with("use_qalora", true),
            "adapter_config.json: use_qalora is not supported: it must be false or null");
  EXPECT_THAT(with("lora_bias", true), HasSubstr("q_proj.lora_B.bias"));
  EXPECT_THAT(with("use_dora", true), HasSubstr("q_proj.lora_magnitude_vector"));
  EXPECT_EQ(with("r", 0), "adapter_config.json: r must be at least 1, got 0");
  EXPECT_EQ(with("init_lora_weights", "pissa"),
            "adapter_config.json: init_lora_weights must be true, false or \"gaussian\", got "
            "\"pissa\": other ways change the base weights");
  EXPECT_EQ(with("target_modules", {"query"}),
            "adapter_config.json: [lora] no module of this qwen2 matches target_modules [query]");
  EXPECT_EQ(
      with("rank_pattern", {{"query", 3}}),
      "adapter_config.json: [lora] rank_pattern names \"query\", which matches none of the 14 "
      "targets: model.layers.0.self_attn.q_proj, ...");
  EXPECT_THAT(with("r", 5), HasSubstr("the adapter is for another base or rank: base_model."));
  EXPECT_THAT(with("r", 5), HasSubstr("must have shape [5, "));
  EXPECT_THAT(with("target_modules", {"q_proj"}), HasSubstr("without a place: [base_model.model."));
  adapter.config = good;
  const std::string first = adapter.tensors.front().name;
  adapter.tensors.front().name = "base_model.model.other";
  EXPECT_EQ(adapter.problem(), "adapter_model.safetensors: missing: [" + first +
                                   "]; without a place: [base_model.model.other]");
  adapter.tensors.clear();
  EXPECT_THAT(adapter.problem(), HasSubstr("missing: [base_model.model.model.layers.0."));
  const Folder empty;
  const auto model = load("qwen2_lora");
  EXPECT_EQ(load_adapter(*model, empty.path().string()).status().code(),
            absl::StatusCode::kNotFound);
}

// The first pattern that matches counts, in an order that is not that of their names.
TEST(Lora, PatternsKeepTheirOrderInAFile) {
  const auto model = load("qwen2");
  Generator generator;
  add_lora(*model,
           {.targets = {{"down_proj", "v_proj"}, ""},
            .ranks = {{R"(layers\.1\.mlp\.down_proj)", 3}, {"down_proj", 6}},
            .alphas = {{"v_proj", 2.5}, {"[a-z]_proj", 7}}},
           generator);
  const Folder folder;
  ASSERT_TRUE(save_adapter(*model, folder.path().string()).ok());
  const auto again = load("qwen2");
  const auto config = load_adapter(*again, folder.path().string());
  ASSERT_TRUE(config.ok()) << config.status();
  ASSERT_EQ(config->ranks.size(), 2u);
  EXPECT_EQ(config->ranks.front().second, 3);
  EXPECT_EQ(config->alphas.front().second, 2.5);
  const std::string path = "model.layers.1.mlp.down_proj.lora_A.weight";
  EXPECT_EQ(again->find_parameter(path)->shape()[0], 3);
}

TEST(Lora, ConfigsOfOtherForms) {
  Adapter adapter;
  adapter.config["target_modules"] = "all-linear";
  adapter.config["layers_to_transform"] = nullptr;
  EXPECT_EQ(adapter.problem(), "");
  adapter.config["target_modules"] = R"(model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj)";
  EXPECT_EQ(adapter.problem(), "");
  for (NamedTensor& entry : adapter.tensors) {
    entry.name.erase(std::string("base_model.model.").size(), std::string("model.").size());
  }
  EXPECT_EQ(adapter.problem(), "");  // keys of a bare trunk
  adapter.config = {{"peft_type", "LORA"}};
  testing::write(adapter.folder.at("adapter_config.json"), adapter.config.dump());
  const auto config = read_lora_config(adapter.folder.path().string());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rank, 8);
  EXPECT_EQ(config->alpha, 8);
  EXPECT_TRUE(config->targets.empty());
}

}  // namespace
}  // namespace reprise::nn

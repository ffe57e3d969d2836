// The published sizes of every supported model, built without memory: parameters in all and by
// part, weights of matrix products, work of attention. And docs/models.md, whose table is made of
// these and of the ready cases.
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "core/pattern.h"
#include "nn/linear.h"
#include "nn/lora.h"
#include "nn/models/language_model.h"
#include "nn/weights/json.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using Count = std::int64_t;

struct Published {
  const char* name;
  std::string config;
  Count parameters;
  // Parameters whose paths match the pattern.
  std::vector<std::pair<std::string, Count>> parts;
  // Of language models without a tower: weights of the linear layers with the head, and FLOPs of
  // attention for a query and a key, 4 L H D.
  Count products = 0, attention = 0;
};

std::string qwen2(const std::string& sizes) {
  return R"({"model_type": "qwen2", "rope_theta": 1000000.0, )" + sizes + "}";
}
std::string qwen2_vl(const std::string& sizes) {
  return R"({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
      "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
      "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, )" +
         sizes + "}";
}
std::string internlm2(const std::string& rest) {
  return R"({"bias": false, "hidden_size": 4096, "intermediate_size": 14336,
      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
      "vocab_size": 92544, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "pad_token_id": 2, )" +
         rest + "}";
}

const std::vector<Published>& published() {
  static const std::vector<Published> models = {
      {"GPT-2 124M",
       R"({"model_type": "gpt2"})",
       124'439'808,
       {{"transformer.h.0.*", 7'087'872}},
       123'532'032,
       36'864},
      {"Llama-2-7B",
       R"({"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05})",
       6'738'415'616,
       {{"model.layers.0.*", 202'383'360}},
       6'607'077'376,
       524'288},
      {"Llama-3-8B",
       R"({"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336,
           "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
           "rope_theta": 500000.0})",
       8'030'261'248,
       {{"model.layers.0.*", 218'112'000}},
       7'504'658'432,
       524'288},
      {"InternLM2-7B",
       internlm2(R"("model_type": "internlm2", "max_position_embeddings": 32768)"),
       7'737'708'544,
       {{"model.layers.0.*", 218'112'000}},
       7'358'382'080,
       524'288},
      {"Qwen-7B",
       R"({"model_type": "qwen", "seq_length": 8192, "max_position_embeddings": 32768})",
       7'721'324'544,
       {{"transformer.h.0.*", 202'395'648}},
       7'098'335'232,
       524'288},
      {"Qwen2-0.5B",
       qwen2(R"("hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
           "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": true)"),
       494'032'768,
       {{"model.layers.0.*", 14'912'384}},
       493'961'216,
       86'016},
      {"Qwen2-1.5B",
       qwen2(R"("hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
           "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": true)"),
       1'543'714'304,
       {{"model.layers.0.*", 46'797'824}},
       1'543'569'408,
       172'032},
      {"Qwen2-7B",
       qwen2(R"("hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064)"),
       7'615'616'512,
       {{"model.layers.0.*", 233'057'792}},
       7'070'285'824,
       401'408},
      {"Qwen3-0.6B",
       R"({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
           "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
           "head_dim": 128, "tie_word_embeddings": true})",
       596'049'920,
       {{"model.layers.0.*", 15'730'944}},
       595'984'384,
       229'376},
      {"Qwen3-8B",
       R"({"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
           "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128})",
       8'190'735'360,
       {{"model.layers.0.*", 192'946'432}},
       7'568'097'280,
       589'824},
      {"GLM-4-9B",
       R"({"model_type": "glm"})",
       9'399'951'360,
       {{"model.layers.0.*", 203'960'832}},
       8'778'678'272,
       655'360},
      {"GLM-4-9B-0414",
       R"({"model_type": "glm4", "rms_norm_eps": 1e-05, "max_position_embeddings": 32768})",
       9'400'279'040,
       {{"model.layers.0.*", 203'969'024}},
       8'778'678'272,
       655'360},
      {"GLM-4-9B, first release",
       R"({"model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": 151552,
           "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 40,
           "num_attention_heads": 32, "multi_query_attention": true, "multi_query_group_num": 2,
           "kv_channels": 128, "seq_length": 131072, "layernorm_epsilon": 1.5625e-07,
           "add_qkv_bias": true, "rope_ratio": 500})",
       9'399'951'360,
       {{"model.layers.0.*", 203'960'832}},
       8'778'678'272,
       655'360},
      {"Qwen2-VL-2B",
       qwen2_vl(R"("hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
           "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
           "tie_word_embeddings": true, "vision_config": {"hidden_size": 1536})"),
       2'208'985'600,
       {{"model.visual.*", 665'271'296},
        {"model.visual.merger.*", 34'087'936},
        {"model.visual.blocks.0.*", 19'677'440},
        {"model.language_model.layers.0.*", 46'797'824}}},
      {"Qwen2-VL-7B",
       qwen2_vl(R"("hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
           "vision_config": {"hidden_size": 3584})"),
       8'291'375'616,
       {{"model.visual.*", 675'759'104},
        {"model.visual.merger.*", 44'575'744},
        {"model.visual.blocks.0.*", 19'677'440},
        {"model.language_model.layers.0.*", 233'057'792}}},
      {"CLIP L/14-336",
       R"({"model_type": "clip", "projection_dim": 768, "text_config": {"hidden_size": 768,
           "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
           "vision_config": {"hidden_size": 1024, "intermediate_size": 4096,
           "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
           "patch_size": 14, "projection_dim": 768}})",
       427'944'193,
       {{"vision_model.*", 303'507'456},
        {"text_model.*", 123'060'480},
        {"*_projection.weight", 1'376'256},
        {"logit_scale", 1},
        {"vision_model.encoder.layers.0.*", 12'596'224},
        {"text_model.encoder.layers.0.*", 7'087'872}}},
      {"the tower of CLIP L/14-336",
       R"({"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
           "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
           "patch_size": 14})",
       303'507'456,
       {{"encoder.layers.0.*", 12'596'224}}},
      {"XComposer2.5-7B",
       internlm2(R"("model_type": "internlmxcomposer2", "max_position_embeddings": 24576,
           "architectures": ["InternLMXComposer2ForCausalLM"], "max_length": 16384)"),
       8'679'815'168,
       {{"*.Plora_*", 603'979'776},
        {"model.layers.0.*.Plora_*", 18'874'368},
        {"model.layers.0.*", 218'112'000 + 18'874'368},
        {"vision_proj.*", 33'562'624},
        {"vit.*", 304'556'032}}},
  };
  return models;
}

absl::StatusOr<std::unique_ptr<Model>> build(const Published& entry) {
  JsonReader json = *JsonReader::parse(entry.config, entry.name);
  return build_model(json, {meta, DType::bf16});
}

Count count(Model& model, const std::string& pattern) {
  Count sum = 0;
  for (const NamedParameter& entry : model.named_parameters()) {
    sum += matches(pattern, entry.path) ? entry.parameter->shape().numel() : 0;
  }
  return sum;
}

// Weights of all linear layers and of the head, which may be the table.
Count products(LanguageModel& model) {
  Count sum = model.head() == nullptr ? model.embedding_table().shape().numel() : 0;
  for (const NamedModule& entry : model.named_modules()) {
    const auto* const linear = dynamic_cast<const Linear*>(entry.module);
    sum += linear != nullptr ? linear->weight.shape().numel() : 0;
  }
  return sum;
}

Count forward_flops(LanguageModel& model, Count T) {
  Tape tape;
  const Tape::Scope scope(tape);
  Batch batch;
  batch.ids = Tensor::zeros({1, T}, DType::i64, meta);
  (void)model.hidden(batch);
  return tape.report().forward_flops;
}

TEST(PublishedModels, Parameters) {
  for (const Published& entry : published()) {
    const auto model = build(entry);
    ASSERT_TRUE(model.ok()) << entry.name << ": " << model.status();
    EXPECT_EQ(count(**model, "*"), entry.parameters) << entry.name;
    for (const auto& [pattern, parameters] : entry.parts) {
      EXPECT_EQ(count(**model, pattern), parameters) << entry.name << ": " << pattern;
    }
  }
}

TEST(PublishedModels, WeightsOfProductsAndWorkOfAttention) {
  int checked = 0;
  for (const Published& entry : published()) {
    if (entry.products == 0) {
      continue;
    }
    ++checked;
    const auto model = build(entry);
    ASSERT_TRUE(model.ok()) << entry.name << ": " << model.status();
    auto& language = dynamic_cast<LanguageModel&>(**model);
    EXPECT_EQ(products(language), entry.products) << entry.name;
    // What is linear in T drops out: with T (T + 1) / 2 pairs, f(2T) - 2 f(T) is T^2 of them.
    constexpr Count T = 32;
    EXPECT_EQ(forward_flops(language, 2 * T) - 2 * forward_flops(language, T),
              T * T * entry.attention)
        << entry.name;
  }
  EXPECT_EQ(checked, 13);
}

// As published for these, with PEFT and with the recipes of the models.
TEST(PublishedModels, ParametersOfAdapters) {
  struct Adapter {
    std::string model;
    LoraConfig config;
    Count parameters;
  };
  LoraConfig composer{.rank = 64, .alpha = 64};
  composer.targets.names = {"attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
                            "feed_forward.w3"};
  const LoraConfig every{.rank = 8, .all_linear = true};
  LoraConfig decomposed = every;
  decomposed.weight_decomposed = true;
  const Adapter adapters[] = {
      {"Qwen2-7B", every, 20'185'088},
      {"GLM-4-9B", every, 23'797'760},
      {"GLM-4-9B-0414", every, 23'797'760},
      {"XComposer2.5-7B", composer, 150'994'944},
      // And a length for each output: q, k, v, o, gate, up, down of 28 layers.
      {"Qwen2-7B", decomposed, 20'185'088 + 28 * (3 * 3584 + 2 * 512 + 2 * 18944)},
  };
  for (const auto& [name, config, parameters] : adapters) {
    const auto entry = std::ranges::find(published(), name, &Published::name);
    ASSERT_NE(entry, published().end()) << name;
    const auto model = build(*entry);
    ASSERT_TRUE(model.ok()) << name << ": " << model.status();
    Generator generator;
    add_lora(**model, config, generator);
    Count sum = 0;
    for (const Parameter* parameter : (*model)->trainable_parameters()) {
      sum += parameter->shape().numel();
    }
    EXPECT_EQ(sum, parameters) << name;
  }
}

TEST(PublishedModels, EverySupportedTypeHasOne) {
  std::set<std::string> have;
  for (const Published& entry : published()) {
    have.insert(JsonReader::parse(entry.config, entry.name)->string("model_type"));
  }
  const std::vector<std::string> types = supported_models();
  EXPECT_EQ(have, std::set<std::string>(types.begin(), types.end()));
}

// "1,543,714,304".
std::string with_commas(Count number) {
  const std::string digits = std::to_string(number);
  std::string result;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) {
      result.push_back(',');
    }
    result.push_back(digits[i]);
  }
  return result;
}

// The rows of docs/models.md, from the sizes above and the configs of the ready cases.
std::string table() {
  std::map<std::string, std::vector<std::string>> sizes, cases;
  for (const Published& entry : published()) {
    const std::string type = JsonReader::parse(entry.config, entry.name)->string("model_type");
    sizes[type].push_back(fmt::format("{} ({})", entry.name, with_commas(entry.parameters)));
    const auto model = build(entry);
    if (model.ok() && (*model)->type() != type) {
      cases[type] = {fmt::format("as `{}`, which it becomes", (*model)->type())};
    }
  }
  std::set<std::filesystem::path> folders;
  for (const auto& entry : std::filesystem::directory_iterator(testing::golden(""))) {
    if (std::filesystem::exists(entry.path() / "parity.safetensors")) {
      folders.insert(entry.path());
    }
  }
  for (const std::filesystem::path& folder : folders) {
    JsonReader config = *JsonReader::open((folder / "config.json").string());
    const auto model = build_model(config, {meta, DType::f32});
    EXPECT_TRUE(model.ok()) << folder << ": " << model.status();
    if (model.ok()) {
      cases[std::string((*model)->type())].push_back(
          fmt::format("`{}`", folder.filename().string()));
    }
  }
  std::string rows;
  for (const ModelKind& kind : model_kinds()) {
    const std::string type(kind.type);
    rows += fmt::format("| `{}` | `{}` | {} | {} |\n", type, kind.architecture,
                        fmt::join(sizes[type], ", "), fmt::join(cases[type], ", "));
  }
  return rows;
}

TEST(PublishedModels, TheTableOfTheDocsIsThis) {
  const std::string page = testing::contents(
      testing::golden("").parent_path().parent_path().parent_path() / "docs/models.md");
  const std::string head = "| --- | --- | --- | --- |\n";
  const std::size_t from = page.find(head);
  ASSERT_NE(from, page.npos);
  const std::size_t begin = from + head.size();
  EXPECT_EQ(page.substr(begin, page.find("\n\n", begin) + 1 - begin), table());
}

}  // namespace
}  // namespace reprise::nn

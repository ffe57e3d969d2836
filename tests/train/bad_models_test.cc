// Configs that contradict themselves, indices of shards and inputs of models that cannot be used,
// as a process sees them: exit code 2 and one message.
#include <algorithm>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "nn/weights/safetensors.h"
#include "tests/nn/files.h"
#include "tests/train/process.h"

namespace reprise::train {
namespace {

using nlohmann::json;
using nn::NamedTensor;
using nn::SafetensorsFile;
using testing::contents;
using testing::expect_refused;
using testing::Folder;
using testing::golden;

// A copy of a ready case whose files a test changes.
struct Changed {
  Folder folder;
  explicit Changed(const std::string& name) {
    std::filesystem::copy(golden(name), folder.path(),
                          std::filesystem::copy_options::recursive |
                              std::filesystem::copy_options::overwrite_existing);
  }
  std::string at(const std::string& file) const { return folder.at(file); }
  // The value at a path of config.json: "/vision_config/image_size".
  void config(const std::string& path, const json& value) const {
    json config = json::parse(contents(at("config.json")));
    config[json::json_pointer(path)] = value;
    testing::write(at("config.json"), config.dump());
  }
  // A tensor of the case.
  void input(const std::string& name, const std::function<void(std::int64_t*)>& change) const {
    const auto file = SafetensorsFile::open(at("parity.safetensors"));
    std::vector<NamedTensor> tensors;
    for (const nn::StoredTensor& tensor : file->tensors()) {
      tensors.push_back({tensor.name, file->read(tensor.name)->clone()});
      if (tensor.name == name) {
        change(tensors.back().tensor.data<std::int64_t>());
      }
    }
    const nn::Metadata metadata = file->metadata();
    ASSERT_TRUE(nn::write_safetensors(at("parity.safetensors"), tensors, metadata).ok());
  }
  // `message` follows the folder and a file of it.
  void expect(const std::string& file, const std::string& message) const {
    expect_refused("parity " + folder.path().string(), at(file) + ": " + message);
  }
};

TEST(BadModels, ContradictoryConfigs) {
  const auto with = [](const std::string& name, const std::string& path, const json& value,
                       const std::string& message) {
    const Changed changed(name);
    changed.config(path, value);
    changed.expect("config.json", message);
  };
  // Heads that do not divide.
  with("gpt2", "/n_head", 5, "n_head must divide n_embd = 32, got 5");
  with("qwen2", "/num_attention_heads", 5,
       "num_attention_heads must divide hidden_size = 32, got 5");
  with("glm4", "/num_key_value_heads", 3,
       "num_key_value_heads must divide num_attention_heads = 4, got 3");
  with("internlm2", "/num_attention_heads", 6,
       "num_attention_heads must divide hidden_size = 32, got 6");
  with("internlm2", "/num_key_value_heads", 3,
       "num_key_value_heads must divide num_attention_heads = 4, got 3");
  with("qwen", "/kv_channels", 7,
       "kv_channels times num_attention_heads = 4 must be hidden_size = 32, got 7");
  with("clip", "/text_config/num_attention_heads", 5,
       "text_config.num_attention_heads must divide hidden_size = 24, got 5");
  with("qwen2_vl", "/vision_config/num_heads", 3,
       "vision_config.num_heads must divide embed_dim = 16, got 3");
  // Sums and shares of rotary positions.
  for (const std::vector<int>& sections :
       {std::vector<int>{2, 3, 4}, std::vector<int>{8, 0}, std::vector<int>{-1, 4, 5}}) {
    with("qwen2_vl", "/rope_scaling/mrope_section", sections,
         fmt::format("rope_scaling.mrope_section must be three sizes that add up to half of a "
                     "head's 16 elements, got [{}]",
                     fmt::join(sections, ", ")));
  }
  with("glm4", "/partial_rotary_factor", 0.2,
       "partial_rotary_factor must leave an even number of rotated elements from 2 to head_dim = "
       "16, got 3.2");
  with("qwen", "/rotary_pct", 0.4,
       "rotary_pct must leave an even number of rotated elements from 2 to kv_channels = 8, got 3");
  // Images against patches.
  with("clip", "/vision_config/image_size", 13,
       "vision_config.image_size must be a multiple of patch_size = 4, got 13");
  with("clip_vision", "/patch_size", 5, "image_size must be a multiple of patch_size = 5, got 12");
  with("xcomposer2", "/vision_config/patch_size", 5,
       "vision_config.image_size must be a multiple of patch_size = 5, got 12");
}

// model.safetensors of a case, cut into two files with an index.
struct Sharded : Changed {
  json index;
  Sharded() : Changed("qwen2") {
    const auto file = SafetensorsFile::open(at("model.safetensors"));
    std::vector<NamedTensor> parts[2];
    for (const nn::StoredTensor& tensor : file->tensors()) {
      const std::size_t part = tensor.name < "model.layers.1" ? 0 : 1;
      parts[part].push_back({tensor.name, file->read(tensor.name)->clone()});
      index["weight_map"][tensor.name] = part == 0 ? "first.safetensors" : "second.safetensors";
    }
    EXPECT_TRUE(nn::write_safetensors(at("first.safetensors"), parts[0]).ok());
    EXPECT_TRUE(nn::write_safetensors(at("second.safetensors"), parts[1]).ok());
    std::filesystem::remove(at("model.safetensors"));
    write_index();
  }
  void write_index() const { testing::write(at("model.safetensors.index.json"), index.dump()); }
};

TEST(BadModels, IndexFiles) {
  EXPECT_EQ(testing::run_program("parity " + Sharded().folder.path().string()).code, 0);
  constexpr const char* kIndex = "model.safetensors.index.json";
  constexpr const char* kNorm = "model.norm.weight";
  const auto with = [&](const json& file, const std::string& of, const std::string& message) {
    Sharded sharded;
    sharded.index["weight_map"][kNorm] = file;
    sharded.write_index();
    sharded.expect(of, message);
  };
  with("third.safetensors", "second.safetensors",
       "holds tensor \"model.norm.weight\", which weight_map puts in third.safetensors");
  for (const std::string path : {"../second.safetensors", "/etc/passwd", "a/b", "..", ""}) {
    with(path, kIndex,
         fmt::format("weight_map.model.norm.weight must be the name of a file in the folder, got "
                     "\"{}\"",
                     path));
  }
  with(7, kIndex, "weight_map.model.norm.weight must be a string, got 7");
  with("first.safetensors", kIndex,
       "weight_map puts tensor \"model.norm.weight\" in first.safetensors, which does not hold it");

  const Sharded missing;
  std::filesystem::remove(missing.at("second.safetensors"));
  missing.expect("second.safetensors", "No such file or directory");

  // One name in two shards, with the index naming either.
  const Sharded twice;
  std::vector<NamedTensor> tensors;
  {
    const auto file = SafetensorsFile::open(twice.at("first.safetensors"));
    for (const nn::StoredTensor& tensor : file->tensors()) {
      tensors.push_back({tensor.name, file->read(tensor.name)->clone()});
    }
  }
  tensors.push_back({kNorm, Tensor::zeros({32}, DType::f32)});
  ASSERT_TRUE(nn::write_safetensors(twice.at("first.safetensors"), tensors).ok());
  twice.expect("first.safetensors",
               "holds tensor \"model.norm.weight\", which weight_map puts in second.safetensors");

  Sharded unlisted;
  unlisted.index["weight_map"].erase(kNorm);
  unlisted.write_index();
  unlisted.expect("second.safetensors",
                  "holds tensor \"model.norm.weight\", which weight_map does not list");
}

// All that is missing and all that has no place, at once.
TEST(BadModels, MissingAndUnexpectedTensors) {
  const Changed changed("internlm2");
  std::vector<NamedTensor> tensors;
  {
    const auto file = SafetensorsFile::open(changed.at("model.safetensors"));
    for (const nn::StoredTensor& tensor : file->tensors()) {
      std::string name = tensor.name;
      if (const std::size_t at = name.find("feed_forward.w1"); at != name.npos) {
        name.replace(at, 15, "feed_forward.gate");
      }
      if (name != "output.weight") {
        tensors.push_back({name, file->read(tensor.name)->clone()});
      }
    }
  }
  ASSERT_TRUE(nn::write_safetensors(changed.at("model.safetensors"), tensors).ok());
  const testing::Outcome outcome = testing::run_program("parity " + changed.folder.path().string());
  EXPECT_EQ(outcome.code, 2);
  for (const std::string part :
       {"3 tensors are missing: ", "model.layers.0.feed_forward.w1.weight",
        "model.layers.1.feed_forward.w1.weight", "output.weight",
        "2 tensors have no place in a internlm2: ", "model.layers.0.feed_forward.gate.weight",
        "model.layers.1.feed_forward.gate.weight"}) {
    EXPECT_NE(outcome.text.find(part), std::string::npos) << part << "\n" << outcome.text;
  }
}

TEST(BadModels, BatchesThatDoNotFit) {
  const auto with = [](const std::string& name, const std::string& input,
                       const std::function<void(std::int64_t*)>& change,
                       const std::string& message) {
    const Changed changed(name);
    changed.input(input, change);
    changed.expect("parity.safetensors", message);
  };
  const auto at = [](std::int64_t index, std::int64_t value) {
    return [=](std::int64_t* values) { values[index] = value; };
  };
  // An image token more, and one fewer, than there are features.
  with("qwen2_vl", "in.input_ids", at(14, 103),
       "[model] 1 images have 6 features, but ids hold 7 image tokens");
  with(
      "qwen2_vl", "in.input_ids", [](std::int64_t* ids) { *std::find(ids, ids + 15, 103) = 5; },
      "[model] 1 images have 6 features, but ids hold 5 image tokens");
  with("xcomposer2", "in.im_mask", at(17, 1),
       "[model] the images give 9 tokens, but image_tokens has 10 of them");
  with(
      "xcomposer2", "in.im_mask", [](std::int64_t* mask) { *std::find(mask, mask + 17, 1) = 0; },
      "[model] the images give 9 tokens, but image_tokens has 8 of them");
  // Labels, of which the one at 4 is the target of the token at 3, and ids outside of V.
  with("internlm2", "in.labels", at(4, 107),
       "[linear_cross_entropy] label of row 3 must be -100 or in [0, V) = [0, 107), got 107");
  with("qwen", "in.labels", at(4, -5),
       "[linear_cross_entropy] label of row 3 must be -100 or in [0, V) = [0, 109), got -5");
  with("qwen", "in.input_ids", at(4, 109),
       "[embedding] id at position 4 must be in [0, V) = [0, 109), got 109");
}

}  // namespace
}  // namespace reprise::train

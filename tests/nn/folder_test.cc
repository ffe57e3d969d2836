#include "nn/weights/folder.h"

#include <cstring>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/allocator.h"
#include "nn/weights/json.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::contents;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;

std::unique_ptr<Model> load(const std::string& folder, DType dtype = DType::f32) {
  auto model = load_model(folder, {.place = {cpu, dtype}});
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

void expect_bitwise(Model& a, Model& b) {
  const auto left = a.named_parameters(), right = b.named_parameters();
  ASSERT_EQ(left.size(), right.size());
  for (std::size_t i = 0; i < left.size(); ++i) {
    EXPECT_EQ(left[i].path, right[i].path);
    const Tensor x = left[i].parameter->value(), y = right[i].parameter->value();
    ASSERT_EQ(x.bytes(), y.bytes());
    EXPECT_EQ(std::memcmp(x.raw(), y.raw(), static_cast<std::size_t>(x.bytes())), 0)
        << left[i].path;
  }
}

std::string message(const std::string& folder) {
  return std::string(load_model(folder).status().message());
}

// A copy of a ready case's config with other weights.
struct Copy {
  Folder folder;
  std::vector<NamedTensor> tensors;
  explicit Copy(const std::string& name) {
    testing::write(folder.at("config.json"), contents(golden(name) / "config.json"));
    const auto file = SafetensorsFile::open((golden(name) / "model.safetensors").string());
    for (const StoredTensor& tensor : file->tensors()) {
      tensors.push_back({tensor.name, *file->read(tensor.name)});
    }
  }
  const std::string path() const { return folder.path().string(); }
  void write(const std::string& file = "model.safetensors") {
    const absl::Status status = write_safetensors(folder.at(file), tensors);
    EXPECT_TRUE(status.ok()) << status;
  }
  NamedTensor& at(const std::string& name) {
    return *std::find_if(tensors.begin(), tensors.end(),
                         [&](const NamedTensor& entry) { return entry.name == name; });
  }
};

TEST(Folder, LoadsEveryTensorOnce) {
  for (const std::string name : {"gpt2", "llama", "qwen2", "internlm2", "qwen"}) {
    const auto model = load(golden(name).string());
    ASSERT_NE(model, nullptr);
    const auto file = SafetensorsFile::open((golden(name) / "model.safetensors").string());
    EXPECT_EQ(model->parameters().size(), file->tensors().size());
    for (const NamedParameter& entry : model->named_parameters()) {
      const std::string key = name == "gpt2" ? entry.path.substr(12) : entry.path;
      const auto tensor = file->read(key);
      ASSERT_TRUE(tensor.ok()) << key;
      EXPECT_EQ(entry.parameter->value().to_vector<float>(), tensor->to_vector<float>());
    }
  }
}

TEST(Folder, ASavedModelLoadsBackBitwise) {
  for (const std::string name : {"gpt2", "llama", "qwen2", "internlm2", "qwen"}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Folder out;
      const auto model = load(golden(name).string(), dtype);
      const absl::Status saved = save_model(*model, out.at("new/folder"));
      ASSERT_TRUE(saved.ok()) << saved;
      const auto again = load(out.at("new/folder"), dtype);
      ASSERT_NE(again, nullptr);
      expect_bitwise(*model, *again);
      const auto config = JsonReader::open(out.at("new/folder/config.json"));
      EXPECT_EQ(config->value("torch_dtype"), dtype == DType::f32 ? "float32" : "bfloat16");
      EXPECT_EQ(config->value("initializer_range"), 0.02);
    }
  }
}

TEST(Folder, ShardsRoundTripAndReplaceEachOther) {
  const Folder out;
  const auto model = load(golden("llama").string());
  ASSERT_TRUE(save_model(*model, out.path().string(), {.max_shard_bytes = 20000}).ok());
  EXPECT_FALSE(std::filesystem::exists(out.at("model.safetensors")));
  const auto index = JsonReader::open(out.at("model.safetensors.index.json"));
  ASSERT_TRUE(index.ok());
  std::int64_t total = 0;
  for (const Parameter* parameter : model->parameters()) {
    total += parameter->value().bytes();
  }
  EXPECT_EQ(index->value("metadata")["total_size"], total);
  EXPECT_EQ(index->value("weight_map").size(), model->parameters().size());
  std::size_t shards = 0;
  for (const auto& entry : std::filesystem::directory_iterator(out.path())) {
    if (entry.path().extension() == ".safetensors") {
      ++shards;
      EXPECT_LE(std::filesystem::file_size(entry.path()), 20000u + 2000u);
    }
  }
  EXPECT_GE(shards, 5u);
  const auto again = load(out.path().string());
  ASSERT_NE(again, nullptr);
  expect_bitwise(*model, *again);

  // Fewer shards, then one file: nothing of the old save stays to be read.
  again->find_parameter("model.norm.weight")->write().data<float>()[0] = 42;
  ASSERT_TRUE(save_model(*again, out.path().string(), {.max_shard_bytes = 50000}).ok());
  expect_bitwise(*again, *load(out.path().string()));
  ASSERT_TRUE(save_model(*again, out.path().string()).ok());
  EXPECT_FALSE(std::filesystem::exists(out.at("model.safetensors.index.json")));
  expect_bitwise(*again, *load(out.path().string()));
  const auto files = std::filesystem::directory_iterator(out.path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 2);
}

TEST(Folder, ASaveRemovesNoFileOfTheUsers) {
  const Folder out;
  const auto model = load(golden("qwen2").string());
  const std::vector<std::string> own = {
      "model-ema.safetensors", "model-00001-of-00002-ema.safetensors", "model-1-of-2.safetensors",
      "model-00001-of-00002.safetensors.bak", "my-model-00001-of-00002.safetensors"};
  for (const std::string& file : own) {
    testing::write(out.at(file), file);
  }
  testing::write(out.at("model-00007-of-00009.safetensors"), "of an earlier save");
  for (const std::int64_t bytes : {1 << 30, 20000}) {
    ASSERT_TRUE(save_model(*model, out.path().string(), {.max_shard_bytes = bytes}).ok());
    for (const std::string& file : own) {
      EXPECT_EQ(contents(out.at(file)), file);
    }
    EXPECT_FALSE(std::filesystem::exists(out.at("model-00007-of-00009.safetensors")));
  }
}

// Files of f16, as many are published, into both types of model.
TEST(Folder, F16FilesAreConverted) {
  const Copy copy("qwen2");
  std::string header = "{", data;
  std::map<std::string, std::vector<float>> expected;
  // 1, -1.5, the least subnormal, the largest number, and 1 + 2^-10, which bf16 rounds.
  const std::vector<std::pair<std::uint16_t, float>> values = {{0x3c00, 1.0f},
                                                               {0xbe00, -1.5f},
                                                               {0x0001, 0x1p-24f},
                                                               {0x7bff, 65504.0f},
                                                               {0x3c01, 1.0009765625f}};
  for (const NamedTensor& entry : copy.tensors) {
    const std::size_t begin = data.size();
    for (std::int64_t i = 0; i < entry.tensor.numel(); ++i) {
      const auto& [bits, value] = values[static_cast<std::size_t>(i) % values.size()];
      data.append(reinterpret_cast<const char*>(&bits), 2);
      expected[entry.name].push_back(value);
    }
    std::string shape = to_string(entry.tensor.shape());
    header += (header.size() > 1 ? ",\"" : "\"") + entry.name +
              "\":{\"dtype\":\"F16\",\"shape\":" + shape + ",\"data_offsets\":[" +
              std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
  }
  header += "}";
  const std::uint64_t length = header.size();
  testing::write(copy.folder.at("model.safetensors"),
                 std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
  for (const bool map : {false, true}) {
    const auto wide = load_model(copy.path(), {.map = map});
    const auto narrow = load_model(copy.path(), {.place = {cpu, DType::bf16}, .map = map});
    ASSERT_TRUE(wide.ok() && narrow.ok()) << wide.status() << narrow.status();
    for (const auto& [name, numbers] : expected) {
      EXPECT_EQ((*wide)->find_parameter(name)->value().to_vector<float>(), numbers) << name;
      const auto rounded = (*narrow)->find_parameter(name)->value().to_vector<bfloat16>();
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        ASSERT_EQ(to_float(rounded[i]), to_float(to_bfloat16(numbers[i]))) << name;
      }
    }
  }
}

TEST(Folder, VerifiedSavesAndOtherValues) {
  const Folder out;
  const auto model = load(golden("llama").string());
  SaveOptions options{.max_shard_bytes = 20000, .verify = true};
  options.value = [](const NamedParameter& entry) {
    return entry.path == "model.norm.weight" ? Tensor::full(entry.parameter->shape(), DType::f32, 7)
                                             : entry.parameter->value();
  };
  const absl::Status saved = save_model(*model, out.path().string(), options);
  ASSERT_TRUE(saved.ok()) << saved;
  const auto again = load(out.path().string());
  EXPECT_EQ(again->find_parameter("model.norm.weight")->value().to_vector<float>(),
            std::vector<float>(32, 7));
  again->find_parameter("model.norm.weight")
      ->write()
      .copy_from(model->find_parameter("model.norm.weight")->value());
  expect_bitwise(*model, *again);
}

TEST(Folder, ATensorLargerThanAShardStandsAlone) {
  const Folder out;
  const auto model = load(golden("qwen2").string());
  ASSERT_TRUE(save_model(*model, out.path().string(), {.max_shard_bytes = 1}).ok());
  expect_bitwise(*model, *load(out.path().string()));
}

TEST(Folder, PrefixesOfTheTrunkMayBeThereOrNot) {
  Copy gpt2("gpt2");
  for (NamedTensor& entry : gpt2.tensors) {
    entry.name = "transformer." + entry.name;
  }
  gpt2.write();
  expect_bitwise(*load(golden("gpt2").string()), *load(gpt2.path()));
  Copy llama("llama");
  for (NamedTensor& entry : llama.tensors) {
    if (entry.name.starts_with("model.")) {
      entry.name = entry.name.substr(6);
    }
  }
  llama.write();
  expect_bitwise(*load(golden("llama").string()), *load(llama.path()));
}

TEST(Folder, BuffersAndTiedHeadsArePassedOver) {
  Copy gpt2("gpt2");
  gpt2.tensors.push_back({"h.0.attn.bias", Tensor::zeros(Shape{1, 1, 24, 24}, DType::f32)});
  gpt2.tensors.push_back({"h.1.attn.masked_bias", Tensor::zeros(Shape{}, DType::f32)});
  gpt2.tensors.push_back({"lm_head.weight", gpt2.at("wte.weight").tensor.clone()});
  gpt2.write();
  expect_bitwise(*load(golden("gpt2").string()), *load(gpt2.path()));
  Copy llama("llama");
  llama.tensors.push_back(
      {"model.layers.0.self_attn.rotary_emb.inv_freq", Tensor::zeros(Shape{4}, DType::f32)});
  llama.write();
  expect_bitwise(*load(golden("llama").string()), *load(llama.path()));
}

TEST(Folder, MissingAndUnexpectedTensorsAreToldTogether) {
  Copy copy("llama");
  copy.at("model.norm.weight").name = "model.norm.scale";
  copy.at("lm_head.weight").name = "head";
  copy.write();
  EXPECT_EQ(message(copy.path()),
            copy.path() +
                ": 2 tensors are missing: model.norm.weight (there is model.norm.scale), "
                "lm_head.weight; 2 tensors have "
                "no place in a llama: head, model.norm.scale");
  copy.at("head").name = "lm_head.weight";
  copy.at("model.norm.scale").name = "model.norm.weight";
  copy.tensors.push_back({"extra", Tensor::zeros(Shape{1}, DType::f32)});
  copy.write();
  EXPECT_EQ(message(copy.path()), copy.path() + ": 1 tensors have no place in a llama: extra");
  copy.tensors.clear();
  copy.write();
  EXPECT_THAT(message(copy.path()),
              HasSubstr(": 21 tensors are missing: model.embed_tokens.weight, "
                        "model.layers.0.input_layernorm.weight, "));
  EXPECT_THAT(message(copy.path()), ::testing::EndsWith(", model.norm.weight, lm_head.weight"));
}

TEST(Folder, AShapeThatDoesNotFitIsAnError) {
  Copy copy("qwen2");
  copy.at("model.norm.weight").tensor = Tensor::zeros(Shape{31}, DType::f32);
  copy.write();
  EXPECT_EQ(message(copy.path()),
            copy.folder.at("model.safetensors") +
                ": tensor \"model.norm.weight\" must have shape [32], got [31]");
  const auto mapped = load_model(copy.path(), {.map = true});
  EXPECT_EQ(mapped.status().message(), message(copy.path()));
  copy.at("model.norm.weight").tensor = Tensor::zeros(Shape{32}, DType::i64);
  copy.write();
  EXPECT_EQ(message(copy.path()),
            copy.folder.at("model.safetensors") +
                ": tensor \"model.norm.weight\" of type I64 cannot be read as f32");
}

// config.json may say anything; what the files do not have is not allocated.
TEST(Folder, SizesOfTheConfigAreCheckedAgainstTheFilesFirst) {
  const auto with = [](const std::string& key, std::int64_t size) {
    Copy copy("llama");
    copy.write();
    auto json = nlohmann::json::parse(contents(copy.folder.at("config.json")));
    json[key] = size;
    testing::write(copy.folder.at("config.json"), json.dump());
    const absl::Status status = load_model(copy.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    const std::string folder = copy.path() + "/";
    EXPECT_THAT(std::string(status.message()), ::testing::StartsWith(copy.path()));
    return std::string(status.message().substr(folder.size()));
  };
  allocator(cpu).reset_peak();
  const std::int64_t before = allocator(cpu).report().peak_bytes;
  EXPECT_EQ(with("vocab_size", 60'000'000),
            "model.safetensors: tensor \"model.embed_tokens.weight\" must have shape [60000000, "
            "32], got [101, 32]");
  EXPECT_THAT(with("num_hidden_layers", 10000), HasSubstr("tensors are missing: "));
  EXPECT_EQ(with("num_hidden_layers", 3'000'000),
            "config.json: num_hidden_layers must be at most 10000, got 3000000");
  EXPECT_EQ(with("hidden_size", std::int64_t{1} << 62),
            "config.json: hidden_size must be at most 1048576, got 4611686018427387904");
  EXPECT_LT(allocator(cpu).report().peak_bytes - before, 1 << 20);
}

TEST(Folder, FilesThatAreNotThere) {
  const Folder folder;
  EXPECT_THAT(message(folder.path().string()), HasSubstr(folder.at("config.json")));
  testing::write(folder.at("config.json"), R"({"model_type": "gpt2", "n_layer": 0, "n_embd": 12})");
  EXPECT_THAT(message(folder.path().string()), HasSubstr(folder.at("model.safetensors")));
  testing::write(folder.at("model.safetensors"), "");
  EXPECT_EQ(
      message(folder.path().string()),
      folder.at("model.safetensors") + ": HeaderTooSmall: the file has 0 bytes, 8 are the least");
  testing::write(folder.at("config.json"), "{");
  EXPECT_EQ(message(folder.path().string()), folder.at("config.json") + ": byte 2: not valid JSON");
}

std::string index_problem(const std::string& index, const Folder& folder) {
  testing::write(folder.at("model.safetensors.index.json"), index);
  return std::string(WeightFolder::open(folder.path().string()).status().message());
}

TEST(Folder, ChecksOfAnIndex) {
  const Folder folder;
  const std::string path = folder.at("model.safetensors.index.json");
  const auto one = [](const std::string& name) {
    return std::vector<NamedTensor>{{name, Tensor::zeros(Shape{1}, DType::f32)}};
  };
  ASSERT_TRUE(write_safetensors(folder.at("1"), one("a")).ok());
  std::vector<NamedTensor> two = one("b");
  two.push_back({"a", Tensor::zeros(Shape{1}, DType::f32)});
  ASSERT_TRUE(write_safetensors(folder.at("2"), two).ok());

  EXPECT_EQ(index_problem("{}", folder), path + ": weight_map is missing");
  EXPECT_EQ(index_problem(R"({"weight_map": []})", folder),
            path + ": weight_map must be an object, got []");
  EXPECT_EQ(index_problem(R"({"weight_map": {"a": 1}})", folder),
            path + ": weight_map.a must be a string, got 1");
  for (const std::string file : {"../1", "/1", "..", ".", "", "x/1", "x\\\\1"}) {
    EXPECT_THAT(index_problem(R"({"weight_map": {"a": ")" + file + "\"}}", folder),
                HasSubstr("weight_map.a must be the name of a file in the folder, got"))
        << file;
  }
  EXPECT_THAT(index_problem(R"({"weight_map": {"a": "3"}})", folder), HasSubstr(folder.at("3")));
  EXPECT_EQ(index_problem(R"({"weight_map": {"c": "1"}})", folder),
            path + ": weight_map puts tensor \"c\" in 1, which does not hold it");
  EXPECT_EQ(index_problem(R"({"weight_map": {"b": "2"}})", folder),
            folder.at("2") + ": holds tensor \"a\", which weight_map does not list");
  EXPECT_EQ(index_problem(R"({"weight_map": {"a": "1", "b": "2"}})", folder),
            folder.at("2") + ": holds tensor \"a\", which weight_map puts in 1");
  EXPECT_EQ(index_problem(R"({"weight_map": {"a": "1"}})", folder), "");
  // One file comes before an index.
  ASSERT_TRUE(write_safetensors(folder.at("model.safetensors"), one("z")).ok());
  EXPECT_EQ(WeightFolder::open(folder.path().string())->names(), std::vector<std::string>{"z"});
}

TEST(Folder, MappedParametersAreCountedAndLeaveTheFileAlone) {
  const Copy copy("llama");
  const_cast<Copy&>(copy).write();
  const auto counted = [] {
    return allocator(cpu).report().live[static_cast<std::size_t>(MemoryKind::parameters)];
  };
  const std::int64_t before = counted();
  auto mapped = load_model(copy.path());
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const std::int64_t bytes = counted() - before;
  EXPECT_GT(bytes, 0);
  const auto usual = load_model(copy.path(), {.map = false});
  ASSERT_TRUE(usual.ok()) << usual.status();
  EXPECT_EQ(counted(), before + 2 * bytes);
  expect_bitwise(**mapped, **usual);
  // Another file in the place of this one.
  auto other = load_model(copy.path());
  (*other)->find_parameter("lm_head.weight")->write().zero();
  ASSERT_TRUE(save_model(**other, copy.path()).ok());
  expect_bitwise(**mapped, **usual);
  ASSERT_TRUE(save_model(**usual, copy.path()).ok());
  (*mapped)->find_parameter("lm_head.weight")->write().zero();
  expect_bitwise(*load(copy.path()), **usual);
  mapped = absl::UnknownError("");
  other = absl::UnknownError("");
  EXPECT_EQ(counted(), before + bytes);
  // Another type than the file's is converted, hence copied.
  auto brief = load_model(copy.path(), {.place = {cpu, DType::bf16}, .map = true});
  ASSERT_TRUE(brief.ok());
  expect_bitwise(**brief, *load(copy.path(), DType::bf16));
}

TEST(Folder, OnMetaOnlyShapesAreRead) {
  const auto model = load_model(golden("gpt2").string(), {.place = {meta, DType::bf16}});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->parameters().front()->value().is_meta());
}

}  // namespace
}  // namespace reprise::nn

#include "train/parity.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include <gtest/gtest.h>

#include "nn/weights/safetensors.h"
#include "tests/nn/files.h"

namespace reprise::train {
namespace {

using nn::NamedTensor;
using nn::SafetensorsFile;
using testing::Folder;
using testing::golden;

constexpr const char* kCases[] = {"gpt2",       "gpt2_lora",         "llama",     "qwen2",
                                  "qwen2_lora", "qwen2_lora_extras", "qwen3",     "glm4",
                                  "qwen2_vl",   "qwen2_vl_lora",     "clip",      "clip_vision",
                                  "xcomposer2", "xcomposer2_lora",   "internlm2", "qwen",
                                  "qwen_lora",  "qwen2_dora"};

TEST(Parity, ReadyCasesPassUnderEveryPolicy) {
  for (const std::string name : kCases) {
    const auto report = run_parity(golden(name).string(), {.every_policy = true});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(report->passed()) << to_text(*report);
    EXPECT_EQ(exit_code(report), 0);
    EXPECT_EQ(report->name, name);
    // Everything that the case holds is compared.
    const auto file = SafetensorsFile::open((golden(name) / "parity.safetensors").string());
    std::size_t expected = 0;
    for (const nn::StoredTensor& tensor : file->tensors()) {
      expected += tensor.name.starts_with("in.") ? 0 : 1;
    }
    EXPECT_EQ(report->rows.size(), expected);
    ASSERT_EQ(report->policies.size(), 5u);
    for (const ParityPolicy& policy : report->policies) {
      EXPECT_EQ(policy.digest, report->policies.front().digest) << policy.name;
    }
    for (std::size_t i = 1; i < report->rows.size(); ++i) {
      const auto badness = [](const ParityRow& row) {
        return (row.zero ? row.absolute : row.relative) / row.tolerance;
      };
      EXPECT_GE(badness(report->rows[i - 1]), badness(report->rows[i]));
    }
  }
}

// Options that only the reference can vouch for; tests/golden/make_options.py made them.
constexpr const char* kOptionCases[] = {"llama_biases",      "llama_pad_from_end",
                                        "llama_linear_rope", "llama_dynamic_rope",
                                        "llama_yarn",        "llama_yarn_mscale",
                                        "qwen2_window",      "gpt2_options",
                                        "qwen3_options",     "glm",
                                        "glm4_options",      "qwen2_vl_frames",
                                        "clip_options",      "clip_vision_resized",
                                        "xcomposer2_tiles",  "xcomposer2_text",
                                        "xcomposer2_images", "internlm2_options",
                                        "qwen_long"};

// The same of adapters; tests/golden/make_adapters.py made them.
constexpr const char* kAdapterCases[] = {"llama_lora_embedding", "llama_lora_tied_embedding",
                                         "llama_lora_head",      "llama_dora_embedding",
                                         "qwen2_lora_bias_only", "qwen2_lora_bias_all",
                                         "qwen2_lora_layers",    "gpt2_dora",
                                         "gpt2_lora_saved"};

std::vector<std::string> option_cases() {
  std::vector<std::string> names(std::begin(kOptionCases), std::end(kOptionCases));
  names.insert(names.end(), std::begin(kAdapterCases), std::end(kAdapterCases));
  return names;
}

TEST(Parity, OptionsPassUnderEveryPolicy) {
  for (const std::string& name : option_cases()) {
    const auto report = run_parity(golden(name).string(), {.every_policy = true});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(report->passed()) << name << "\n" << to_text(*report);
    EXPECT_EQ(report->name, name);
    const auto file = SafetensorsFile::open((golden(name) / "parity.safetensors").string());
    const auto compared = std::ranges::count_if(
        file->tensors(), [](const auto& tensor) { return !tensor.name.starts_with("in."); });
    EXPECT_EQ(static_cast<std::int64_t>(report->rows.size()), compared);
  }
}

// Each option matters: without it the case does not pass.
TEST(Parity, OptionsOfTheModelsAreSeen) {
  for (const auto& [name, key, value] : std::vector<std::array<const char*, 3>>{
           {"llama_pad_from_end", "pad_token_id", "null"},
           {"llama_linear_rope", "rope_parameters", "null"},
           {"llama_dynamic_rope", "rope_parameters", "null"},
           {"llama_yarn", "rope_parameters", "null"},
           {"llama_yarn_mscale", "rope_parameters", "null"},
           {"qwen2_window", "use_sliding_window", "false"},
           {"qwen2_window", "max_window_layers", "0"},
           {"qwen3_options", "use_sliding_window", "false"},
           {"qwen3_options", "sliding_window", "4"},
           {"glm", "pad_token_id", "null"},
           {"glm", "rms_norm_eps", "1e-5"},
           {"glm", "rope_parameters", R"({"partial_rotary_factor": 1.0})"},
           {"glm4_options", "hidden_act", "\"silu\""},
           // The text ends at the first of the largest ids.
           {"clip_options", "text_config_dict",
            R"({"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
                "num_attention_heads": 3, "vocab_size": 31, "max_position_embeddings": 10,
                "hidden_act": "gelu", "eos_token_id": 2})"},
           {"xcomposer2_tiles", "plora_qkv_scale", "1"},
           {"internlm2_options", "pad_token_id", "null"},
           {"internlm2_options", "rope_scaling", "null"},
           {"qwen_long", "use_dynamic_ntk", "false"},
           {"qwen_long", "use_logn_attn", "false"},
           {"gpt2_options", "scale_attn_by_inverse_layer_idx", "false"}}) {
    const Folder folder;
    std::filesystem::copy(golden(name), folder.path(),
                          std::filesystem::copy_options::recursive |
                              std::filesystem::copy_options::overwrite_existing);
    auto config = nlohmann::json::parse(testing::contents(folder.at("config.json")));
    config[key] = nlohmann::json::parse(value);
    config.erase("layer_types");
    testing::write(folder.at("config.json"), config.dump());
    const auto report = run_parity(folder.path().string());
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_FALSE(report->passed()) << name << " without " << key;
  }
}

// In bf16 some tensors of two cases lie beyond the bound, by no more than this. Rounding only the
// weights of qwen2_vl to bf16 moves a bias of its tower by 0.12; PyTorch's run of that case, with
// its default attention, is 0.19 off.
double allowed_in_bfloat16(const std::string& name, const ParityRow& row) {
  if (name == "qwen2_vl" && row.key.starts_with("grad.visual.blocks.")) {
    return 0.25;
  }
  return name == "xcomposer2_tiles" && row.key == "out.logits" ? 4.5e-2 : row.tolerance;
}

TEST(Parity, EveryCasePassesInBfloat16) {
  std::vector<std::string> names = option_cases();
  names.insert(names.end(), std::begin(kCases), std::end(kCases));
  for (const std::string& name : names) {
    const auto report = run_parity(golden(name).string(), {.dtype = DType::bf16});
    ASSERT_TRUE(report.ok()) << report.status();
    for (const ParityRow& row : report->rows) {
      EXPECT_LE(row.zero ? row.absolute : row.relative, allowed_in_bfloat16(name, row))
          << to_text(*report);
    }
    EXPECT_NE(to_text(*report).find("the reference is in f32"), std::string::npos);
    // It did run in bf16.
    EXPECT_GT(report->rows.front().relative, 1e-3) << name;
  }
}

// A copy of a ready case that a test changes.
struct Copy {
  Folder folder;
  std::vector<NamedTensor> tensors;
  nn::Metadata metadata;

  explicit Copy(const std::string& name = "qwen2") {
    std::filesystem::copy(golden(name), folder.path(),
                          std::filesystem::copy_options::recursive |
                              std::filesystem::copy_options::overwrite_existing);
    const auto file = SafetensorsFile::open((golden(name) / "parity.safetensors").string());
    metadata = file->metadata();
    for (const nn::StoredTensor& tensor : file->tensors()) {
      tensors.push_back({tensor.name, file->read(tensor.name)->clone()});
    }
  }
  Tensor& at(const std::string& key) {
    for (NamedTensor& entry : tensors) {
      if (entry.name == key) {
        return entry.tensor;
      }
    }
    tensors.push_back({key, {}});
    return tensors.back().tensor;
  }
  void erase(const std::function<bool(const std::string&)>& which) {
    std::erase_if(tensors, [&](const NamedTensor& entry) { return which(entry.name); });
  }
  std::string path() const { return folder.path().string(); }
  absl::StatusOr<ParityReport> run(const ParityOptions& options = {}) {
    const absl::Status status =
        nn::write_safetensors(folder.at("parity.safetensors"), tensors, metadata);
    EXPECT_TRUE(status.ok()) << status;
    return run_parity(path(), options);
  }
  // The message after the path of the case; the exit code must be 2.
  std::string problem() {
    const auto report = run();
    EXPECT_EQ(exit_code(report), 2);
    std::string text(report.status().message());
    const std::string file = folder.at("parity.safetensors") + ": ";
    return text.starts_with(file) ? text.substr(file.size()) : text;
  }
};

const ParityRow& row(const ParityReport& report, const std::string& key) {
  for (const ParityRow& each : report.rows) {
    if (each.key == key) {
      return each;
    }
  }
  throw std::runtime_error(key);
}

TEST(Parity, ADifferenceIsSeenAndComesFirst) {
  Copy copy;
  float* const gradient = copy.at("grad.model.norm.weight").data<float>();
  gradient[3] += 0.01f * std::abs(gradient[3]) + 0.01f;
  auto report = copy.run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(exit_code(report), 1);
  EXPECT_EQ(report->rows.front().key, "grad.model.norm.weight");
  EXPECT_FALSE(report->rows.front().within);
  EXPECT_TRUE(report->rows[1].within);
  EXPECT_NE(to_text(*report).find("MISS grad.model.norm.weight"), std::string::npos);
  EXPECT_NE(to_text(*report).find("FAIL: 28 of 29 tensors within tolerance"), std::string::npos);

  Copy other;
  other.at("steps.loss").data<float>()[4] *= 1.001f;
  other.at("out.loss").data<float>()[0] = std::numeric_limits<float>::quiet_NaN();
  report = other.run();
  EXPECT_EQ(exit_code(report), 1);
  EXPECT_EQ(report->rows.front().key, "out.loss");
  EXPECT_FALSE(row(*report, "out.loss").within);
  EXPECT_FALSE(row(*report, "steps.loss").within);
  EXPECT_NEAR(row(*report, "steps.loss").relative, 1e-3, 1e-4);
}

TEST(Parity, OtherWeightsFail) {
  Copy copy("llama");
  const auto file = SafetensorsFile::open(copy.folder.at("model.safetensors"));
  std::vector<NamedTensor> weights;
  for (const nn::StoredTensor& tensor : file->tensors()) {
    weights.push_back({tensor.name, file->read(tensor.name)->clone()});
  }
  weights.back().tensor.data<float>()[0] += 1;
  ASSERT_TRUE(nn::write_safetensors(copy.folder.at("model.safetensors"), weights).ok());
  EXPECT_EQ(exit_code(copy.run()), 1);
}

TEST(Parity, LogitsAtPaddingAreNotCompared) {
  Copy copy;
  const Tensor mask = copy.at("in.attention_mask");
  const std::int64_t tokens = mask.numel(), width = copy.at("out.logits").numel() / tokens;
  std::int64_t padded = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (mask.data<std::int64_t>()[t] == 0) {
      ++padded;
      std::fill_n(copy.at("out.logits").data<float>() + t * width, width, 1e6f);
    }
  }
  ASSERT_GT(padded, 0);
  EXPECT_EQ(exit_code(copy.run()), 0);
}

TEST(Parity, AZeroReferenceIsComparedAbsolutely) {
  Copy copy;
  copy.at("grad.model.norm.weight").zero();
  const auto report = copy.run();
  const ParityRow& zero = row(*report, "grad.model.norm.weight");
  EXPECT_TRUE(zero.zero);
  EXPECT_FALSE(zero.within);
  EXPECT_GT(zero.absolute, 1e-3);
}

TEST(Parity, AGradientThatIsNotThereFails) {
  Copy copy;
  copy.at("grad.other") = Tensor::zeros(Shape{2}, DType::f32);
  const auto report = copy.run();
  EXPECT_EQ(exit_code(report), 1);
  EXPECT_EQ(report->rows.front().key, "grad.other");
  EXPECT_TRUE(std::isinf(report->rows.front().absolute));
  const auto json = nlohmann::json::parse(to_json(*report));
  EXPECT_TRUE(json["tensors"][0]["absolute"].is_null());
}

TEST(Parity, KeysThatTheCaseLacksAreNotCompared) {
  Copy copy;
  copy.erase([](const std::string& key) { return !key.starts_with("in.") && key != "out.loss"; });
  const auto report = copy.run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->rows.size(), 1u);
  EXPECT_TRUE(report->passed());
}

TEST(Parity, WritesEveryOutputOfACaseThatHoldsInputsOnly) {
  for (const std::string name : {"qwen2", "gpt2_lora"}) {
    Copy copy(name);
    copy.erase([](const std::string& key) { return !key.starts_with("in."); });
    const auto report = copy.run({.write = copy.folder.at("out.safetensors")});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(exit_code(report), 0);
    EXPECT_TRUE(report->rows.empty());
    const auto ours = SafetensorsFile::open(copy.folder.at("out.safetensors"));
    const auto theirs = SafetensorsFile::open((golden(name) / "parity.safetensors").string());
    ASSERT_TRUE(ours.ok()) << ours.status();
    std::size_t written = 0;
    for (const nn::StoredTensor& tensor : theirs->tensors()) {
      if (tensor.name.starts_with("in.")) {
        continue;
      }
      ++written;
      ASSERT_NE(ours->find(tensor.name), nullptr) << tensor.name;
      EXPECT_EQ(ours->find(tensor.name)->shape, tensor.shape);
      const auto a = ours->read(tensor.name)->to_vector<float>();
      const auto b = theirs->read(tensor.name)->to_vector<float>();
      double largest = 0;
      for (std::size_t i = 0; i < a.size() && tensor.name != "out.logits"; ++i) {
        largest = std::max(largest, static_cast<double>(std::abs(a[i] - b[i])));
      }
      EXPECT_LT(largest, 1e-3) << tensor.name;
    }
    EXPECT_EQ(ours->tensors().size(), written);
    EXPECT_EQ(ours->metadata().at("format"), "pt");
  }
}

TEST(Parity, TheNumberOfStepsIsInTheMetadata) {
  Copy copy;
  copy.metadata["steps"] = "2";
  const Tensor losses = copy.at("steps.loss");
  copy.at("steps.loss") = losses.slice(0, 0, 2).clone();
  const auto report = copy.run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->passed()) << to_text(*report);
}

TEST(Parity, CasesThatCannotBeRead) {
  const Folder empty;
  EXPECT_EQ(exit_code(run_parity(empty.path().string())), 2);
  const auto with = [](const std::function<void(Copy&)>& change) {
    Copy copy;
    change(copy);
    return copy.problem();
  };
  EXPECT_EQ(with([](Copy& c) { c.erase([](const auto& key) { return key == "in.input_ids"; }); }),
            "has neither in.input_ids nor in.pixel_values");
  EXPECT_EQ(with([](Copy& c) { c.at("in.input_ids") = Tensor::zeros(Shape{2}, DType::i64); }),
            "in.input_ids must be i64 [B, T], got i64 [2]");
  EXPECT_EQ(with([](Copy& c) {
              c.at("in.labels") = Tensor::zeros(Shape{2, 13}, DType::i64);
            }),
            "in.labels must be i64 [B, T] = [2, 14], got i64 [2, 13]");
  EXPECT_EQ(with([](Copy& c) {
              c.at("in.position_ids") = Tensor::zeros(Shape{3, 2, 14}, DType::i64);
            }),
            "[model] positions must be i64 [B, T] = [2, 14], got i64 [3, 2, 14]");
  EXPECT_EQ(with([](Copy& c) {
              c.at("in.position_ids") = Tensor::zeros(Shape{2, 2, 14}, DType::i64);
            }),
            "in.position_ids must be i64 [B, T] or [3, B, T] = [2, 14], got i64 [2, 2, 14]");
  EXPECT_EQ(with([](Copy& c) { c.at("in.surprise") = Tensor::zeros(Shape{1}, DType::f32); }),
            "in.surprise is not an input that any model takes");
  EXPECT_EQ(with([](Copy& c) { c.at("in.pixel_values") = Tensor::zeros(Shape{1}, DType::f32); }),
            "[model] pixels must be absent: qwen2 takes no images");
  EXPECT_EQ(with([](Copy& c) { c.at("out.logits") = Tensor::zeros(Shape{2}, DType::f32); }),
            "out.logits must have shape [2, 14, 101], got [2]");
  EXPECT_EQ(with([](Copy& c) { c.at("out.loss") = Tensor::zeros(Shape{}, DType::bf16); }),
            "out.loss must be f32, got bf16");
  EXPECT_EQ(with([](Copy& c) { c.metadata["train"] = "true"; }),
            "was made with dropout on, whose random numbers cannot agree");
  EXPECT_EQ(with([](Copy& c) { c.metadata.erase("optimizer"); }),
            "has steps.loss but no \"optimizer\" in its metadata");
  EXPECT_EQ(with([](Copy& c) { c.metadata["optimizer"] = "{"; }),
            "metadata \"optimizer\": byte 2: not valid JSON");
  EXPECT_EQ(with([](Copy& c) { c.metadata["optimizer"] = R"({"lr": 1, "betas": [0.9]})"; }),
            "metadata \"optimizer\": betas must be two numbers, got [0.9]");
  EXPECT_EQ(with([](Copy& c) { c.metadata["optimizer"] = R"({"lr": 1, "betas": [0.9, 0.9]})"; }),
            "metadata \"optimizer\": eps is missing");
  EXPECT_EQ(with([](Copy& c) { c.metadata["steps"] = "-1"; }),
            "metadata \"steps\" must be a number, got \"-1\"");
  EXPECT_NE(with([](Copy& c) { c.at("in.input_ids").data<std::int64_t>()[0] = 101; }).find("101"),
            std::string::npos);
  EXPECT_NE(with([](Copy& c) {
              testing::write(c.folder.at("config.json"), "{}");
            }).find("config.json: model_type is missing"),
            std::string::npos);
  EXPECT_NE(with([](Copy& c) {
              std::filesystem::create_directory(c.folder.at("adapter"));
            }).find("adapter_config.json"),
            std::string::npos);
}

TEST(Parity, ReportsAsJson) {
  const auto report = run_parity(golden("gpt2").string());
  const auto json = nlohmann::json::parse(to_json(*report));
  EXPECT_EQ(json["case"], "gpt2");
  EXPECT_EQ(json["passed"], true);
  EXPECT_EQ(json["dtype"], "f32");
  EXPECT_EQ(json["tensors"].size(), report->rows.size());
  EXPECT_EQ(json["tensors"][0]["key"], report->rows.front().key);
  EXPECT_EQ(json["policies"].size(), 1u);
  EXPECT_EQ(json["policies"][0]["name"], "inputs-only");
}

}  // namespace
}  // namespace reprise::train

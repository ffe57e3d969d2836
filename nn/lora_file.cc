#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include <fmt/format.h>

#include "core/error.h"
#include "nn/lora.h"
#include "nn/weights/json.h"
#include "nn/weights/replace_file.h"
#include "nn/weights/safetensors.h"

namespace reprise::nn {
namespace {

constexpr std::string_view kConfig = "adapter_config.json";
constexpr std::string_view kWeights = "adapter_model.safetensors";
const std::string kPrefix = "base_model.model.";

std::string inside(const std::string& folder, std::string_view file) {
  return (std::filesystem::path(folder) / file).string();
}

// Variants of LoRA that change what an adapter means; off and absent are the same.
constexpr std::string_view kOther[] = {
    "use_dora",          "lora_bias",
    "use_qalora",        "use_bdlora",
    "layer_replication", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens",
    "kasa_config",       "velora_config",
    "monteclora_config", "arrow_config",
    "megatron_config",
};

// A list of names, or one string which is a regex ("all-linear" aside).
ModulePattern read_pattern(JsonReader& json, std::string_view key) {
  if (json.value(key).is_string()) {
    return {{}, json.string(key)};
  }
  return {json.strings(key, std::vector<std::string>{}), ""};
}

LoraInit read_init(JsonReader& json) {
  const nlohmann::json& value = json.value("init_lora_weights");
  if (value.is_null() || value == true) {
    return LoraInit::usual;
  }
  if (value == false) {
    return LoraInit::random;
  }
  if (value == "gaussian") {
    return LoraInit::gaussian;
  }
  json.refuse("init_lora_weights", fmt::format("must be true, false or \"gaussian\", got {}: other "
                                               "ways change the base weights",
                                               value.dump()));
  return LoraInit::usual;
}

std::optional<std::string> read_optional(JsonReader& json, std::string_view key) {
  return json.has(key) ? std::optional(json.string(key)) : std::nullopt;
}

LoraConfig read_config(JsonReader& json) {
  LoraConfig config;
  if (json.string("peft_type") != "LORA" && json.status().ok()) {
    json.refuse("peft_type", fmt::format("must be \"LORA\", got \"{}\"", json.string("peft_type")));
  }
  for (const std::string_view key : kOther) {
    const nlohmann::json& value = json.value(key);
    if (!value.is_null() && value != false) {
      json.refuse(key, "is not supported: it must be false or null");
    }
  }
  config.rank = json.integer_from(1, "r", 8);
  config.alpha = json.number("lora_alpha", 8);
  config.dropout = json.number("lora_dropout", 0);
  config.rank_stabilized = json.boolean("use_rslora", false);
  config.init = read_init(json);
  config.targets = read_pattern(json, "target_modules");
  if (config.targets.regex == "all-linear") {
    config.targets.regex.clear();
    config.all_linear = true;
  }
  config.exclude = read_pattern(json, "exclude_modules");
  config.modules_to_save = json.strings("modules_to_save", std::vector<std::string>{});
  if (json.value("layers_to_transform").is_number()) {
    config.layers = {json.integer("layers_to_transform")};
  } else {
    config.layers = json.integers("layers_to_transform", std::vector<std::int64_t>{});
  }
  if (json.value("layers_pattern").is_string()) {
    config.layer_lists = {json.string("layers_pattern")};
  } else {
    config.layer_lists = json.strings("layers_pattern", std::vector<std::string>{});
  }
  JsonReader ranks = json.object("rank_pattern"), alphas = json.object("alpha_pattern");
  for (const std::string& key : ranks.keys()) {
    config.ranks.emplace_back(key, ranks.integer_from(1, key));
  }
  for (const std::string& key : alphas.keys()) {
    config.alphas.emplace_back(key, alphas.number(key));
  }
  config.bias = json.string("bias", "none");
  config.task = read_optional(json, "task_type");
  config.base_model = read_optional(json, "base_model_name_or_path");
  return config;
}

nlohmann::json pattern_json(const ModulePattern& pattern) {
  if (!pattern.regex.empty()) {
    return pattern.regex;
  }
  return pattern.names;
}

// The parameter of each key of an adapter file, which may have the names of another generation.
std::map<std::string, Parameter*> by_key(Model& model, const LoraConfig& config,
                                         const SafetensorsFile& file) {
  std::map<std::string, Parameter*> result;
  for (const NamedParameter& entry : adapter_parameters(model, config)) {
    std::string key = entry.path;
    if (file.find(key) == nullptr) {
      for (const FileKey& other : model.file_keys(key.substr(kPrefix.size()))) {
        if (file.find(kPrefix + other.key) != nullptr) {
          key = kPrefix + other.key;
          break;
        }
      }
    }
    result.emplace(key, entry.parameter);
  }
  return result;
}

}  // namespace

std::string to_json(const LoraConfig& config, const Model& model) {
  nlohmann::json json = {{"peft_type", "LORA"},        {"r", config.rank},
                         {"lora_alpha", config.alpha}, {"lora_dropout", config.dropout},
                         {"bias", config.bias},        {"inference_mode", true}};
  json["task_type"] = config.task ? nlohmann::json(*config.task) : nlohmann::json();
  json["base_model_name_or_path"] =
      config.base_model ? nlohmann::json(*config.base_model) : nlohmann::json();
  json["target_modules"] = config.all_linear        ? nlohmann::json("all-linear")
                           : config.targets.empty() ? nlohmann::json()
                                                    : pattern_json(config.targets);
  // Readers of older releases refuse keys that they do not know: only what differs is written.
  if (config.alpha == std::floor(config.alpha)) {
    json["lora_alpha"] = static_cast<std::int64_t>(config.alpha);
  }
  if (model.type() == "gpt2") {
    json["fan_in_fan_out"] = true;
  }
  if (config.rank_stabilized) {
    json["use_rslora"] = true;
  }
  if (config.init != LoraInit::usual) {
    json["init_lora_weights"] =
        config.init == LoraInit::gaussian ? nlohmann::json("gaussian") : nlohmann::json(false);
  }
  if (!config.exclude.empty()) {
    json["exclude_modules"] = pattern_json(config.exclude);
  }
  if (!config.modules_to_save.empty()) {
    json["modules_to_save"] = config.modules_to_save;
  }
  if (!config.layers.empty()) {
    json["layers_to_transform"] = config.layers;
  }
  if (!config.layer_lists.empty()) {
    json["layers_pattern"] = config.layer_lists;
  }
  for (const auto& [key, value] : config.ranks) {
    json["rank_pattern"][key] = value;
  }
  for (const auto& [key, value] : config.alphas) {
    if (value == std::floor(value)) {
      json["alpha_pattern"][key] = static_cast<std::int64_t>(value);
    } else {
      json["alpha_pattern"][key] = value;
    }
  }
  return json.dump(2) + "\n";
}

absl::StatusOr<LoraConfig> read_lora_config(const std::string& folder) {
  absl::StatusOr<JsonReader> json = JsonReader::open(inside(folder, kConfig));
  if (!json.ok()) {
    return json.status();
  }
  LoraConfig config = read_config(*json);
  if (!json->status().ok()) {
    return json->status();
  }
  return config;
}

absl::Status save_adapter(Model& model, const LoraConfig& config, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return absl::ErrnoToStatus(error.value(), folder);
  }
  std::vector<NamedTensor> tensors;
  for (const NamedParameter& entry : adapter_parameters(model, config)) {
    tensors.push_back({entry.path, entry.parameter->value()});
  }
  const absl::Status status = write_safetensors(inside(folder, kWeights), tensors);
  return status.ok() ? replace_file(inside(folder, kConfig), to_json(config, model)) : status;
}

absl::StatusOr<LoraConfig> load_adapter(Model& model, const std::string& folder) {
  const absl::StatusOr<LoraConfig> config = read_lora_config(folder);
  if (!config.ok()) {
    return config;
  }
  const std::string path = inside(folder, kWeights);
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::open(path);
  if (!file.ok()) {
    return file.status();
  }
  try {
    Generator unused;  // every value is overwritten below
    add_lora(model, *config, unused);
  } catch (const Error& mistake) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {}", inside(folder, kConfig), mistake.what()));
  }
  const std::map<std::string, Parameter*> parameters = by_key(model, *config, *file);
  std::vector<std::string> missing, unexpected;
  for (const auto& [key, parameter] : parameters) {
    if (file->find(key) == nullptr) {
      missing.push_back(key);
    }
  }
  for (const StoredTensor& tensor : file->tensors()) {
    if (!parameters.contains(tensor.name)) {
      unexpected.push_back(tensor.name);
    }
  }
  if (!missing.empty() || !unexpected.empty()) {
    return absl::InvalidArgumentError(fmt::format("{}: missing: [{}]; without a place: [{}]", path,
                                                  fmt::join(missing, ", "),
                                                  fmt::join(unexpected, ", ")));
  }
  for (const auto& [key, parameter] : parameters) {
    const absl::Status status = file->read_into(key, parameter->write());
    if (!status.ok()) {
      return status;
    }
  }
  return config;
}

}  // namespace reprise::nn

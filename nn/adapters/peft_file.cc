#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "core/error.h"
#include "nn/adapters/add.h"
#include "nn/adapters/select.h"
#include "nn/adapters/set.h"
#include "nn/embedding.h"
#include "nn/linear.h"
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

// The keys of an object in the order of the file: the first pattern that matches counts, and the
// reader has them sorted.
std::vector<std::string> keys_in_order(const nlohmann::ordered_json& document, const char* key) {
  std::vector<std::string> keys;
  if (const auto found = document.find(key); found != document.end() && found->is_object()) {
    for (const auto& item : found->items()) {
      keys.push_back(item.key());
    }
  }
  return keys;
}

// `document`: the same file.
LoraConfig read_config(JsonReader& json, const nlohmann::ordered_json& document) {
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
  config.weight_decomposed = json.boolean("use_dora", false);
  config.b_bias = json.boolean("lora_bias", false);
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
  for (const std::string& key : keys_in_order(document, "rank_pattern")) {
    config.ranks.emplace_back(key, ranks.integer_from(1, key));
  }
  for (const std::string& key : keys_in_order(document, "alpha_pattern")) {
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

// A tensor of the file and the parameter that it is for.
struct Entry {
  std::string key;
  Parameter* parameter;
  bool optional = false;
};

// Base weights that PEFT writes beside adapters on embeddings and heads.
std::vector<Entry> base_entries(const NamedAdapter& adapter) {
  std::vector<Entry> entries;
  for (const PlacedAdapter& layer : adapter.layers) {
    if (writes_base(adapter.config, layer.path)) {
      const std::string base = kPrefix + layer.path + ".base_layer.";
      entries.push_back({base + "weight", layer.linear != nullptr ? &layer.linear->weight
                                                                  : &layer.embedding->weight});
      if (layer.linear != nullptr && layer.linear->bias.defined()) {
        entries.push_back({base + "bias", &layer.linear->bias});
      }
    }
  }
  return entries;
}

// What the file should hold, under the key that it is there by; files of other generations have
// other prefixes.
std::vector<Entry> entries_of(Model& model, const NamedAdapter& adapter,
                              const SafetensorsFile& file) {
  std::vector<Entry> entries;
  std::set<std::string> keys;
  for (const NamedParameter& entry : adapter_parameters(model)) {
    entries.push_back({entry.path, entry.parameter});
    keys.insert(entry.path);
  }
  for (Entry entry : base_entries(adapter)) {
    entry.optional = true;
    if (keys.insert(entry.key).second) {
      entries.push_back(entry);
    }
  }
  for (Entry& entry : entries) {
    if (file.find(entry.key) != nullptr) {
      continue;
    }
    for (const FileKey& other : model.file_keys(entry.key.substr(kPrefix.size()))) {
      if (file.find(kPrefix + other.key) != nullptr) {
        entry.key = kPrefix + other.key;
        break;
      }
    }
  }
  return entries;
}

// The model as it was before an adapter was tried on it.
class AdapterState {
 public:
  explicit AdapterState(Model& model) : model_(model), active_(model.adapters().active()) {
    for (Parameter* parameter : model.parameters()) {
      trainable_.emplace_back(parameter, parameter->trainable());
    }
  }
  void restore(const std::string& added) const {
    model_.adapters().remove(*model_.adapters().find(added));
    if (active_ != nullptr) {
      model_.adapters().activate(*active_);
    }
    for (const auto& [parameter, on] : trainable_) {
      parameter->set_trainable(on);
    }
  }

 private:
  Model& model_;
  NamedAdapter* active_;
  std::vector<std::pair<Parameter*, bool>> trainable_;
};

// Everything that does not fit, at once.
absl::Status check_entries(const std::string& path, const SafetensorsFile& file,
                           const std::vector<Entry>& entries) {
  std::vector<std::string> missing, unexpected, shapes;
  std::set<std::string_view> known;
  for (const Entry& entry : entries) {
    known.insert(entry.key);
    const StoredTensor* const stored = file.find(entry.key);
    if (stored == nullptr) {
      if (!entry.optional) {
        missing.push_back(entry.key);
      }
      continue;
    }
    const Shape& expected = entry.parameter->shape();
    const bool same = std::ranges::equal(stored->shape, expected.sizes(), [](auto a, auto b) {
      return a == static_cast<std::uint64_t>(b);
    });
    if (!same) {
      shapes.push_back(fmt::format("{} must have shape {}, got [{}]", entry.key,
                                   to_string(expected), fmt::join(stored->shape, ", ")));
    }
  }
  for (const StoredTensor& tensor : file.tensors()) {
    if (!known.contains(tensor.name)) {
      unexpected.push_back(tensor.name);
    }
  }
  std::vector<std::string> problems;
  if (!shapes.empty()) {
    problems.push_back(
        fmt::format("the adapter is for another base or rank: {}", fmt::join(shapes, "; ")));
  }
  if (!missing.empty() || !unexpected.empty()) {
    problems.push_back(fmt::format("missing: [{}]; without a place: [{}]", fmt::join(missing, ", "),
                                   fmt::join(unexpected, ", ")));
  }
  return problems.empty()
             ? absl::OkStatus()
             : absl::InvalidArgumentError(fmt::format("{}: {}", path, fmt::join(problems, "; ")));
}

}  // namespace

std::string to_json(const LoraConfig& config, Model& model) {
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
  // PEFT has one flag for all: Conv1D stores [in, out], and no model mixes the two.
  for (const NamedModule& entry : model.named_modules()) {
    const auto* const linear = dynamic_cast<const Linear*>(entry.module);
    if (linear != nullptr && linear->in_out()) {
      json["fan_in_fan_out"] = true;
    }
  }
  if (config.weight_decomposed) {
    json["use_dora"] = true;
  }
  if (config.b_bias) {
    json["lora_bias"] = true;
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
  nlohmann::ordered_json document = json;  // sorted but for the patterns, whose order counts
  for (const auto& [key, value] : config.ranks) {
    document["rank_pattern"][key] = value;
  }
  for (const auto& [key, value] : config.alphas) {
    if (value == std::floor(value)) {
      document["alpha_pattern"][key] = static_cast<std::int64_t>(value);
    } else {
      document["alpha_pattern"][key] = value;
    }
  }
  return document.dump(2) + "\n";
}

absl::StatusOr<LoraConfig> read_lora_config(const std::string& folder) {
  const std::string path = inside(folder, kConfig);
  std::string text;
  if (const absl::Status status = read_file(path, text); !status.ok()) {
    return status;
  }
  absl::StatusOr<JsonReader> json = JsonReader::parse(text, path);
  if (!json.ok()) {
    return json.status();
  }
  LoraConfig config = read_config(*json, nlohmann::ordered_json::parse(text));
  if (!json->status().ok()) {
    return json->status();
  }
  return config;
}

absl::Status save_adapter(Model& model, const std::string& folder) {
  const NamedAdapter* const active = model.adapters().active();
  if (active == nullptr) {
    return absl::FailedPreconditionError(folder + ": the model has no active adapter to save");
  }
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return absl::ErrnoToStatus(error.value(), folder);
  }
  std::vector<NamedTensor> tensors;
  std::set<std::string> keys;
  for (const NamedParameter& entry : adapter_parameters(model)) {
    tensors.push_back({entry.path, entry.parameter->value()});
    keys.insert(entry.path);
  }
  for (const Entry& entry : base_entries(*active)) {
    if (!keys.contains(entry.key)) {
      tensors.push_back({entry.key, entry.parameter->value()});
    }
  }
  const absl::Status status = write_safetensors(inside(folder, kWeights), tensors);
  return status.ok() ? replace_file(inside(folder, kConfig), to_json(active->config, model))
                     : status;
}

absl::StatusOr<LoraConfig> load_adapter(Model& model, const std::string& folder,
                                        const std::string& name, bool widen) {
  absl::StatusOr<LoraConfig> config = read_lora_config(folder);
  if (!config.ok()) {
    return config;
  }
  config->widen = widen;
  const std::string path = inside(folder, kWeights);
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::open(path);
  if (!file.ok()) {
    return file.status();
  }
  const AdapterState before(model);
  try {
    add_adapter(model, *config, nullptr, name);
  } catch (const Error& mistake) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {}", inside(folder, kConfig), mistake.what()));
  }
  const std::vector<Entry> entries = entries_of(model, *model.adapters().active(), *file);
  absl::Status status = check_entries(path, *file, entries);
  for (const Entry& entry : entries) {
    if (status.ok() && file->find(entry.key) != nullptr) {
      status = file->read_into(entry.key, entry.parameter->write());
    }
  }
  if (!status.ok()) {
    before.restore(name);
    return status;
  }
  return config;
}

}  // namespace reprise::nn

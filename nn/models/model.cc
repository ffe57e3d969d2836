#include "nn/models/model.h"

#include <fmt/format.h>

#include "nn/adapters/set.h"
#include "nn/models/gpt2.h"
#include "nn/models/llama.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

struct Kind {
  std::string_view type, architecture;
  std::unique_ptr<Model> (*build)(JsonReader&, Place);
};

std::unique_ptr<Model> build_gpt2(JsonReader& json, Place place) {
  const Gpt2Config config = read_gpt2_config(json);
  return json.status().ok() ? std::make_unique<Gpt2>(config, place) : nullptr;
}
template <bool qwen>
std::unique_ptr<Model> build_llama(JsonReader& json, Place place) {
  const LlamaConfig config = read_llama_config(json, qwen ? "qwen2" : "llama");
  return json.status().ok() ? std::make_unique<Llama>(config, place) : nullptr;
}

constexpr Kind kKinds[] = {
    {"gpt2", "GPT2LMHeadModel", build_gpt2},
    {"llama", "LlamaForCausalLM", build_llama<false>},
    {"qwen2", "Qwen2ForCausalLM", build_llama<true>},
};

// The row of the config's model_type, or of its architecture when it has none.
const Kind* find_kind(JsonReader& config) {
  if (!config.has("model_type") && !config.has("architectures")) {
    config.refuse("model_type", "is missing");
    return nullptr;
  }
  const bool by_type = config.has("model_type");
  const std::vector<std::string> architectures =
      by_type ? std::vector<std::string>{} : config.strings("architectures");
  const std::string wanted = by_type                 ? config.string("model_type")
                             : architectures.empty() ? ""
                                                     : architectures.front();
  for (const Kind& kind : kKinds) {
    if ((by_type ? kind.type : kind.architecture) == wanted) {
      return &kind;
    }
  }
  if (config.status().ok()) {
    config.refuse(
        by_type ? "model_type" : "architectures",
        fmt::format("must be one of {}, got \"{}\"", fmt::join(supported_models(), ", "), wanted));
  }
  return nullptr;
}

}  // namespace

Model::Model() : adapters_(std::make_unique<AdapterSet>()) {}
Model::~Model() = default;

void Model::clear_adapters() {
  adapters_ = std::make_unique<AdapterSet>();
}

std::vector<std::string> Model::other_keys(const std::string& path) const {
  const std::string_view prefix = trunk_prefix();
  return !prefix.empty() && path.starts_with(prefix)
             ? std::vector<std::string>{path.substr(prefix.size())}
             : std::vector<std::string>{};
}

std::vector<std::string> supported_models() {
  std::vector<std::string> names;
  for (const Kind& kind : kKinds) {
    names.emplace_back(kind.type);
  }
  return names;
}

absl::StatusOr<std::unique_ptr<Model>> build_model(JsonReader& config, Place place) {
  const Kind* kind = find_kind(config);
  JsonReader text = config;
  if (config.has("text_config")) {
    // Re-saved multimodal files keep the decoder's keys one level down, with a type of their own.
    text = config.object("text_config");
  }
  std::unique_ptr<Model> model = kind != nullptr ? kind->build(text, place) : nullptr;
  if (!config.status().ok()) {
    return config.status();
  }
  model->set_source(config.text());
  return model;
}

}  // namespace reprise::nn

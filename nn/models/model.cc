#include "nn/models/model.h"

#include <algorithm>

#include <fmt/format.h>

#include "nn/adapters/set.h"
#include "nn/models/clip.h"
#include "nn/models/glm.h"
#include "nn/models/gpt2.h"
#include "nn/models/internlm2.h"
#include "nn/models/llama.h"
#include "nn/models/qwen.h"
#include "nn/models/qwen2_vl.h"
#include "nn/models/xcomposer2.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

using Build = std::unique_ptr<Model> (*)(JsonReader&, Place);

struct Kind : ModelKind {
  Build build;
  // Reads text_config and the other objects beside it itself.
  bool whole = false;
};

template <class M>
std::unique_ptr<Model> built(const JsonReader& json, const auto& config, Place place) {
  return json.status().ok() ? std::make_unique<M>(config, place) : nullptr;
}
std::unique_ptr<Model> build_gpt2(JsonReader& json, Place place) {
  return built<Gpt2>(json, read_gpt2_config(json), place);
}
std::unique_ptr<Model> build_llama(JsonReader& json, Place place) {
  return built<Llama>(json, read_llama_config(json, "llama"), place);
}
std::unique_ptr<Model> build_qwen2(JsonReader& json, Place place) {
  return built<Llama>(json, read_llama_config(json, "qwen2"), place);
}
std::unique_ptr<Model> build_qwen3(JsonReader& json, Place place) {
  return built<Llama>(json, read_llama_config(json, "qwen3"), place);
}
std::unique_ptr<Model> build_glm(JsonReader& json, Place place) {
  return built<Glm>(json, read_glm_config(json, "glm"), place);
}
std::unique_ptr<Model> build_glm4(JsonReader& json, Place place) {
  return built<Glm>(json, read_glm_config(json, "glm4"), place);
}
std::unique_ptr<Model> build_chatglm(JsonReader& json, Place place) {
  return built<Glm>(json, read_chatglm_config(json), place);
}
std::unique_ptr<Model> build_internlm2(JsonReader& json, Place place) {
  return built<InternLm2>(json, read_internlm2_config(json), place);
}
std::unique_ptr<Model> build_qwen(JsonReader& json, Place place) {
  return built<Qwen>(json, read_qwen_config(json), place);
}
std::unique_ptr<Model> build_qwen2_vl(JsonReader& json, Place place) {
  return built<Qwen2Vl>(json, read_qwen2_vl_config(json), place);
}
std::unique_ptr<Model> build_clip(JsonReader& json, Place place) {
  return built<Clip>(json, read_clip_config(json), place);
}
std::unique_ptr<Model> build_clip_vision(JsonReader& json, Place place) {
  return built<ClipVision>(
      json,
      read_clip_vision_config(json.has("vision_config") ? json.object("vision_config") : json),
      place);
}
std::unique_ptr<Model> build_xcomposer2(JsonReader& json, Place place) {
  return built<XComposer2>(json, read_xcomposer2_config(json), place);
}

constexpr Kind kKinds[] = {
    {{"gpt2", "GPT2LMHeadModel"}, build_gpt2},
    {{"llama", "LlamaForCausalLM"}, build_llama},
    {{"internlm2", "InternLM2ForCausalLM"}, build_internlm2},
    {{"qwen", "QWenLMHeadModel"}, build_qwen},
    {{"qwen2", "Qwen2ForCausalLM"}, build_qwen2},
    {{"qwen3", "Qwen3ForCausalLM"}, build_qwen3},
    {{"glm", "GlmForCausalLM"}, build_glm},
    {{"glm4", "Glm4ForCausalLM"}, build_glm4},
    {{"chatglm", "ChatGLMModel"}, build_chatglm},
    {{"qwen2_vl", "Qwen2VLForConditionalGeneration"}, build_qwen2_vl, /*whole=*/true},
    {{"clip", "CLIPModel"}, build_clip, /*whole=*/true},
    {{"clip_vision_model", "CLIPVisionModel"}, build_clip_vision, /*whole=*/true},
    {{"internlmxcomposer2", "InternLMXComposer2ForCausalLM"}, build_xcomposer2, /*whole=*/true},
};

// The class that the publisher's own code is loaded as: "InternLM2ForCausalLM" in
// {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}.
std::string class_in_auto_map(JsonReader& config) {
  JsonReader map = config.object("auto_map");
  for (const std::string_view key : {"AutoModelForCausalLM", "AutoModel"}) {
    if (map.has(key)) {
      const std::string path = map.string(key);
      return path.substr(path.rfind('.') + 1);
    }
  }
  return "";
}

// The names that say what a config is of, the most telling first.
std::vector<std::string> names_of_kind(JsonReader& config) {
  const std::string type = config.string("model_type", "");
  const bool family = type.starts_with("internlm");
  std::vector<std::string> names;
  if (family) {
    // Its models bear each other's types: only the class tells them apart, and a file of
    // XComposer2-4KHD has that of the bare decoder among its architectures.
    names.push_back(class_in_auto_map(config));
  }
  if ((family || type.empty()) && config.has("architectures")) {
    const std::vector<std::string> architectures = config.strings("architectures");
    names.push_back(architectures.empty() ? "" : architectures.front());
  }
  names.push_back(type);
  std::erase(names, "");
  std::ranges::stable_partition(names, [](const std::string& name) {
    return name.find("XComposer") != name.npos || name.find("xcomposer") != name.npos;
  });
  return names;
}

// The row of the config's model_type; of its class where that says more, or where there is no type.
const Kind* find_kind(JsonReader& config) {
  if (!config.has("model_type") && !config.has("architectures")) {
    config.refuse("model_type", "is missing");
    return nullptr;
  }
  const std::vector<std::string> names = names_of_kind(config);
  for (const std::string& name : names) {
    for (const Kind& kind : kKinds) {
      if (kind.type == name || kind.architecture == name) {
        return &kind;
      }
    }
  }
  if (config.status().ok()) {
    config.refuse(config.has("model_type") ? "model_type" : "architectures",
                  fmt::format("must be one of {}, got \"{}\"", fmt::join(supported_models(), ", "),
                              fmt::join(names, "\", \"")));
  }
  return nullptr;
}

}  // namespace

Model::Model() : adapters_(std::make_unique<AdapterSet>()) {}
Model::~Model() = default;

void Model::clear_adapters() {
  adapters_ = std::make_unique<AdapterSet>();
}

std::vector<FileKey> Model::file_keys(const std::string& path) const {
  const std::string_view prefix = trunk_prefix();
  if (prefix.empty() || !path.starts_with(prefix)) {
    return {{path}};
  }
  return {{path}, {path.substr(prefix.size())}};
}

std::vector<ModelKind> model_kinds() {
  return {std::begin(kKinds), std::end(kKinds)};
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
  if (config.has("text_config") && kind != nullptr && !kind->whole) {
    // Re-saved multimodal files keep the decoder's keys one level down, with a type of their own.
    text = config.object("text_config");
  }
  std::unique_ptr<Model> model = kind != nullptr ? kind->build(text, place) : nullptr;
  if (!config.status().ok()) {
    return config.status();
  }
  // One that was read from a format of its own is written as what it has become.
  if (model->type() == kind->type) {
    model->set_source(config.text());
  }
  return model;
}

}  // namespace reprise::nn

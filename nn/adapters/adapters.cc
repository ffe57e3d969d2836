#include <memory>
#include <utility>

#include "core/error.h"
#include "nn/adapters/add.h"
#include "nn/adapters/select.h"
#include "nn/adapters/set.h"
#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/lora.h"
#include "nn/models/language_model.h"

namespace reprise::nn {
namespace {

NamedAdapter& named(Model& model, const std::string& name) {
  NamedAdapter* const adapter = model.adapters().find(name);
  if (adapter == nullptr) {
    fail("lora", "the model has no adapter \"{}\"", name);
  }
  return *adapter;
}

void refuse_merged(Model& model) {
  const NamedAdapter* const active = model.adapters().active();
  if (active != nullptr && active->merged) {
    fail("lora", "adapter \"{}\" is merged: unmerge it first", active->name);
  }
}

PlacedAdapter placed(const NamedModule& target, const LoraConfig& config) {
  LoraShape shape{.rank = rank_at(config, target.path),
                  .scale = scale_at(config, target.path),
                  .weight_decomposed = config.weight_decomposed};
  PlacedAdapter result{.path = target.path};
  result.linear = dynamic_cast<Linear*>(target.module);
  result.embedding = dynamic_cast<Embedding*>(target.module);
  const Parameter& weight =
      result.linear != nullptr ? result.linear->weight : result.embedding->weight;
  const Place place{weight.value().device(), config.widen ? DType::f32 : weight.dtype()};
  if (result.linear != nullptr) {
    shape.in = result.linear->in();
    shape.out = result.linear->out();
    shape.dropout = config.dropout;
    shape.b_bias = config.b_bias;
    result.lora = std::make_unique<Lora>(shape, place);
  } else {
    shape.in = weight.shape()[0];
    shape.out = weight.shape()[1];
    result.lora = std::make_unique<LoraEmbedding>(shape, place);
  }
  return result;
}

// The parameters of the model that are trained as copies.
std::vector<OwnValue> own_values(Model& model, const LoraConfig& config,
                                 const std::vector<PlacedAdapter>& layers) {
  std::vector<OwnValue> values;
  const auto is_target = [&](const std::string& path) {
    for (const PlacedAdapter& layer : layers) {
      if (layer.path == path) {
        return true;
      }
    }
    return false;
  };
  for (const NamedParameter& entry : model.named_parameters()) {
    const std::string layer = entry.path.substr(0, entry.path.rfind('.'));
    std::string key;
    if (below_saved(config, layer)) {
      key = entry.path;
    } else if (config.bias != "none" && entry.path.ends_with(".bias")) {
      if (is_target(layer)) {
        key = layer + ".base_layer.bias";
      } else if (config.bias == "all") {
        key = entry.path;
      }
    }
    if (!key.empty()) {
      values.push_back({entry.path, key, entry.parameter, {}});
    }
  }
  return values;
}

}  // namespace

std::vector<std::string> lora_targets(Model& model, const LoraConfig& config) {
  std::vector<std::string> paths;
  for (const NamedModule& entry : select_targets(model, config)) {
    paths.push_back(entry.path);
  }
  return paths;
}

void add_adapter(Model& model, const LoraConfig& config, Generator* generator,
                 const std::string& name) {
  AdapterSet& set = model.adapters();
  if (name.empty() || set.find(name) != nullptr) {
    fail("lora", "the model has an adapter \"{}\" already", name);
  }
  refuse_merged(model);
  // Its names are those of the model alone.
  NamedAdapter* const before = set.active();
  set.deactivate();
  auto adapter = std::make_unique<NamedAdapter>();
  try {
    check_saved(model, config);
    adapter->name = name;
    adapter->config = config;
    if (generator != nullptr && dynamic_cast<LanguageModel*>(&model) == nullptr &&
        config.task == LoraConfig().task) {
      adapter->config.task.reset();  // PEFT would look for what generates text
    }
    for (const NamedModule& target : select_targets(model, config, generator == nullptr)) {
      adapter->layers.push_back(placed(target, config));
    }
    adapter->values = own_values(model, config, adapter->layers);
  } catch (...) {
    if (before != nullptr) {
      set.activate(*before);
    }
    throw;
  }
  for (PlacedAdapter& layer : adapter->layers) {
    if (generator == nullptr) {
      break;  // the values come from a file
    }
    layer.lora->initialize(config.init, *generator);
    const bool linear = layer.linear != nullptr;
    layer.lora->initialize_magnitude(
        linear ? layer.linear->weight.value() : layer.embedding->weight.value(),
        !linear || layer.linear->in_out());
  }
  for (OwnValue& own : adapter->values) {
    own.other = own.parameter->value().clone(MemoryKind::parameters);
  }
  model.freeze();
  set.activate(set.add(std::move(adapter)));
  model.name_parameters();
}

void add_lora(Model& model, const LoraConfig& config, Generator& generator,
              const std::string& name) {
  add_adapter(model, config, &generator, name);
}

std::vector<std::string> adapter_names(Model& model) {
  std::vector<std::string> names;
  for (const auto& adapter : model.adapters().all()) {
    names.push_back(adapter->name);
  }
  return names;
}

std::string active_adapter(Model& model) {
  const NamedAdapter* const active = model.adapters().active();
  return active != nullptr ? active->name : "";
}

void activate_adapter(Model& model, const std::string& name) {
  NamedAdapter& adapter = named(model, name);
  refuse_merged(model);
  model.adapters().activate(adapter);
}

void deactivate_adapters(Model& model) {
  refuse_merged(model);
  model.adapters().deactivate();
}

void remove_adapter(Model& model, const std::string& name) {
  NamedAdapter& adapter = named(model, name);
  refuse_merged(model);
  model.adapters().remove(adapter);
}

std::vector<NamedParameter> adapter_parameters(Model& model) {
  std::vector<NamedParameter> result;
  const NamedAdapter* const active = model.adapters().active();
  if (active == nullptr) {
    return result;
  }
  const std::string prefix = "base_model.model.";
  for (const PlacedAdapter& layer : active->layers) {
    for (const NamedParameter& entry : layer.lora->named_parameters()) {
      result.push_back({prefix + layer.path + "." + entry.path, entry.parameter, true});
    }
  }
  for (const OwnValue& own : active->values) {
    result.push_back({prefix + own.key, own.parameter, false});
  }
  return result;
}

}  // namespace reprise::nn

#include "nn/lora.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <regex>

#include <fmt/format.h>

#include "autograd/dropout.h"
#include "autograd/elementwise.h"
#include "autograd/matmul.h"
#include "core/parallel.h"
#include "nn/embedding.h"
#include "nn/initialize.h"
#include "nn/linear.h"

namespace reprise::nn {
namespace {

std::regex compile(const std::string& pattern, std::string_view argument) {
  try {
    return std::regex(pattern, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    fail("lora", "{} holds \"{}\", which is not a regular expression", argument, pattern);
  }
}

bool ends_path(std::string_view path, std::string_view name) {
  return path == name || (path.ends_with(name) && path[path.size() - name.size() - 1] == '.');
}

bool matches(const ModulePattern& pattern, const std::string& path, std::string_view argument) {
  return std::any_of(pattern.names.begin(), pattern.names.end(),
                     [&](const std::string& name) { return ends_path(path, name); }) ||
         (!pattern.regex.empty() && std::regex_match(path, compile(pattern.regex, argument)));
}

// Whether the path lies in one of the wanted blocks. A regex for targets is not filtered.
bool in_layers(const LoraConfig& config, const std::string& path) {
  if (config.layers.empty() || !config.targets.regex.empty()) {
    return true;
  }
  std::vector<std::string> lists = config.layer_lists;
  if (lists.empty()) {
    lists = {"[^.]*"};
  }
  for (const std::string& list : lists) {
    std::smatch match;
    const std::regex pattern = compile(".*\\." + list + "\\.(\\d+)\\..*", "layers_pattern");
    if (std::regex_match(path, match, pattern)) {
      return std::find(config.layers.begin(), config.layers.end(), std::stoll(match[1])) !=
             config.layers.end();
    }
  }
  return false;
}

// The value of the first pattern that matches the end of the path.
template <class T>
T chosen(const std::vector<std::pair<std::string, T>>& patterns, const std::string& path,
         T otherwise, std::string_view argument) {
  for (const auto& [pattern, value] : patterns) {
    if (std::regex_match(path, compile("(.*\\.)?(" + pattern + ")", argument))) {
      return value;
    }
  }
  return otherwise;
}

bool is_saved(const LoraConfig& config, std::string_view path) {
  return std::any_of(config.modules_to_save.begin(), config.modules_to_save.end(),
                     [&](const std::string& name) { return path.ends_with(name); });
}

// Whether the path is that of a saved module or below one.
bool below_saved(const LoraConfig& config, std::string_view path) {
  for (std::size_t dot = path.find('.'); dot != std::string_view::npos;
       dot = path.find('.', dot + 1)) {
    if (is_saved(config, path.substr(0, dot))) {
      return true;
    }
  }
  return is_saved(config, path);
}

ModulePattern targets_of(const Model& model, const LoraConfig& config) {
  if (!config.targets.empty() || config.all_linear) {
    return config.targets;
  }
  return model.type() == "gpt2" ? ModulePattern{{"c_attn"}, ""}
                                : ModulePattern{{"q_proj", "v_proj"}, ""};
}

bool is_target(Model& model, const LoraConfig& config, const ModulePattern& targets,
               const NamedModule& entry) {
  const bool any = config.all_linear && dynamic_cast<Linear*>(entry.module) != nullptr &&
                   entry.module != model.head();
  return (any || matches(targets, entry.path, "target_modules")) && in_layers(config, entry.path) &&
         !matches(config.exclude, entry.path, "exclude_modules") &&
         !below_saved(config, entry.path);
}

void check(const LoraConfig& config) {
  if (config.rank < 1) {
    fail("lora", "rank must be at least 1, got {}", config.rank);
  }
  if (!(config.dropout >= 0 && config.dropout < 1)) {
    fail("lora", "dropout must be from 0 to below 1, got {}", config.dropout);
  }
  if (config.bias != "none" && config.bias != "all" && config.bias != "lora_only") {
    fail("lora", "bias must be none, all or lora_only, got \"{}\"", config.bias);
  }
}

// A tied head is the embedding table: training one of the two apart would untie them.
void refuse_tied(Model& model, const std::string& module, const std::string& argument) {
  const bool table = !module.empty() && model.head() == nullptr &&
                     (module == "lm_head" || module == "embed_tokens" || module == "wte");
  if (table) {
    fail("lora", "{} names {}, but the head of this model is tied to its embedding table", argument,
         module);
  }
}

std::unique_ptr<Lora> adapter_for(const Linear& layer, const std::string& path,
                                  const LoraConfig& config) {
  const std::int64_t rank = chosen(config.ranks, path, config.rank, "rank_pattern");
  const double alpha = chosen(config.alphas, path, config.alpha, "alpha_pattern");
  if (rank < 1) {
    fail("lora", "rank_pattern gives {} the rank {}, 1 is the least", path, rank);
  }
  const auto r = static_cast<double>(rank);
  return std::make_unique<Lora>(layer.in(), layer.out(), rank,
                                alpha / (config.rank_stabilized ? std::sqrt(r) : r), config.dropout,
                                Place{layer.weight.value().device(), layer.weight.dtype()});
}

// weight += s B A, an element of the product in double, one rounding.
template <class T>
void add_product(const Lora& adapter, bool in_out, const Tensor& weight) {
  const std::vector<T> a = adapter.a.value().to_vector<T>(), b = adapter.b.value().to_vector<T>();
  const auto widened = [](T x) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      return static_cast<double>(to_float(x));
    } else {
      return static_cast<double>(x);
    }
  };
  const auto in = static_cast<std::size_t>(adapter.a.shape()[1]);
  const auto out = static_cast<std::size_t>(adapter.b.shape()[0]);
  const auto rank = static_cast<std::size_t>(adapter.rank());
  const Tensor host = weight.to(cpu).contiguous();
  T* const w = host.data<T>();
  parallel_for(static_cast<std::int64_t>(out), 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> row(in);
    for (auto o = static_cast<std::size_t>(begin); o < static_cast<std::size_t>(end); ++o) {
      std::fill(row.begin(), row.end(), 0.0);
      for (std::size_t r = 0; r < rank; ++r) {
        const double factor = adapter.scale() * widened(b[o * rank + r]);
        for (std::size_t i = 0; i < in; ++i) {
          row[i] += factor * widened(a[r * in + i]);
        }
      }
      for (std::size_t i = 0; i < in; ++i) {
        T& at = w[in_out ? i * out + o : o * in + i];
        const double sum = widened(at) + row[i];
        if constexpr (std::is_same_v<T, bfloat16>) {
          at = to_bfloat16(static_cast<float>(sum));
        } else {
          at = static_cast<T>(sum);
        }
      }
    }
  });
  if (!host.shares_storage(weight)) {
    weight.copy_from(host);
  }
}

void add_product(const Lora& adapter, bool in_out, const Tensor& weight) {
  if (weight.dtype() == DType::bf16) {
    add_product<bfloat16>(adapter, in_out, weight);
  } else {
    add_product<float>(adapter, in_out, weight);
  }
}

}  // namespace

Lora::Lora(std::int64_t in, std::int64_t out, std::int64_t rank, double scale, double dropout,
           Place place)
    : a("lora_A.weight", parameter_tensor(Shape{rank, in}, place)),
      b("lora_B.weight", parameter_tensor(Shape{out, rank}, place)),
      scale_(scale),
      dropout_(dropout) {
  add("lora_A.weight", a);
  add("lora_B.weight", b);
}

void Lora::initialize(LoraInit init, Generator& generator) {
  const auto bound = [](const Parameter& weight) {
    return 1 / std::sqrt(static_cast<double>(weight.shape()[1]));
  };
  if (init == LoraInit::gaussian) {
    fill_normal(a.write(), 1 / static_cast<double>(rank()), generator);
  } else {
    fill_uniform(a.write(), -bound(a), bound(a), generator);
  }
  if (init == LoraInit::random) {
    fill_uniform(b.write(), -bound(b), bound(b), generator);
  } else {
    b.write().zero();
  }
}

Variable Lora::operator()(Variable y, Variable x) const {
  if (generator() != nullptr && dropout_ > 0) {
    x = dropout(std::move(x), dropout_, *generator());
  }
  Variable u = linear(std::move(x), a, {});  // [.., R]
  if (scale_ != 1) {
    u = reprise::scale(std::move(u), scale_);
  }
  return reprise::add(std::move(y), linear(std::move(u), b, {}));  // [.., out]
}

std::vector<std::string> lora_targets(Model& model, const LoraConfig& config) {
  const ModulePattern targets = targets_of(model, config);
  std::vector<std::string> paths;
  for (const NamedModule& entry : model.named_modules()) {
    if (!is_target(model, config, targets, entry)) {
      continue;
    }
    if (dynamic_cast<Linear*>(entry.module) == nullptr) {
      fail("lora", "target_modules matches {}, which is not a Linear", entry.path);
    }
    paths.push_back(entry.path);
  }
  if (paths.empty()) {
    fail("lora", "no module of this {} matches target_modules [{}]{}", model.type(),
         fmt::join(targets.names, ", "),
         targets.regex.empty() ? "" : fmt::format(" or \"{}\"", targets.regex));
  }
  return paths;
}

void add_lora(Model& model, const LoraConfig& config, Generator& generator) {
  check(config);
  for (const std::string& name : config.targets.names) {
    refuse_tied(model, name, "target_modules");
  }
  for (const std::string& name : config.modules_to_save) {
    refuse_tied(model, name, "modules_to_save");
    const auto modules = model.named_modules();
    if (std::none_of(modules.begin(), modules.end(),
                     [&](const NamedModule& entry) { return entry.path.ends_with(name); })) {
      fail("lora", "modules_to_save names {}, which this {} does not have", name, model.type());
    }
  }
  const std::vector<std::string> paths = lora_targets(model, config);
  std::vector<std::pair<Linear*, std::unique_ptr<Lora>>> adapters;
  for (const std::string& path : paths) {
    auto& layer = static_cast<Linear&>(*model.find_module(path));
    if (layer.lora() != nullptr) {
      fail("lora", "{} has an adapter already", path);
    }
    adapters.emplace_back(&layer, adapter_for(layer, path, config));
  }
  model.freeze();
  for (auto& [layer, adapter] : adapters) {
    adapter->initialize(config.init, generator);
    layer->set_lora(std::move(adapter));
  }
  model.name_parameters();
  for (const NamedParameter& entry : adapter_parameters(model, config)) {
    entry.parameter->set_trainable(true);
  }
}

std::vector<NamedParameter> adapter_parameters(Model& model, const LoraConfig& config) {
  const std::string prefix = "base_model.model.";
  std::vector<NamedParameter> result;
  const auto is_targeted = [&](const std::string& layer) {
    const auto* const linear = dynamic_cast<Linear*>(model.find_module(layer));
    return linear != nullptr && linear->lora() != nullptr;
  };
  for (const NamedParameter& entry : model.named_parameters()) {
    const std::string layer = entry.path.substr(0, entry.path.rfind('.'));
    if (entry.adapter || below_saved(config, layer)) {
      result.push_back({prefix + entry.path, entry.parameter, entry.adapter});
    } else if (entry.path.ends_with(".bias") && config.bias != "none") {
      const bool targeted = is_targeted(layer);
      if (targeted) {
        result.push_back({prefix + layer + ".base_layer.bias", entry.parameter, false});
      } else if (config.bias == "all") {
        result.push_back({prefix + entry.path, entry.parameter, false});
      }
    }
  }
  return result;
}

void merge_lora(Model& model) {
  for (const NamedModule& entry : model.named_modules()) {
    auto* const layer = dynamic_cast<Linear*>(entry.module);
    if (layer == nullptr || layer->lora() == nullptr) {
      continue;
    }
    const std::unique_ptr<Lora> adapter = layer->take_lora();
    const Tensor weight = layer->weight.write();
    if (!weight.is_meta()) {
      add_product(*adapter, layer->in_out(), weight);
    }
  }
}

}  // namespace reprise::nn

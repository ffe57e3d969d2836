#include "nn/adapters/select.h"

#include <algorithm>
#include <cmath>
#include <regex>

#include <fmt/format.h>

#include "core/error.h"
#include "core/nearest.h"
#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/language_model.h"

namespace reprise::nn {
namespace {

std::regex compile(const std::string& pattern, std::string_view argument) {
  try {
    return std::regex(pattern, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    fail("lora", "{} holds \"{}\", which is not a regular expression", argument, pattern);
  }
}

// A ModulePattern whose regex is compiled once.
class Matcher {
 public:
  Matcher(const ModulePattern& pattern, std::string_view argument) : pattern_(pattern) {
    if (!pattern.regex.empty()) {
      regex_ = compile(pattern.regex, argument);
    }
  }
  bool operator()(const std::string& path) const {
    return std::ranges::any_of(pattern_.names,
                               [&](const std::string& name) { return ends_path(path, name); }) ||
           (!pattern_.regex.empty() && std::regex_match(path, regex_));
  }

 private:
  const ModulePattern& pattern_;
  std::regex regex_;
};

// Whether the path lies in one of the wanted blocks.
class LayerFilter {
 public:
  explicit LayerFilter(const LoraConfig& config) : config_(config) {
    if (config.layers.empty()) {
      return;
    }
    std::vector<std::string> lists = config.layer_lists;
    if (lists.empty()) {
      lists = {"[^.]*"};
    }
    for (const std::string& list : lists) {
      patterns_.push_back(compile(".*\\." + list + "\\.(\\d+)\\..*", "layers_pattern"));
    }
  }
  bool operator()(const std::string& path) const {
    for (const std::regex& pattern : patterns_) {
      std::smatch match;
      if (std::regex_match(path, match, pattern)) {
        return std::ranges::find(config_.layers, std::stoll(match[1])) != config_.layers.end();
      }
    }
    return patterns_.empty();
  }

 private:
  const LoraConfig& config_;
  std::vector<std::regex> patterns_;
};

bool pattern_matches(const std::string& pattern, const std::string& path,
                     std::string_view argument) {
  return std::regex_match(path, compile("(.*\\.)?(" + pattern + ")", argument));
}

// The value of the first pattern that matches the end of the path.
template <class T>
T chosen(const std::vector<std::pair<std::string, T>>& patterns, const std::string& path,
         T otherwise, std::string_view argument) {
  for (const auto& [pattern, value] : patterns) {
    if (pattern_matches(pattern, path, argument)) {
      return value;
    }
  }
  return otherwise;
}

template <class T>
void expect_hits(const std::vector<std::pair<std::string, T>>& patterns,
                 const std::vector<NamedModule>& targets, std::string_view argument) {
  for (const auto& [pattern, value] : patterns) {
    if (std::ranges::none_of(targets, [&](const NamedModule& entry) {
          return pattern_matches(pattern, entry.path, argument);
        })) {
      fail("lora", "{} names \"{}\", which matches none of the {} targets: {}{}", argument, pattern,
           targets.size(), targets.front().path, targets.size() > 1 ? ", ..." : "");
    }
  }
}

bool is_saved(const LoraConfig& config, std::string_view path) {
  return std::ranges::any_of(config.modules_to_save,
                             [&](const std::string& name) { return path.ends_with(name); });
}

ModulePattern targets_of(const Model& model, const LoraConfig& config) {
  if (!config.targets.empty() || config.all_linear) {
    return config.targets;
  }
  struct Usual {
    std::string_view type;
    std::vector<std::string> names;
  };
  const std::vector<Usual> table{{"gpt2", {"c_attn"}},
                                 {"llama", {"q_proj", "v_proj"}},
                                 {"qwen2", {"q_proj", "v_proj"}},
                                 {"qwen3", {"q_proj", "v_proj"}},
                                 {"chatglm", {"query_key_value"}}};
  for (const Usual& usual : table) {
    if (usual.type == model.type()) {
      return {usual.names, ""};
    }
  }
  fail("lora", "target_modules must be given for a {}", model.type());
}

void check(const LoraConfig& config) {
  if (config.rank < 1) {
    fail("lora", "rank must be at least 1, got {}", config.rank);
  }
  if (!(config.dropout >= 0 && config.dropout < 1)) {
    fail("lora", "dropout must be from 0 to below 1, got {}", config.dropout);
  }
  if (!std::isfinite(config.alpha)) {
    fail("lora", "alpha must be a number, got {}", config.alpha);
  }
  // A list of names is what PEFT filters by layers: it refuses such a file.
  if (!config.layers.empty() && (config.all_linear || !config.targets.regex.empty())) {
    fail("lora", "layers_to_transform must be absent with target_modules \"{}\", which is no list",
         config.all_linear ? "all-linear" : config.targets.regex);
  }
  if (config.b_bias && config.weight_decomposed) {
    fail("lora", "lora_bias cannot be on together with use_dora");
  }
  if (config.bias != "none" && config.bias != "all" && config.bias != "lora_only") {
    fail("lora", "bias must be none, all or lora_only, got \"{}\"", config.bias);
  }
}

std::string near_text(const std::string& name, const std::vector<NamedModule>& modules) {
  std::vector<std::string> ends;
  for (const NamedModule& entry : modules) {
    ends.push_back(entry.path.substr(entry.path.rfind('.') + 1));
  }
  const std::string near = nearest(name, ends);
  return near.empty() ? "" : fmt::format(": did you mean {}?", near);
}

// A tied head is the embedding table: there is no module of its own to put an adapter on, or to
// train apart from the table.
void refuse_tied(Model& model, const std::string& name, std::string_view argument, bool head_only) {
  if (dynamic_cast<LanguageModel*>(&model) == nullptr) {
    return;
  }
  const bool head = ends_path(name, "lm_head");
  const bool table = ends_path(name, "embed_tokens") || ends_path(name, "wte");
  if (model.head() == nullptr && (head || (table && !head_only))) {
    fail("lora", "{} names {}, but the head of this model is tied to its embedding table", argument,
         name);
  }
}

}  // namespace

bool ends_path(std::string_view path, std::string_view name) {
  return path == name || (path.ends_with(name) && path[path.size() - name.size() - 1] == '.');
}

bool below_saved(const LoraConfig& config, std::string_view path) {
  for (std::size_t dot = path.find('.'); dot != std::string_view::npos;
       dot = path.find('.', dot + 1)) {
    if (is_saved(config, path.substr(0, dot))) {
      return true;
    }
  }
  return is_saved(config, path);
}

void check_saved(Model& model, const LoraConfig& config) {
  const std::vector<NamedModule> modules = model.named_modules();
  for (const std::string& name : config.modules_to_save) {
    refuse_tied(model, name, "modules_to_save", /*head_only=*/false);
    if (std::ranges::none_of(
            modules, [&](const NamedModule& entry) { return entry.path.ends_with(name); })) {
      fail("lora", "modules_to_save names {}, which this {} does not have{}", name, model.type(),
           near_text(name, modules));
    }
  }
}

std::vector<NamedModule> select_targets(Model& model, const LoraConfig& config, bool lenient) {
  check(config);
  const ModulePattern pattern = targets_of(model, config);
  const Matcher wanted(pattern, "target_modules"), excluded(config.exclude, "exclude_modules");
  const LayerFilter in_layers(config);
  for (const std::string& name : pattern.names) {
    refuse_tied(model, name, "target_modules", /*head_only=*/true);
  }
  std::vector<NamedModule> targets;
  const std::vector<NamedModule> modules = model.named_modules();
  for (const NamedModule& entry : modules) {
    const bool linear = dynamic_cast<Linear*>(entry.module) != nullptr;
    const bool any = config.all_linear && linear && entry.module != model.head();
    if (!(any || wanted(entry.path)) || !in_layers(entry.path) || excluded(entry.path) ||
        below_saved(config, entry.path)) {
      continue;
    }
    if (!linear && dynamic_cast<Embedding*>(entry.module) == nullptr) {
      fail("lora", "target_modules matches {}, which is neither a Linear nor an Embedding",
           entry.path);
    }
    targets.push_back(entry);
  }
  for (const std::string& name : pattern.names) {
    const auto hit = [&](const NamedModule& entry) { return ends_path(entry.path, name); };
    if (!targets.empty() && !lenient && std::ranges::none_of(modules, hit)) {
      fail("lora", "target_modules names {}, which this {} does not have{}", name, model.type(),
           near_text(name, modules));
    }
  }
  if (targets.empty()) {
    fail("lora", "no module of this {} matches target_modules [{}]{}{}", model.type(),
         fmt::join(pattern.names, ", "),
         pattern.regex.empty() ? "" : fmt::format(" or \"{}\"", pattern.regex),
         pattern.names.size() == 1 ? near_text(pattern.names[0], modules) : "");
  }
  expect_hits(config.ranks, targets, "rank_pattern");
  expect_hits(config.alphas, targets, "alpha_pattern");
  for (const NamedModule& entry : targets) {
    if (config.b_bias && dynamic_cast<Linear*>(entry.module) == nullptr) {
      fail("lora", "lora_bias is for linear layers: {} is an embedding", entry.path);
    }
  }
  return targets;
}

std::int64_t rank_at(const LoraConfig& config, const std::string& path) {
  const std::int64_t rank = chosen(config.ranks, path, config.rank, "rank_pattern");
  if (rank < 1) {
    fail("lora", "rank_pattern gives {} the rank {}, 1 is the least", path, rank);
  }
  return rank;
}

double scale_at(const LoraConfig& config, const std::string& path) {
  const auto rank = static_cast<double>(rank_at(config, path));
  return chosen(config.alphas, path, config.alpha, "alpha_pattern") /
         (config.rank_stabilized ? std::sqrt(rank) : rank);
}

bool writes_base(const LoraConfig& config, const std::string& path) {
  const bool embedding = ends_path(path, "embed_tokens"), head = ends_path(path, "lm_head");
  if (!embedding && !head) {
    return false;
  }
  if (!config.targets.regex.empty()) {
    return true;
  }
  // Not for the path of one: so does PEFT.
  return std::ranges::any_of(config.targets.names, [](const std::string& name) {
    return name == "embed_tokens" || name == "lm_head";
  });
}

}  // namespace reprise::nn

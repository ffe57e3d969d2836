// Which modules of a model an adapter's config means.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "nn/adapters/config.h"
#include "nn/models/model.h"
#include "nn/module.h"

namespace reprise::nn {

// The layers that the config targets, each a Linear or an Embedding. Throws Error when nothing
// matches, something else does, or the config contradicts itself. Unless `lenient`, also for an
// entry of the list that matches no module; patterns of ranks and alphas have to match a target.
std::vector<NamedModule> select_targets(Model& model, const LoraConfig& config,
                                        bool lenient = false);

// Whether the path is that of a module in modules_to_save, or below one.
bool below_saved(const LoraConfig& config, std::string_view path);
// Errors for modules_to_save that the model does not have or cannot part.
void check_saved(Model& model, const LoraConfig& config);

// Rank and s of the adapter at this path.
std::int64_t rank_at(const LoraConfig& config, const std::string& path);
double scale_at(const LoraConfig& config, const std::string& path);

// Whether PEFT writes the base weight of this target beside its adapter: it does so for targeted
// "embed_tokens" and "lm_head".
bool writes_base(const LoraConfig& config, const std::string& path);

// Whether `path` is `name` or ends in it after a dot.
bool ends_path(std::string_view path, std::string_view name);

}  // namespace reprise::nn

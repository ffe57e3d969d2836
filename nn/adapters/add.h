// Adding an adapter whose values come from a generator or, without one, from a file.
#pragma once

#include <string>

#include "nn/adapters/config.h"
#include "nn/models/model.h"

namespace reprise::nn {

// As add_lora. Without a generator the adapter's own values are not set, and names in the list of
// targets that match nothing are passed over: the file says what there is.
void add_adapter(Model& model, const LoraConfig& config, Generator* generator,
                 const std::string& name);

}  // namespace reprise::nn

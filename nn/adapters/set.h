// The adapters of a model, by name. One is active at most: it alone is in the tree of parameters,
// and what it trains besides (modules_to_save, biases) has its values in their parameters.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nn/adapters/lora.h"
#include "nn/module.h"

namespace reprise::nn {

class Linear;
class Embedding;

// On one layer; `linear` or `embedding` is set.
struct PlacedAdapter {
  std::string path;
  Linear* linear = nullptr;
  Embedding* embedding = nullptr;
  std::unique_ptr<LoraBase> lora;
  std::vector<double> merged_factors;  // m / |W + s B A| as it was merged, for the way back
};

// A parameter of the model itself that the adapter has another value for.
struct OwnValue {
  std::string path;  // of the parameter
  std::string key;   // in the adapter's file, without its prefix
  Parameter* parameter = nullptr;
  Tensor other;  // the base's value while the adapter is active, else the adapter's
};

struct NamedAdapter {
  std::string name;
  LoraConfig config;
  std::vector<PlacedAdapter> layers;
  std::vector<OwnValue> values;
  bool merged = false;
};

class AdapterSet {
 public:
  // Null without one of that name.
  NamedAdapter* find(std::string_view name) const;
  // Null when none is active.
  NamedAdapter* active() const { return active_; }
  const std::vector<std::unique_ptr<NamedAdapter>>& all() const { return adapters_; }

  NamedAdapter& add(std::unique_ptr<NamedAdapter> adapter);
  void activate(NamedAdapter& adapter);
  void deactivate();
  void remove(NamedAdapter& adapter);
  // The model's own value of a parameter, whatever is active; the present one when it is merged.
  Tensor base_value(const Parameter& parameter) const;

 private:
  // Puts it into the layers and the parameters, or takes it out again.
  static void attach(NamedAdapter& adapter, bool on);

  std::vector<std::unique_ptr<NamedAdapter>> adapters_;
  NamedAdapter* active_ = nullptr;
};

}  // namespace reprise::nn

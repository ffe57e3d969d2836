#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <type_traits>
#include <utility>

#include <fmt/format.h>

#include "core/error.h"
#include "core/parallel.h"
#include "nn/adapters/set.h"
#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/lora.h"
#include "nn/models/language_model.h"

namespace reprise::nn {
namespace {

template <class T>
double widened(T x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<double>(to_float(x));
  } else {
    return static_cast<double>(x);
  }
}

template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

std::vector<double> doubles(const Parameter& parameter) {
  std::vector<double> result;
  if (!parameter.defined()) {
    return result;
  }
  if (parameter.dtype() == DType::bf16) {
    for (const bfloat16 x : parameter.value().to_vector<bfloat16>()) {
      result.push_back(widened(x));
    }
  } else {
    const std::vector<float> values = parameter.value().to_vector<float>();
    result.assign(values.begin(), values.end());
  }
  return result;
}

bool in_out(const PlacedAdapter& layer) {
  return layer.linear == nullptr || layer.linear->in_out();
}

Parameter& weight_of(const PlacedAdapter& layer) {
  return layer.linear != nullptr ? layer.linear->weight : layer.embedding->weight;
}

// Row o of the weight at a time: W = f (W + s B A) with f = m / |W + s B A| or 1, or the way back.
// Sums in double, one rounding. `factors` is written when merging, read when unmerging.
template <class T>
void merge_rows(const PlacedAdapter& layer, const Tensor& weight, bool back,
                std::vector<double>& factors) {
  const LoraBase& lora = *layer.lora;
  const std::vector<double> a = doubles(lora.a), b = doubles(lora.b), m = doubles(lora.magnitude);
  const auto in = static_cast<std::size_t>(lora.in()), out = static_cast<std::size_t>(lora.out());
  const auto rank = static_cast<std::size_t>(lora.rank());
  const bool transposed = in_out(layer);
  T* const w = weight.data<T>();
  if (!m.empty() && !back) {
    factors.assign(out, 1.0);
  }
  parallel_for(lora.out(), 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> row(in);
    for (auto o = static_cast<std::size_t>(begin); o < static_cast<std::size_t>(end); ++o) {
      std::fill(row.begin(), row.end(), 0.0);
      for (std::size_t r = 0; r < rank; ++r) {
        const double factor = lora.scale() * b[o * rank + r];
        for (std::size_t i = 0; i < in; ++i) {
          row[i] += factor * a[r * in + i];
        }
      }
      const auto at = [&](std::size_t i) -> T& { return w[transposed ? i * out + o : o * in + i]; };
      if (back) {
        const double f = m.empty() ? 1.0 : factors[o];
        for (std::size_t i = 0; i < in; ++i) {
          at(i) = rounded<T>(widened(at(i)) / f - row[i]);
        }
        continue;
      }
      double squares = 0;
      for (std::size_t i = 0; i < in; ++i) {
        row[i] += widened(at(i));
        squares += row[i] * row[i];
      }
      const double f = m.empty() ? 1.0 : m[o] / std::sqrt(squares);
      if (!m.empty()) {
        factors[o] = f;
      }
      for (std::size_t i = 0; i < in; ++i) {
        at(i) = rounded<T>(f * row[i]);
      }
    }
  });
}

void merge_into(const PlacedAdapter& layer, const Tensor& weight, bool back,
                std::vector<double>& factors) {
  if (weight.is_meta()) {
    return;
  }
  const Tensor host = weight.to(cpu);
  if (host.dtype() == DType::bf16) {
    merge_rows<bfloat16>(layer, host, back, factors);
  } else {
    merge_rows<float>(layer, host, back, factors);
  }
  if (!host.shares_storage(weight)) {
    weight.copy_from(host);
  }
}

NamedAdapter& active(Model& model) {
  NamedAdapter* const adapter = model.adapters().active();
  if (adapter == nullptr) {
    fail("lora", "the model has no active adapter");
  }
  return *adapter;
}

void check_mergeable(Model& model, NamedAdapter& adapter) {
  if (adapter.merged) {
    fail("lora", "adapter \"{}\" is merged already", adapter.name);
  }
  auto* const language = dynamic_cast<LanguageModel*>(&model);
  const bool tied = language != nullptr && language->head() == nullptr;
  for (PlacedAdapter& layer : adapter.layers) {
    if (tied && &weight_of(layer) == &language->embedding_table()) {
      fail("lora",
           "the adapter on {} cannot be merged: this table is the head too, which the adapter does "
           "not change",
           layer.path);
    }
    if (layer.lora->b_bias.defined() && !layer.linear->bias.defined()) {
      fail("lora", "the adapter on {} cannot be merged: it has a bias and the layer has none",
           layer.path);
    }
  }
}

// The bias of B into that of the layer, or out of it again.
template <class T>
void merge_bias_of(const LoraBase& lora, const Tensor& bias, bool back) {
  const std::vector<double> from = doubles(lora.b_bias);
  for (std::size_t o = 0; o < from.size(); ++o) {
    T& to = bias.data<T>()[o];
    to = rounded<T>(widened(to) + (back ? -1 : 1) * lora.scale() * from[o]);
  }
}

void merge_bias(const PlacedAdapter& layer, const Tensor& bias, bool back) {
  if (bias.is_meta()) {
    return;
  }
  const Tensor host = bias.to(cpu);
  if (host.dtype() == DType::bf16) {
    merge_bias_of<bfloat16>(*layer.lora, host, back);
  } else {
    merge_bias_of<float>(*layer.lora, host, back);
  }
  if (!host.shares_storage(bias)) {
    bias.copy_from(host);
  }
}

// The layers compute with their base weights alone while the adapter is in them.
void show(const NamedAdapter& adapter, bool on) {
  for (const PlacedAdapter& layer : adapter.layers) {
    if (layer.linear != nullptr) {
      layer.linear->set_lora(on ? static_cast<Lora*>(layer.lora.get()) : nullptr);
    } else {
      layer.embedding->set_lora(on ? static_cast<LoraEmbedding*>(layer.lora.get()) : nullptr);
    }
  }
}

bool same_bytes(const Tensor& x, const Tensor& y) {
  return x.bytes() == y.bytes() &&
         (x.numel() == 0 ||
          std::memcmp(x.raw(), y.raw(), static_cast<std::size_t>(x.bytes())) == 0);
}

}  // namespace

void merge_adapter(Model& model) {
  NamedAdapter& adapter = active(model);
  check_mergeable(model, adapter);
  for (PlacedAdapter& layer : adapter.layers) {
    merge_into(layer, weight_of(layer).write(), /*back=*/false, layer.merged_factors);
    if (layer.lora->b_bias.defined()) {
      merge_bias(layer, layer.linear->bias.write(), /*back=*/false);
    }
  }
  show(adapter, false);
  adapter.merged = true;
}

void unmerge_adapter(Model& model) {
  NamedAdapter& adapter = active(model);
  if (!adapter.merged) {
    fail("lora", "adapter \"{}\" is not merged", adapter.name);
  }
  for (PlacedAdapter& layer : adapter.layers) {
    merge_into(layer, weight_of(layer).write(), /*back=*/true, layer.merged_factors);
    if (layer.lora->b_bias.defined()) {
      merge_bias(layer, layer.linear->bias.write(), /*back=*/true);
    }
  }
  show(adapter, true);
  adapter.merged = false;
}

void merge_lora(Model& model) {
  NamedAdapter& adapter = active(model);
  if (!adapter.merged) {
    merge_adapter(model);
  }
  model.clear_adapters();
}

absl::Status export_merged(Model& model, const std::string& folder, const SaveOptions& options) {
  NamedAdapter& adapter = active(model);
  check_mergeable(model, adapter);
  std::map<const Parameter*, const PlacedAdapter*> targets;
  for (const PlacedAdapter& layer : adapter.layers) {
    targets.emplace(&weight_of(layer), &layer);
    if (layer.lora->b_bias.defined()) {
      targets.emplace(&layer.linear->bias, &layer);
    }
  }
  const auto merged = [&](const Parameter& parameter) {
    const auto found = targets.find(&parameter);
    if (found == targets.end()) {
      return parameter.value();
    }
    const Tensor value = parameter.value().to(cpu).clone();
    if (&parameter != &weight_of(*found->second)) {
      merge_bias(*found->second, value, /*back=*/false);
      return value;
    }
    std::vector<double> factors;
    merge_into(*found->second, value, /*back=*/false, factors);
    return value;
  };
  const auto changes = [&](const Parameter& parameter) {
    return !same_bytes(model.adapters().base_value(parameter).to(cpu), merged(parameter).to(cpu));
  };
  const bool any =
      std::ranges::any_of(targets, [&](const auto& target) { return changes(*target.first); }) ||
      std::ranges::any_of(adapter.values, [&](const auto& own) { return changes(*own.parameter); });
  if (!any) {
    return absl::FailedPreconditionError(fmt::format(
        "{}: adapter \"{}\" merged into {} layers changes nothing in {}: its B is zero, or its "
        "changes are below the rounding",
        folder, adapter.name, adapter.layers.size(), name(weight_of(adapter.layers[0]).dtype())));
  }
  SaveOptions with = options;
  with.verify = true;
  with.value = [&](const NamedParameter& entry) { return merged(*entry.parameter); };
  return save_model(model, folder, with);
}

}  // namespace reprise::nn

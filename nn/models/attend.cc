#include "nn/models/attend.h"

#include <utility>

#include <fmt/format.h>

#include "autograd/attention.h"
#include "autograd/dropout.h"
#include "nn/initialize.h"

namespace reprise::nn {

Variable attend(Variable q, Variable k, Variable v, const Batch& batch, const AttendOptions& options) {
  const std::int64_t B = q.size(0), T = q.size(1);
  std::vector<float> visible;
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t i = 0; i < T; ++i)
      for (std::int64_t j = 0; j < T; ++j)
        visible.push_back(j <= i && (!batch.mask.defined() || batch.mask.data<std::int64_t>()[b * T + j] != 0) && (options.window == 0 || i - options.window < j));
  return naive_attention(q, k, v, Tensor::from(visible, Shape{B, T, T}), options.scale);
}

Variable drop(Variable x, double probability, Generator* generator) {
  if (generator == nullptr || probability == 0) {
    return x;
  }
  return dropout(std::move(x), probability, *generator);
}

double read_dropout(JsonReader& json, std::string_view key, double otherwise) {
  const double probability = json.number(key, otherwise);
  if (json.status().ok() && !(probability >= 0 && probability < 1)) {
    json.refuse(key, fmt::format("must be from 0 to below 1, got {}", probability));
  }
  return probability;
}

void initialize_parameter(const NamedParameter& entry, double deviation, Generator& generator) {
  const Tensor value = entry.parameter->write();
  if (value.rank() > 1) {
    fill_normal(value, deviation, generator);
  } else if (!value.is_meta()) {
    const double all = entry.path.ends_with(".bias") ? 0 : 1;
    value.copy_from(Tensor::full(value.shape(), value.dtype(), all, value.device()));
  }
}

}  // namespace reprise::nn

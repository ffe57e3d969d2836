#include "nn/models/attend.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "autograd/attention.h"
#include "autograd/dropout.h"
#include "nn/initialize.h"

namespace reprise::nn {

bool is_padded_right(const Tensor& mask) {
  const std::vector<std::int64_t> seen = mask.to_vector<std::int64_t>();
  const auto S = static_cast<std::size_t>(mask.size(1));
  for (std::size_t at = 0; at < seen.size(); ++at) {
    const bool before = at % S == 0 || seen[at - 1] != 0;
    if (at % S == 0 ? seen[at] == 0 : seen[at] != 0 && !before) {
      return false;
    }
  }
  return true;
}

Visible visible_of(const Batch& batch) {
  Visible visible{.mask = batch.mask, .documents = {}};
  visible.padded_right = batch.mask.defined() &&
                         (batch.padded_right ? *batch.padded_right : is_padded_right(batch.mask));
  if (batch.starts.empty()) {
    return visible;
  }
  const std::int64_t B = batch.ids.size(0), T = batch.ids.size(1);
  std::vector<std::int64_t> documents;
  for (const std::vector<std::int64_t>& row : batch.starts) {
    std::size_t text = 0;
    visible.most_documents += static_cast<std::int64_t>(std::max<std::size_t>(1, row.size()));
    for (std::int64_t t = 0; t < T; ++t) {
      while (text + 1 < row.size() && row[text + 1] <= t) {
        ++text;
      }
      documents.push_back(static_cast<std::int64_t>(text));
    }
  }
  visible.documents = Tensor::from(documents, Shape{B, T}, batch.ids.device());
  return visible;
}

Variable attend(Variable q, Variable k, Variable v, const Visible& visible,
                const AttendOptions& options) {
  return attention(std::move(q), std::move(k), std::move(v),
                   {.scale = options.scale,
                    .causal = true,
                    .window = options.window,
                    .mask = visible.mask,
                    .documents = visible.documents,
                    .dropout = options.generator != nullptr ? options.dropout : 0,
                    .generator = options.generator,
                    .padded_right = visible.padded_right,
                    .most_documents = visible.most_documents});
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

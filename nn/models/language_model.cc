#include "nn/models/language_model.h"

#include <algorithm>

#include <fmt/format.h>

#include "autograd/cross_entropy.h"
#include "autograd/linear_cross_entropy.h"
#include "autograd/matmul.h"
#include "autograd/shape.h"
#include "kernels/tokens.h"
#include "nn/linear.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

void expect_ids(std::string_view argument, const Tensor& tensor, const Shape& shape) {
  if (tensor.dtype() != DType::i64 || tensor.shape() != shape) {
    fail("model", "{} must be i64 [B, T] = {}, got {} {}", argument, to_string(shape),
         name(tensor.dtype()), to_string(tensor.shape()));
  }
}

// Column t holds the label of t + 1, -100 at the end of each text.
Tensor shifted(const Batch& batch) {
  const std::int64_t T = batch.labels.size(1);
  const Device device = batch.labels.device();
  std::vector<std::int64_t> ends;
  for (std::size_t b = 0; b < batch.starts.size(); ++b) {
    for (const std::int64_t start : batch.starts[b]) {
      if (start > 0) {
        ends.push_back(static_cast<std::int64_t>(b) * T + start - 1);
      }
    }
  }
  const Tensor targets = Tensor::empty(Shape{batch.labels.numel()}, DType::i64, device);
  const Tensor borders =
      ends.empty() ? Tensor()
                   : Tensor::from(ends, Shape{static_cast<std::int64_t>(ends.size())}, device);
  kernels::next_labels(batch.labels.contiguous(), borders, targets);
  return targets;
}

}  // namespace

void LanguageModel::check(const Batch& batch) const {
  if (!batch.ids.defined() || batch.ids.rank() != 2 || batch.ids.dtype() != DType::i64) {
    fail("model", "ids must be i64 [B, T], got {}",
         batch.ids.defined()
             ? fmt::format("{} {}", name(batch.ids.dtype()), to_string(batch.ids.shape()))
             : "nothing");
  }
  const Shape& shape = batch.ids.shape();
  for (const auto& [argument, tensor] :
       {std::pair("labels", &batch.labels), std::pair("mask", &batch.mask)}) {
    if (tensor->defined()) {
      expect_ids(argument, *tensor, shape);
    }
  }
  if (batch.positions.defined()) {
    const std::int64_t numbers = numbers_a_position();
    const bool several = numbers > 1 && batch.positions.rank() == 3;
    expect_ids("positions", batch.positions, several ? Shape{numbers, shape[0], shape[1]} : shape);
  }
  for (const auto& [argument, tensor] :
       {std::pair("pixels", &batch.pixels), std::pair("grids", &batch.grids),
        std::pair("image_tokens", &batch.image_tokens)}) {
    if (tensor->defined() && !takes_images()) {
      fail("model", "{} must be absent: {} takes no images", argument, type());
    }
  }
  if (batch.starts.empty()) {
    return;
  }
  if (static_cast<std::int64_t>(batch.starts.size()) != shape[0]) {
    fail("model", "starts must have B = {} rows, got {}", shape[0], batch.starts.size());
  }
  for (const std::vector<std::int64_t>& row : batch.starts) {
    const bool ascending =
        std::adjacent_find(row.begin(), row.end(), std::greater_equal<>()) == row.end();
    if (row.empty() || row.front() != 0 || !ascending ||
        row.back() >= std::max<std::int64_t>(shape[1], 1)) {
      fail("model", "starts of a row must ascend from 0 and stay below T = {}, got [{}]", shape[1],
           fmt::join(row, ", "));
    }
  }
}

Variable LanguageModel::logits(const Batch& batch) {
  Variable x = hidden(batch);  // [B, T, C]
  Linear* const own = head();
  return own != nullptr ? (*own)(std::move(x)) : linear(std::move(x), embedding_table(), {});
}

Variable LanguageModel::loss(const Batch& batch, const LossOptions& options) {
  if (!batch.labels.defined()) {
    fail("loss", "the batch has no labels");
  }
  if (options.items && !(*options.items > 0)) {
    fail("loss", "items must be above 0, got {}", *options.items);
  }
  Variable x = hidden(batch);  // [B, T, C]
  const std::int64_t rows = x.size(0) * x.size(1);
  const Tensor targets = shifted(batch);  // [B T]
  x = reshape(std::move(x), Shape{rows, x.size(2)});
  Linear* const own = head();
  const double items = options.items.value_or(0);
  if (own != nullptr && (own->lora() != nullptr || own->bias.defined())) {
    return cross_entropy((*own)(std::move(x)), targets, items);
  }
  return linear_cross_entropy(std::move(x), own != nullptr ? own->weight : embedding_table(),
                              targets, items);
}

Tensor LanguageModel::positions_of(const Batch& batch, bool every_row) {
  if (batch.positions.defined()) {
    return batch.positions;
  }
  const std::int64_t B = batch.ids.size(0), T = batch.ids.size(1);
  if (batch.ids.numel() == 0) {  // T may be anything
    return Tensor::empty(Shape{B, T}, DType::i64, batch.ids.device());
  }
  if (batch.starts.empty()) {
    const Tensor counted =
        Tensor::empty(every_row ? Shape{B, T} : Shape{T}, DType::i64, batch.ids.device());
    kernels::count_positions(counted);
    return counted;
  }
  std::vector<std::int64_t> positions;
  for (const std::vector<std::int64_t>& starts : batch.starts) {
    std::size_t text = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      while (text + 1 < starts.size() && starts[text + 1] <= t) {
        ++text;
      }
      positions.push_back(t - starts[text]);
    }
  }
  return Tensor::from(positions, Shape{B, T}, batch.ids.device());
}

std::vector<NamedOutput> LanguageModel::outputs(const Batch& batch) {
  return {{"logits", logits(batch)}};
}

absl::StatusOr<std::unique_ptr<LanguageModel>> build_language_model(JsonReader& config,
                                                                    Place place) {
  absl::StatusOr<std::unique_ptr<Model>> model = build_model(config, place);
  if (!model.ok()) {
    return model.status();
  }
  auto* const language = dynamic_cast<LanguageModel*>(model->get());
  if (language == nullptr) {
    config.refuse("model_type",
                  fmt::format("must be a language model, got \"{}\"", (*model)->type()));
    return config.status();
  }
  (void)model->release();
  return std::unique_ptr<LanguageModel>(language);
}

}  // namespace reprise::nn

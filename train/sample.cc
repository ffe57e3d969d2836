#include "train/sample.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include <utf8.h>

#include "core/error.h"

namespace reprise::train {
namespace {

std::int64_t draw(const float* logits, std::int64_t count, double temperature,
                  Generator& generator) {
  const float largest = *std::max_element(logits, logits + count);
  std::vector<double> weights;
  double total = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    weights.push_back(std::exp((logits[i] - largest) / temperature));
    total += weights.back();
  }
  double left = uniform(philox(generator.seed, generator.reserve(1))[0]) * total;
  for (std::int64_t i = 0; i < count; ++i) {
    left -= weights[static_cast<std::size_t>(i)];
    if (left < 0) {
      return i;
    }
  }
  return count - 1;
}

}  // namespace

std::string sample_text(nn::LanguageModel& model, std::string_view prompt, std::int64_t count,
                        std::int64_t window, double temperature, Generator& generator,
                        const std::function<void()>& after_forward) {
  if (prompt.empty()) {
    fail("sample", "the prompt must have at least one byte");
  }
  const Device device = model.parameters().front()->value().device();
  std::string text(prompt);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto length = std::min<std::int64_t>(window, static_cast<std::int64_t>(text.size()));
    std::vector<std::int64_t> ids;
    for (std::size_t k = text.size() - static_cast<std::size_t>(length); k < text.size(); ++k) {
      ids.push_back(static_cast<unsigned char>(text[k]));
    }
    nn::Batch batch;
    batch.ids = Tensor::from(ids, {1, length}, device);
    const Tensor logits = model.logits(batch).tensor().to(cpu).contiguous();  // [1, T, V]
    if (after_forward) {
      after_forward();
    }
    const std::int64_t vocabulary = logits.shape().back();
    text += static_cast<char>(
        draw(logits.data<float>() + (length - 1) * vocabulary, vocabulary, temperature, generator));
  }
  std::string printable;
  utf8::replace_invalid(text.begin(), text.end(), std::back_inserter(printable), U'?');
  std::ranges::replace_if(
      printable,
      [](char c) {
        return (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') || c == 0x7f;
      },
      '?');
  return printable;
}

}  // namespace reprise::train

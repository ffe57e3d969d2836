#include "nn/rope_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <fmt/format.h>

#include "nn/models/limits.h"

namespace reprise::nn {
namespace {

// Its powers stay finite in f32.
constexpr double kMostTheta = 1e30;

void read_llama3(JsonReader& json, RopeConfig& rope) {
  rope.scaling = RopeScaling::llama3;
  rope.factor = json.number("factor");
  rope.low_frequency = json.number("low_freq_factor");
  rope.high_frequency = json.number("high_freq_factor");
  rope.original_positions =
      json.integer_between(1, kMostPositions, "original_max_position_embeddings");
  if (json.status().ok() && !(rope.low_frequency > 0)) {
    json.refuse("low_freq_factor", fmt::format("must be above 0, got {}", rope.low_frequency));
  }
  if (json.status().ok() && rope.high_frequency <= rope.low_frequency) {
    json.refuse("high_freq_factor", fmt::format("must be above low_freq_factor = {}, got {}",
                                                rope.low_frequency, rope.high_frequency));
  }
}

// How much yarn multiplies cos and sin by, as a function of a scale.
double magnitude(double scale, double weight) {
  return scale <= 1 ? 1 : 0.1 * weight * std::log(scale) + 1;
}

void read_yarn(JsonReader& json, RopeConfig& rope) {
  rope.scaling = RopeScaling::yarn;
  rope.original_positions = json.integer_between(
      1, kMostPositions, "original_max_position_embeddings", rope.max_positions);
  rope.factor = json.number("factor", static_cast<double>(rope.max_positions) /
                                          static_cast<double>(rope.original_positions));
  const double weight = json.number("mscale", 0), all_dims = json.number("mscale_all_dim", 0);
  const double usual = weight != 0 && all_dims != 0
                           ? magnitude(rope.factor, weight) / magnitude(rope.factor, all_dims)
                           : magnitude(rope.factor, 1);
  rope.attention_factor = json.number("attention_factor", usual);
  // 0 counts as absent in the reference.
  const double fast = json.number("beta_fast", 0), slow = json.number("beta_slow", 0);
  rope.beta_fast = fast != 0 ? fast : 32;
  rope.beta_slow = slow != 0 ? slow : 1;
  rope.truncate = json.boolean("truncate", true);
  if (!json.status().ok()) {
    return;
  }
  if (!(rope.beta_slow > 0)) {
    json.refuse("beta_slow", fmt::format("must be above 0, got {}", rope.beta_slow));
  } else if (!(rope.beta_fast > rope.beta_slow)) {
    json.refuse("beta_fast", fmt::format("must be above beta_slow = {}, got {}", rope.beta_slow,
                                         rope.beta_fast));
  } else if (!(rope.factor > 0)) {
    json.refuse("factor", fmt::format("must be above 0, got {}", rope.factor));
  } else if (!(rope.attention_factor > 0) || !std::isfinite(rope.attention_factor)) {
    json.refuse("attention_factor",
                fmt::format("must be above 0 (as given, or from mscale and mscale_all_dim), got {}",
                            rope.attention_factor));
  }
}

void read_scaling(JsonReader json, RopeConfig& rope) {
  const std::string type =
      json.has("rope_type") ? json.string("rope_type") : json.string("type", "default");
  if (type == "linear" || type == "dynamic") {
    rope.scaling = type == "linear" ? RopeScaling::linear : RopeScaling::dynamic;
    rope.factor = json.number("factor");
  } else if (type == "llama3") {
    read_llama3(json, rope);
  } else if (type == "yarn") {
    read_yarn(json, rope);
  } else if (type != "default" && type != "mrope") {
    json.refuse("rope_type", fmt::format("must be one of default, linear, dynamic, llama3, yarn, "
                                         "got \"{}\"",
                                         type));
  }
  if (json.status().ok() && !(rope.factor > 0)) {
    json.refuse("factor", fmt::format("must be above 0, got {}", rope.factor));
  }
}

std::vector<float> plain(double theta, std::int64_t dim) {
  std::vector<float> result;
  for (std::int64_t i = 0; i < dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(dim);
    result.push_back(1.0f / std::pow(static_cast<float>(theta), exponent));
  }
  return result;
}

void scale_llama3(const RopeConfig& rope, std::vector<float>& frequencies) {
  const auto original = static_cast<float>(rope.original_positions);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_frequency);
  const auto high = static_cast<float>(rope.high_frequency);
  for (float& frequency : frequencies) {
    const float wavelength = 2 * std::numbers::pi_v<float> / frequency;
    if (wavelength > original / low) {
      frequency /= factor;
    } else if (wavelength >= original / high) {
      const float smooth = (original / wavelength - low) / (high - low);
      frequency = (1 - smooth) * frequency / factor + smooth * frequency;
    }
  }
}

void scale_yarn(const RopeConfig& rope, std::vector<float>& frequencies) {
  const auto dim = static_cast<double>(rope.dim);
  // The dimension whose wave turns so often over the original length.
  const auto dimension = [&](double turns) {
    return dim *
           std::log(static_cast<double>(rope.original_positions) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(rope.theta));
  };
  double first = dimension(rope.beta_fast), last = dimension(rope.beta_slow);
  if (rope.truncate) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, dim - 1);
  if (first == last) {
    last += 0.001;
  }
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(first)) / static_cast<float>(last - first),
        0.0f, 1.0f);
    const float kept = 1 - ramp;
    frequencies[i] =
        frequencies[i] / static_cast<float>(rope.factor) * (1 - kept) + frequencies[i] * kept;
  }
}

}  // namespace

RopeConfig read_rope(JsonReader& json, std::int64_t head_size, std::int64_t max_positions,
                     double default_theta, double default_share) {
  RopeConfig rope;
  rope.max_positions = max_positions;
  const bool newer = json.has("rope_parameters");
  JsonReader parameters = json.object(newer ? "rope_parameters" : "rope_scaling");
  // Files in between carry some of the keys at both places; the nested one is meant.
  const double theta = json.number("rope_theta", default_theta);
  rope.theta = parameters.number("rope_theta", theta);
  const double share = json.number("partial_rotary_factor", default_share);
  const double rotated =
      static_cast<double>(head_size) * parameters.number("partial_rotary_factor", share);
  const bool within = rotated >= 0 && rotated <= static_cast<double>(head_size);
  rope.dim = within ? static_cast<std::int64_t>(rotated) : 0;
  if (json.status().ok() && !(rope.theta > 1 && rope.theta <= kMostTheta)) {
    json.refuse("rope_theta",
                fmt::format("must be above 1 and at most {}, got {}", kMostTheta, rope.theta));
  }
  if (json.status().ok() && (rope.dim % 2 != 0 || rope.dim == 0)) {
    json.refuse(
        "partial_rotary_factor",
        fmt::format("must leave an even number of rotated elements from 2 to head_dim = {}, "
                    "got {}",
                    head_size, rotated));
  }
  read_scaling(parameters, rope);
  if (json.status().ok() && rope.scaling == RopeScaling::dynamic && rope.dim == 2) {
    json.refuse("head_dim", "must be above 2 for dynamic scaling, got 2");
  }
  return rope;
}

std::vector<float> rope_frequencies(const RopeConfig& config, std::int64_t length) {
  double theta = config.theta;
  if (config.scaling == RopeScaling::dynamic) {
    const auto limit = static_cast<double>(config.max_positions);
    const double positions = std::max(static_cast<double>(length), limit);
    const auto dim = static_cast<double>(config.dim);
    theta *= std::pow(config.factor * positions / limit - (config.factor - 1), dim / (dim - 2));
  }
  std::vector<float> frequencies = plain(theta, config.dim);
  if (config.scaling == RopeScaling::linear) {
    for (float& frequency : frequencies) {
      frequency /= static_cast<float>(config.factor);
    }
  } else if (config.scaling == RopeScaling::llama3) {
    scale_llama3(config, frequencies);
  } else if (config.scaling == RopeScaling::yarn) {
    scale_yarn(config, frequencies);
  }
  return frequencies;
}

}  // namespace reprise::nn

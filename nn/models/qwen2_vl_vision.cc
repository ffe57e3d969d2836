#include "nn/models/qwen2_vl_vision.h"

#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "autograd/attention.h"
#include "autograd/elementwise.h"
#include "autograd/matmul.h"
#include "autograd/shape.h"
#include "core/error.h"
#include "nn/blocks.h"
#include "nn/models/limits.h"

namespace reprise::nn {
namespace {

constexpr double kEpsilon = 1e-6;
constexpr std::int64_t kMostSide = 4096;  // of a patch or a block of patches, in pixels or patches
constexpr std::int64_t kMostGrid = std::int64_t{1} << 18;

}  // namespace

Qwen2VlVisionConfig read_qwen2_vl_vision_config(JsonReader& json) {
  Qwen2VlVisionConfig config;
  config.layers = json.integer_between(0, kMostLayers, "depth", 32);
  config.width = json.integer_between(1, kMostWidth, "embed_dim", 1280);
  config.heads = json.integer_between(1, kMostHeads, "num_heads", 16);
  const double ratio = json.number("mlp_ratio", 4);
  if (json.status().ok() && !(ratio > 0 && ratio <= 1024)) {
    json.refuse("mlp_ratio", fmt::format("must be above 0 and at most 1024, got {}", ratio));
  }
  config.inner =
      json.status().ok() ? static_cast<std::int64_t>(static_cast<double>(config.width) * ratio) : 1;
  config.activation = read_activation(json, "hidden_act", "quick_gelu");
  config.channels = json.integer_between(1, kMostSide, "in_channels", 3);
  config.patch = json.integer_between(1, kMostSide, "patch_size", 14);
  config.frames = json.integer_between(1, kMostSide, "temporal_patch_size", 2);
  config.merge = json.integer_between(1, kMostSide, "spatial_merge_size", 2);
  config.out = json.integer_between(1, kMostWidth, "hidden_size", 3584);
  JsonReader rope = json.object("rope_parameters");
  config.theta = rope.number("rope_theta", 10000);
  config.initializer_range = json.number("initializer_range", 0.02);
  if (!json.status().ok()) {
    return config;
  }
  if (config.width % config.heads != 0) {
    json.refuse("num_heads",
                fmt::format("must divide embed_dim = {}, got {}", config.width, config.heads));
  } else if (config.width / config.heads % 4 != 0) {
    json.refuse("num_heads", fmt::format("must leave a multiple of 4 elements in a head, for "
                                         "pairs of rows and columns, got {}",
                                         config.width / config.heads));
  } else if (!(config.theta > 1 && config.theta <= 1e30)) {
    rope.refuse("rope_theta",
                fmt::format("must be above 1 and at most 1e30, got {}", config.theta));
  }
  return config;
}

nlohmann::json qwen2_vl_vision_json(const Qwen2VlVisionConfig& config) {
  return {{"model_type", "qwen2_vl"},
          {"depth", config.layers},
          {"embed_dim", config.width},
          {"num_heads", config.heads},
          {"mlp_ratio", static_cast<double>(config.inner) / static_cast<double>(config.width)},
          {"hidden_act", name(config.activation)},
          {"in_channels", config.channels},
          {"patch_size", config.patch},
          {"temporal_patch_size", config.frames},
          {"spatial_merge_size", config.merge},
          {"hidden_size", config.out},
          {"rope_parameters", {{"rope_type", "axial"}, {"rope_theta", config.theta}}},
          {"initializer_range", config.initializer_range}};
}

std::vector<Qwen2VlGrid> qwen2_vl_grids(const Qwen2VlVisionConfig& config, const Tensor& pixels,
                                        const Tensor& grids) {
  if (!grids.defined() || grids.dtype() != DType::i64 || grids.rank() != 2 || grids.size(1) != 3) {
    fail("model", "grids must be i64 [images, 3], got {}",
         grids.defined() ? fmt::format("{} {}", name(grids.dtype()), to_string(grids.shape()))
                         : "nothing");
  }
  const std::vector<std::int64_t> sizes = grids.to_vector<std::int64_t>();
  std::vector<Qwen2VlGrid> result;
  std::int64_t patches = 0;
  for (std::size_t i = 0; i + 2 < sizes.size(); i += 3) {
    const Qwen2VlGrid grid{sizes[i], sizes[i + 1], sizes[i + 2]};
    for (const std::int64_t side : {grid.t, grid.h, grid.w}) {
      if (side < 1 || side > kMostGrid) {
        fail("model", "grids must be from 1 to {}, got {} for image {}", kMostGrid, side, i / 3);
      }
    }
    if (grid.h % config.merge != 0 || grid.w % config.merge != 0) {
      fail("model", "grids must be whole blocks of {} x {} patches, got {} x {} for image {}",
           config.merge, config.merge, grid.h, grid.w, i / 3);
    }
    patches += grid.patches();
    result.push_back(grid);
  }
  const bool fit = pixels.defined() && is_floating(pixels.dtype()) &&
                   pixels.shape() == Shape{patches, config.pixels()};
  if (!fit) {
    fail("model", "pixels must be floating [patches, pixels] = [{}, {}], as the grids say, got {}",
         patches, config.pixels(),
         pixels.defined() ? fmt::format("{} {}", name(pixels.dtype()), to_string(pixels.shape()))
                          : "nothing");
  }
  return result;
}

Qwen2VlPatchProjection::Qwen2VlPatchProjection(const Qwen2VlVisionConfig& config, Place place)
    : weight("weight", parameter_tensor(Shape{config.width, config.channels, config.frames,
                                              config.patch, config.patch},
                                        place)) {
  add("weight", weight);
}

Variable Qwen2VlPatchProjection::operator()(Variable x) const {
  const std::int64_t E = weight.shape()[0];
  return linear(std::move(x), reshape(weight, Shape{E, weight.shape().numel() / E}), {});
}

Qwen2VlPatchEmbed::Qwen2VlPatchEmbed(const Qwen2VlVisionConfig& config, Place place)
    : proj(config, place) {
  add("proj", proj);
}

Qwen2VlVisionAttention::Qwen2VlVisionAttention(const Qwen2VlVisionConfig& config, Place place)
    : qkv(config.width, 3 * config.width, {.bias = true}, place),
      proj(config.width, config.width, {.bias = true}, place),
      heads_(config.heads) {
  add("qkv", qkv);
  add("proj", proj);
}

Variable Qwen2VlVisionAttention::operator()(Variable x, const Tensor& frames,
                                            const Rotation& rotation) const {
  const std::int64_t P = x.size(1), E = x.size(2), D = E / heads_;
  const Shape heads{1, P, heads_, D};
  Variable all = qkv(std::move(x));                                     // [1, P, 3E]
  Variable q = rotation(reshape(slice(all, 2, 0, E), heads));           // [1, P, H, D]
  Variable k = rotation(reshape(slice(all, 2, E, 2 * E), heads));       // [1, P, H, D]
  Variable v = reshape(slice(std::move(all), 2, 2 * E, 3 * E), heads);  // [1, P, H, D]
  Variable a = attention(std::move(q), std::move(k), std::move(v),
                         {.scale = 1 / std::sqrt(static_cast<double>(D)), .documents = frames});
  return proj(reshape(std::move(a), Shape{1, P, E}));  // [1, P, E]
}

Qwen2VlVisionMlp::Qwen2VlVisionMlp(const Qwen2VlVisionConfig& config, Place place)
    : fc1(config.width, config.inner, {.bias = true}, place),
      fc2(config.inner, config.width, {.bias = true}, place),
      activation_(config.activation) {
  add("fc1", fc1);
  add("fc2", fc2);
}

Variable Qwen2VlVisionMlp::operator()(Variable x) const {
  Variable f = activate(activation_, fc1(std::move(x)));  // [1, P, F]
  return fc2(std::move(f));                               // [1, P, E]
}

Qwen2VlVisionBlock::Qwen2VlVisionBlock(const Qwen2VlVisionConfig& config, Place place)
    : norm1(config.width, kEpsilon, place),
      norm2(config.width, kEpsilon, place),
      attn(config, place),
      mlp(config, place) {
  add("norm1", norm1);
  add("norm2", norm2);
  add("attn", attn);
  add("mlp", mlp);
}

Variable Qwen2VlVisionBlock::operator()(Variable x, const Tensor& frames,
                                        const Rotation& rotation) const {
  Variable a = attn(norm1(x), frames, rotation);               // [1, P, E]
  Normed n = norm2(std::move(a), std::move(x));                // sum = a + x
  return reprise::add(mlp(std::move(n.y)), std::move(n.sum));  // [1, P, E]
}

Qwen2VlMerger::Pair::Pair(Linear& first, Linear& second) {
  add("0", first);
  add("2", second);
}

Qwen2VlMerger::Qwen2VlMerger(const Qwen2VlVisionConfig& config, Place place)
    : ln_q(config.width, kEpsilon, place),
      first(config.merge * config.merge * config.width, config.merge * config.merge * config.width,
            {.bias = true}, place),
      second(config.merge * config.merge * config.width, config.out, {.bias = true}, place),
      mlp_(first, second),
      merged_(config.merge * config.merge) {
  add("ln_q", ln_q);
  add("mlp", mlp_);
}

Variable Qwen2VlMerger::operator()(Variable x) const {
  const std::int64_t P = x.size(1), E = x.size(2);
  x = reshape(ln_q(std::move(x)), Shape{P / merged_, merged_ * E});  // [P / m^2, m^2 E]
  return second(gelu(first(std::move(x))));                          // [P / m^2, C]
}

Qwen2VlVision::Qwen2VlVision(const Qwen2VlVisionConfig& config, Place place)
    : patch_embed(config, place), merger(config, place), config_(config) {
  add("patch_embed", patch_embed);
  add("blocks", blocks);
  add("merger", merger);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    blocks.append(config, place);
  }
}

Tensor Qwen2VlVision::positions(const std::vector<Qwen2VlGrid>& grids, Device device) const {
  std::vector<std::int64_t> rows, columns;
  const std::int64_t m = config_.merge;
  for (const Qwen2VlGrid& grid : grids) {
    for (std::int64_t i = 0; i < grid.patches(); ++i) {
      const std::int64_t block = i % (grid.h * grid.w) / (m * m), inside = i % (m * m);
      rows.push_back(block / (grid.w / m) * m + inside / m);
      columns.push_back(block % (grid.w / m) * m + inside % m);
    }
  }
  const auto P = static_cast<std::int64_t>(rows.size());
  rows.insert(rows.end(), columns.begin(), columns.end());
  return Tensor::from(rows, Shape{2, 1, P}, device);
}

Variable Qwen2VlVision::operator()(const Tensor& pixels,
                                   const std::vector<Qwen2VlGrid>& grids) const {
  const Parameter& weight = patch_embed.proj.weight;
  const Device device = weight.value().device();
  std::vector<std::int64_t> frames;
  std::int64_t frame = 0;
  for (const Qwen2VlGrid& grid : grids) {
    for (std::int64_t t = 0; t < grid.t; ++t, ++frame) {
      frames.insert(frames.end(), static_cast<std::size_t>(grid.h * grid.w), frame);
    }
  }
  const auto P = static_cast<std::int64_t>(frames.size());
  const Tensor frame_of = Tensor::from(frames, Shape{1, P}, device);

  // The same frequencies for the row and for the column, each with its own position.
  const std::int64_t half = config_.width / config_.heads / 2;  // D / 2
  const std::vector<float> once =
      rope_frequencies({.theta = config_.theta, .dim = half, .max_positions = kMostGrid}, 0);
  std::vector<float> frequencies = once;
  frequencies.insert(frequencies.end(), once.begin(), once.end());
  const Rotation rotation{positions(grids, device),
                          Tensor::from(frequencies, Shape{half}, device),
                          {.sections = {half / 2, half / 2}, .f32_tables = true}};

  Variable x = patch_embed.proj(cast(pixels, weight.dtype()));  // [P, E]
  x = reshape(std::move(x), Shape{1, P, config_.width});        // [1, P, E]
  x = run_blocks("visual.blocks", blocks, std::move(x),
                 [&](const Qwen2VlVisionBlock& block, Variable in) {
                   return block(std::move(in), frame_of, rotation);
                 });
  return merger(std::move(x));  // [P / m^2, C]
}

}  // namespace reprise::nn

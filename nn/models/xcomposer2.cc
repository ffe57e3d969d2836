#include "nn/models/xcomposer2.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/matmul.h"
#include "autograd/rows.h"
#include "autograd/shape.h"
#include "kernels/resize.h"
#include "nn/adapters/lora.h"
#include "nn/initialize.h"
#include "nn/models/attend.h"
#include "nn/models/limits.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

const std::string kTower = "vit.vision_tower.vision_model";
constexpr std::int64_t kContextOf25 = 24576;
constexpr std::int64_t kTile25 = 560, kTile4Khd = 336;
constexpr std::int64_t kOddRank = 8;    // of a PLoRA that was made without a rank
constexpr double kOddScale = 16.0 / 8;  // and without an alpha

ClipVisionConfig large_tower(std::int64_t image) {
  return {.tower = {.width = 1024, .inner = 4096, .layers = 24, .heads = 16},
          .image = image,
          .patch = 14};
}

// The first size of a stored tensor, where it may be one.
std::optional<std::int64_t> stored_rows(const JsonReader& json, const std::string& tensor,
                                        std::int64_t most) {
  const std::optional<Shape> shape = json.stored_shape(tensor);
  const bool fits = shape && shape->rank() > 0 && (*shape)[0] >= 1 && (*shape)[0] <= most;
  return fits ? std::optional((*shape)[0]) : std::nullopt;
}

// The side of the tower's images, as its table of positions in the file has it.
std::optional<std::int64_t> stored_image(const JsonReader& json, std::int64_t patch) {
  const auto rows = stored_rows(json, kTower + ".embeddings.position_embedding.weight",
                                kMostImageSide * kMostImageSide);
  if (!rows) {
    return std::nullopt;
  }
  const auto side = std::llround(std::sqrt(static_cast<double>(*rows - 1)));
  const bool square = side >= 1 && side * side + 1 == *rows && side * patch <= kMostImageSide;
  return square ? std::optional(static_cast<std::int64_t>(side) * patch) : std::nullopt;
}

ClipVisionConfig read_vision(JsonReader& json, bool tiles) {
  const std::int64_t of_tiles =
      json.integer("max_position_embeddings", 0) == kContextOf25 ? kTile25 : kTile4Khd;
  const std::int64_t usual = tiles ? of_tiles : json.integer_between(1, kMostImageSide, "img_size");
  ClipVisionConfig defaults = large_tower(usual);
  JsonReader vision = json.object("vision_config");
  const std::int64_t patch =
      vision.integer_between(1, kMostImageSide, "patch_size", defaults.patch);
  if (json.status().ok()) {
    defaults.image = stored_image(json, patch).value_or(usual);
  }
  ClipVisionConfig config = read_clip_vision_config(vision, defaults);
  if (json.status().ok() && tiles && config.side() % 2 != 0) {
    vision.refuse("image_size", fmt::format("must have an even number of patches of {}, got {}",
                                            config.patch, config.image));
  }
  return config;
}

// Rows of [B T] that are image tokens.
Tensor image_rows(const Batch& batch) {
  std::vector<std::int64_t> rows;
  if (batch.image_tokens.defined()) {
    const std::vector<std::int64_t> tokens = batch.image_tokens.to_vector<std::int64_t>();
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] != 0) {
        rows.push_back(static_cast<std::int64_t>(i));
      }
    }
  }
  return Tensor::from(rows, Shape{static_cast<std::int64_t>(rows.size())}, batch.ids.device());
}

// [.., 4 C_vision]; absent without tiles.
Tensor separator(const XComposer2Config& config, std::vector<std::int64_t> sizes, Place place) {
  sizes.push_back(4 * config.vision.tower.width);
  return config.tiles ? parameter_tensor(Shape(std::span<const std::int64_t>(sizes)), place)
                      : Tensor();
}

MakeInternLm2Linear plora_linears(const XComposer2Config& config) {
  return [&config](std::string_view name, std::int64_t in, std::int64_t out, LinearOptions options,
                   Place place) {
    const PloraConfig& plora = name == "wqkv" ? config.plora_qkv : config.plora;
    return std::make_unique<PloraLinear>(in, out, options, plora, config.plora_dropout, place);
  };
}

struct Grid {
  std::int64_t height, width;
};

// Checked against the number of views.
std::vector<Grid> grids_of(const Tensor& grids, std::int64_t views) {
  if (!grids.defined() || grids.dtype() != DType::i64 || grids.rank() != 2 || grids.size(1) != 3) {
    fail("model", "grids must be i64 [images, 3], got {}",
         grids.defined() ? fmt::format("{} {}", name(grids.dtype()), to_string(grids.shape()))
                         : "nothing");
  }
  const std::vector<std::int64_t> numbers = grids.to_vector<std::int64_t>();
  std::vector<Grid> result;
  std::int64_t expected = 0;
  for (std::size_t i = 0; i < numbers.size(); i += 3) {
    const std::int64_t height = numbers[i + 1], width = numbers[i + 2];
    if (numbers[i] != 1 || height < 1 || width < 1 || height > views || width > views) {
      fail("model", "grids of {} views must be (1, height, width) in tiles, got ({}, {}, {})",
           views, numbers[i], height, width);
    }
    result.push_back({height, width});
    expected += 1 + height * width;
  }
  if (expected != views) {
    fail("model", "grids stand for {} views, got pixels of {}", expected, views);
  }
  return result;
}

// Where each token of the images comes from: rows of the merged patches [views, h, w], then the
// separators of rows and of images.
std::vector<std::int64_t> token_sources(const std::vector<Grid>& grids, std::int64_t views,
                                        std::int64_t h, std::int64_t w) {
  const std::int64_t sub = views * h * w, glb = sub + 1;
  std::vector<std::int64_t> sources;
  std::int64_t view = 0;
  const auto add_rows_of = [&](const Grid& grid) {  // of tiles that start at `view`
    for (std::int64_t row = 0; row < grid.height * h; ++row) {
      for (std::int64_t column = 0; column < grid.width * w; ++column) {
        const std::int64_t tile = view + (row / h) * grid.width + column / w;
        sources.push_back((tile * h + row % h) * w + column % w);
      }
      sources.push_back(sub);
    }
    view += grid.height * grid.width;
  };
  for (const Grid& grid : grids) {
    add_rows_of({1, 1});
    sources.push_back(glb);
    add_rows_of(grid);
  }
  return sources;
}

}  // namespace

XComposer2Config read_xcomposer2_config(JsonReader& json) {
  XComposer2Config config;
  config.decoder = read_internlm2_config(json);
  config.tiles =
      json.has_shapes() ? json.stored_shape("plora_glb_GN").has_value() : !json.has("img_size");
  if (!config.tiles && !json.has("img_size")) {
    json.refuse("img_size", "is missing, and the weights have no separators of tiles");
    return config;
  }
  config.vision = read_vision(json, config.tiles);
  const auto rank = [&](std::string_view key, const std::string& layer, std::int64_t usual) {
    const auto stored =
        stored_rows(json, "model.layers.0." + layer + ".Plora_A.weight", kMostWidth);
    return json.integer_between(1, kMostWidth, key, stored.value_or(usual));
  };
  const bool is_4khd = config.tiles && config.vision.image == kTile4Khd;
  config.plora.rank = rank("plora_rank", "attention.wo", 256);
  config.plora_qkv.rank =
      rank("plora_qkv_rank", "attention.wqkv", is_4khd ? kOddRank : config.plora.rank);
  const bool odd = config.plora_qkv.rank == kOddRank && config.plora.rank != kOddRank;
  config.plora_qkv.scale = json.number("plora_qkv_scale", odd ? kOddScale : 1);
  config.plora_dropout = read_dropout(json, "plora_dropout", 0.05);
  return config;
}

PloraLinear::PloraLinear(std::int64_t in, std::int64_t out, LinearOptions options,
                         const PloraConfig& plora, double dropout, Place place)
    : InternLm2Linear(in, out, options, place),
      plora_a("Plora_A.weight", parameter_tensor(Shape{plora.rank, in}, place)),
      plora_b("Plora_B.weight", parameter_tensor(Shape{out, plora.rank}, place)),
      scale_(plora.scale),
      dropout_(dropout) {
  add("Plora_A.weight", plora_a);
  add("Plora_B.weight", plora_b);
}

Variable PloraLinear::with_part(Variable y, Variable x, const Variable& images) const {
  x = drop(std::move(x), dropout_, generator());
  x = linear(std::move(x), plora_a);  // [M, R]
  if (scale_ != 1) {
    x = reprise::scale(std::move(x), scale_);
  }
  return add_rows(std::move(y), images, linear(std::move(x), plora_b));  // [B, T, out]
}

Variable PloraLinear::operator()(Variable x, const Variable& images) const {
  // Without image tokens these are products of no rows, so that A and B have gradients all the
  // same: zeros.
  if (lora() != nullptr && lora()->weight_decomposed()) {
    const auto product = [&](Variable in) { return linear(std::move(in), weight, {}, in_out()); };
    const auto whole = [&](Variable in) {
      Variable part = take_rows(in, images);  // [M, in]
      return with_part(product(std::move(in)), std::move(part), images);
    };
    return lora()->decomposed(std::move(x), whole, product, weight, bias, in_out());
  }
  Variable part = take_rows(x, images);                            // [M, in]
  Variable y = InternLm2Linear::operator()(std::move(x), images);  // [B, T, out]
  return with_part(std::move(y), std::move(part), images);
}

XComposer2Projector::XComposer2Projector(std::int64_t in, std::int64_t width, Place place)
    : first(in, width, {.bias = true}, place), second(width, width, {.bias = true}, place) {
  add("0", first);
  add("2", second);
}

Variable XComposer2Projector::operator()(Variable x) const {
  return second(gelu(first(std::move(x))));  // [M, C]
}

XComposer2::XComposer2(const XComposer2Config& config, Place place)
    : model(config.decoder, plora_linears(config), place),
      vit(config.vision, place),
      vision_proj((config.tiles ? 4 : 1) * config.vision.tower.width, config.decoder.width, place),
      plora_glb_GN("plora_glb_GN", separator(config, {1, 1}, place)),
      plora_sub_GN("plora_sub_GN", separator(config, {1, 1, 1}, place)),
      config_(config) {
  add("model", model);
  if (!config.decoder.tied) {
    output.emplace(config.decoder.width, config.decoder.vocabulary, LinearOptions{}, place);
    add("output", *output);
  }
  add(kTower, vit);
  add("vision_proj", vision_proj);
  add("plora_glb_GN", plora_glb_GN);
  add("plora_sub_GN", plora_sub_GN);
  name_parameters();
}

Variable XComposer2::assembled(Variable patches, std::int64_t height, std::int64_t width,
                               const Tensor& grids) const {
  const std::int64_t views = patches.size(0), C = patches.size(2), h = height / 2, w = width / 2;
  const std::vector<std::int64_t> sources = token_sources(grids_of(grids, views), views, h, w);
  // Four neighbours, channels one after the other: (0, 0), (0, 1), (1, 0), (1, 1).
  Variable x = transpose(reshape(std::move(patches), Shape{views, h, 2, w, 2, C}), 2, 3);
  x = reshape(contiguous(std::move(x)), Shape{views * h * w, 4 * C});
  const Shape one{1, 4 * C};
  Variable table =
      concat({std::move(x), reshape(plora_sub_GN, one), reshape(plora_glb_GN, one)}, 0);
  const Shape count{static_cast<std::int64_t>(sources.size())};
  return embedding(Tensor::from(sources, count, grids.device()), std::move(table));  // [M, 4 C]
}

Variable XComposer2::image_features(const Batch& batch) const {
  const Tensor& pixels = batch.pixels;
  Variable x = vit.patches(pixels, -1);  // [views, P, C_vision]
  if (config_.tiles) {
    const std::int64_t height = pixels.size(2) / config_.vision.patch;
    const std::int64_t width = pixels.size(3) / config_.vision.patch;
    if (height % 2 != 0 || width % 2 != 0) {
      fail("model", "pixels must have an even number of patches along each side, got {} x {}",
           height, width);
    }
    x = assembled(std::move(x), height, width, batch.grids);
  } else {
    if (batch.grids.defined()) {
      fail("model", "grids must be absent: this model's images are one view each");
    }
    x = reshape(std::move(x), Shape{x.size(0) * x.size(1), x.size(2)});
  }
  return vision_proj(std::move(x));  // [M, C]
}

Variable XComposer2::hidden(const Batch& batch) {
  check(batch);
  if (batch.image_tokens.defined() && (batch.image_tokens.dtype() != DType::i64 ||
                                       batch.image_tokens.shape() != batch.ids.shape())) {
    fail("model", "image_tokens must be i64 [B, T] = {}, got {} {}", to_string(batch.ids.shape()),
         name(batch.image_tokens.dtype()), to_string(batch.image_tokens.shape()));
  }
  const Tensor rows = image_rows(batch);         // [M]
  Variable x = model.tok_embeddings(batch.ids);  // [B, T, C]
  if (batch.pixels.defined()) {
    Variable images = image_features(batch);  // [M, C]
    if (images.size(0) != rows.size(0)) {
      fail("model", "the images give {} tokens, but image_tokens has {} of them", images.size(0),
           rows.size(0));
    }
    x = put_rows(std::move(x), rows, std::move(images));
  } else if (rows.size(0) > 0) {
    fail("model", "image_tokens has {} of them, but there are no pixels", rows.size(0));
  }
  const InternLm2Context context{
      visible_of(batch),
      rotation_of(config_.decoder.rope, positions_of(batch), embedding_table().value().device()),
      rows};
  return model(std::move(x), context);  // [B, T, C]
}

void XComposer2::initialize(Generator& generator) {
  for (const NamedParameter& entry : named_parameters()) {
    if (entry.path.find(".Plora_A.") != std::string::npos) {
      const double bound = 1 / std::sqrt(static_cast<double>(entry.parameter->shape()[1]));
      fill_uniform(entry.parameter->write(), -bound, bound, generator);
    } else if (entry.path.find(".Plora_B.") != std::string::npos || entry.path.ends_with("_GN")) {
      entry.parameter->write().zero();
    } else if (!entry.path.starts_with(kTower)) {
      initialize_parameter(entry, config_.decoder.initializer_range, generator);
    }
  }
  vit.initialize(generator);
  if (const auto padding = config_.decoder.padding) {
    embedding_table().write().slice(0, *padding, *padding + 1).zero();
  }
}

std::string XComposer2::write_config() const {
  nlohmann::json json = internlm2_json(config_.decoder);
  json["model_type"] = type();
  json["architectures"] = {"InternLMXComposer2ForCausalLM"};
  json["vision_config"] = write_clip_vision_config(config_.vision);
  if (!config_.tiles) {
    json["img_size"] = config_.vision.image;
  }
  json["plora_rank"] = config_.plora.rank;
  json["plora_qkv_rank"] = config_.plora_qkv.rank;
  json["plora_qkv_scale"] = config_.plora_qkv.scale;
  json["plora_dropout"] = config_.plora_dropout;
  return json.dump(2) + "\n";
}

bool XComposer2::is_buffer(std::string_view key) const {
  return key.ends_with("rotary_emb.inv_freq") || key.ends_with("embeddings.position_ids") ||
         (config_.decoder.tied && key == "output.weight");
}

Tensor xcomposer2_views(const Tensor& image, std::int64_t side) {
  const bool fits = image.rank() == 3 && image.size(0) == 3 && image.dtype() == DType::f32 &&
                    side > 0 && image.size(1) >= side && image.size(2) >= side &&
                    image.size(1) % side == 0 && image.size(2) % side == 0;
  if (!fits) {
    fail("views", "image must be f32 [3, H, W], H and W multiples of {}, got {} {}", side,
         name(image.dtype()), to_string(image.shape()));
  }
  const std::int64_t h = image.size(1) / side, w = image.size(2) / side;
  const Tensor views = Tensor::empty(Shape{1 + h * w, 3, side, side}, DType::f32, image.device());
  // Channels last for the resizing.
  const Tensor last = image.transpose(0, 1).transpose(1, 2).contiguous();  // [H, W, 3]
  const Tensor whole = Tensor::empty(Shape{side, side, 3}, DType::f32, image.device());
  kernels::resize_bicubic(last, whole);
  views.slice(0, 0, 1).copy_from(
      whole.transpose(1, 2).transpose(0, 1).contiguous().reshape(Shape{1, 3, side, side}));
  for (std::int64_t tile = 0; tile < h * w; ++tile) {
    const std::int64_t y = tile / w * side, x = tile % w * side;
    const Tensor cut = image.slice(1, y, y + side).slice(2, x, x + side);
    views.slice(0, tile + 1, tile + 2).copy_from(cut.contiguous().reshape(Shape{1, 3, side, side}));
  }
  return views;
}

}  // namespace reprise::nn

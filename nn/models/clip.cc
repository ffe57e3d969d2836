#include "nn/models/clip.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include <fmt/format.h>

#include "autograd/cross_entropy.h"
#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/l2_normalize.h"
#include "autograd/matmul.h"
#include "autograd/reduce.h"
#include "autograd/resize.h"
#include "autograd/rows.h"
#include "autograd/scaling.h"
#include "autograd/shape.h"
#include "kernels/tokens.h"
#include "nn/blocks.h"
#include "nn/initialize.h"
#include "nn/models/attend.h"
#include "nn/models/limits.h"
#include "nn/weights/json.h"

namespace reprise::nn {
namespace {

constexpr std::int64_t kMistakenEnd = 2;  // eos_token_id of files from before the key was read

ClipTowerConfig read_tower(JsonReader& json, const ClipTowerConfig& defaults) {
  ClipTowerConfig config;
  config.width = json.integer_between(1, kMostWidth, "hidden_size", defaults.width);
  config.inner = json.integer_between(1, kMostWidth, "intermediate_size", defaults.inner);
  config.layers = json.integer_between(0, kMostLayers, "num_hidden_layers", defaults.layers);
  config.heads = json.integer_between(1, kMostHeads, "num_attention_heads", defaults.heads);
  config.activation = read_activation(json, "hidden_act", "quick_gelu");
  config.epsilon = json.number("layer_norm_eps", defaults.epsilon);
  config.attention_dropout = read_dropout(json, "attention_dropout", 0);
  config.initializer_range = json.number("initializer_range", 0.02);
  config.initializer_factor = json.number("initializer_factor", 1);
  if (json.status().ok() && config.width % config.heads != 0) {
    json.refuse("num_attention_heads",
                fmt::format("must divide hidden_size = {}, got {}", config.width, config.heads));
  }
  return config;
}

nlohmann::json write_tower(const ClipTowerConfig& config) {
  return {{"hidden_size", config.width},
          {"intermediate_size", config.inner},
          {"num_hidden_layers", config.layers},
          {"num_attention_heads", config.heads},
          {"hidden_act", name(config.activation)},
          {"layer_norm_eps", config.epsilon},
          {"attention_dropout", config.attention_dropout},
          {"initializer_range", config.initializer_range},
          {"initializer_factor", config.initializer_factor}};
}

JsonReader tower_of(JsonReader& json, const std::string& key) {
  return json.object(json.has(key + "_dict") ? key + "_dict" : key);
}

Tensor numbered(std::int64_t rows, std::int64_t count, Device device) {
  const Tensor numbers = Tensor::empty(Shape{rows, count}, DType::i64, device);
  kernels::count_positions(numbers);
  return numbers;
}

// Of the blocks. The rest of a tower is the caller's.
void initialize_blocks(ClipEncoder& encoder, const ClipTowerConfig& config, Generator& generator) {
  const auto C = static_cast<double>(config.width);
  const double into = config.initializer_factor / std::sqrt(C);
  const double deep = into / std::sqrt(2 * static_cast<double>(config.layers));
  for (const NamedParameter& entry : encoder.named_parameters()) {
    const bool output = entry.path.ends_with("out_proj.weight");
    const bool first = entry.path.ends_with("fc1.weight");
    initialize_parameter(entry, output ? into : first ? into / std::sqrt(2.0) : deep, generator);
  }
}

bool is_position_buffer(std::string_view key) {
  return key.ends_with("embeddings.position_ids");
}

}  // namespace

ClipVisionConfig read_clip_vision_config(JsonReader json, const ClipVisionConfig& defaults) {
  ClipVisionConfig config;
  config.tower = read_tower(json, defaults.tower);
  config.channels = json.integer_between(1, kMostWidth, "num_channels", defaults.channels);
  config.image = json.integer_between(1, kMostImageSide, "image_size", defaults.image);
  config.patch = json.integer_between(1, kMostImageSide, "patch_size", defaults.patch);
  if (json.status().ok() && config.image % config.patch != 0) {
    json.refuse("image_size", fmt::format("must be a multiple of patch_size = {}, got {}",
                                          config.patch, config.image));
  }
  return config;
}

ClipTextConfig read_clip_text_config(JsonReader json) {
  ClipTextConfig config;
  config.tower = read_tower(json, config.tower);
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", config.vocabulary);
  config.positions =
      json.integer_between(1, kMostPositions, "max_position_embeddings", config.positions);
  config.end_of_text = json.integer("eos_token_id", config.end_of_text);
  return config;
}

ClipConfig read_clip_config(JsonReader& json) {
  ClipConfig config;
  config.vision = read_clip_vision_config(tower_of(json, "vision_config"));
  config.text = read_clip_text_config(tower_of(json, "text_config"));
  config.projection = json.integer_between(1, kMostWidth, "projection_dim", 512);
  config.logit_scale = json.number("logit_scale_init_value", 2.6592);
  config.initializer_factor = json.number("initializer_factor", 1);
  return config;
}

nlohmann::json write_clip_vision_config(const ClipVisionConfig& config) {
  nlohmann::json json = write_tower(config.tower);
  json["model_type"] = "clip_vision_model";
  json["num_channels"] = config.channels;
  json["image_size"] = config.image;
  json["patch_size"] = config.patch;
  return json;
}

ClipAttention::ClipAttention(const ClipTowerConfig& config, Place place)
    : k_proj(config.width, config.width, {.bias = true}, place),
      v_proj(config.width, config.width, {.bias = true}, place),
      q_proj(config.width, config.width, {.bias = true}, place),
      out_proj(config.width, config.width, {.bias = true}, place),
      heads_(config.heads),
      dropout_(config.attention_dropout) {
  add("k_proj", k_proj);
  add("v_proj", v_proj);
  add("q_proj", q_proj);
  add("out_proj", out_proj);
}

Variable ClipAttention::operator()(Variable x, const AttentionSpec& visible) const {
  const std::int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const Shape heads{B, T, heads_, C / heads_};
  Variable q = reshape(q_proj(x), heads);             // [B, T, H, D]
  Variable k = reshape(k_proj(x), heads);             // [B, T, H, D]
  Variable v = reshape(v_proj(std::move(x)), heads);  // [B, T, H, D]
  AttentionSpec spec = visible;
  spec.scale = 1 / std::sqrt(static_cast<double>(heads[3]));
  spec.dropout = generator() != nullptr ? dropout_ : 0;
  spec.generator = generator();
  Variable a = attention(std::move(q), std::move(k), std::move(v), spec);  // [B, T, H, D]
  return out_proj(reshape(std::move(a), Shape{B, T, C}));                  // [B, T, C]
}

ClipMlp::ClipMlp(const ClipTowerConfig& config, Place place)
    : fc1(config.width, config.inner, {.bias = true}, place),
      fc2(config.inner, config.width, {.bias = true}, place),
      activation_(config.activation) {
  add("fc1", fc1);
  add("fc2", fc2);
}

Variable ClipMlp::operator()(Variable x) const {
  return fc2(activate(activation_, fc1(std::move(x))));  // [B, T, C]
}

ClipBlock::ClipBlock(const ClipTowerConfig& config, Place place)
    : self_attn(config, place),
      layer_norm1(config.width, config.epsilon, place),
      layer_norm2(config.width, config.epsilon, place),
      mlp(config, place) {
  add("self_attn", self_attn);
  add("layer_norm1", layer_norm1);
  add("mlp", mlp);
  add("layer_norm2", layer_norm2);
}

Variable ClipBlock::operator()(Variable x, const AttentionSpec& visible) const {
  Variable a = self_attn(layer_norm1(x), visible);             // [B, T, C]
  Normed n = layer_norm2(std::move(a), std::move(x));          // sum = a + x
  return reprise::add(mlp(std::move(n.y)), std::move(n.sum));  // [B, T, C]
}

ClipEncoder::ClipEncoder(const ClipTowerConfig& config, Place place) {
  add("layers", layers);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    layers.append(config, place);
  }
}

Variable ClipEncoder::operator()(std::string_view name, std::size_t count, Variable x,
                                 const AttentionSpec& visible) const {
  return run_blocks(name, layers, count, std::move(x), [&](const ClipBlock& block, Variable in) {
    return block(std::move(in), visible);
  });
}

ClipVisionEmbeddings::ClipVisionEmbeddings(const ClipVisionConfig& config, Place place)
    : class_embedding("class_embedding", parameter_tensor(Shape{config.tower.width}, place)),
      patch_embedding(
          "patch_embedding.weight",
          parameter_tensor(Shape{config.tower.width, config.channels, config.patch, config.patch},
                           place)),
      position_embedding(1 + config.side() * config.side(), config.tower.width, std::nullopt,
                         place),
      config_(config) {
  add("class_embedding", class_embedding);
  add("patch_embedding.weight", patch_embedding);
  add("position_embedding", position_embedding);
}

Variable ClipVisionEmbeddings::positions(std::int64_t images, std::int64_t height,
                                         std::int64_t width) const {
  const std::int64_t C = config_.tower.width, side = config_.side();
  const Tensor numbers =
      numbered(images, 1 + height * width, position_embedding.weight.value().device());
  if (height == side && width == side) {
    return position_embedding(numbers);  // [images, 1 + P, C]
  }
  const Variable table = position_embedding.weight;                        // [1 + side^2, C]
  Variable grid = slice(table, 0, 1, 1 + side * side);                     // without the class
  grid = reshape(std::move(grid), Shape{side, side, C});                   // [side, side, C]
  grid = resize_bicubic(std::move(grid), height, width);                   // [height, width, C]
  grid = reshape(std::move(grid), Shape{height * width, C});               // [P, C]
  Variable resized = concat({slice(table, 0, 0, 1), std::move(grid)}, 0);  // [1 + P, C]
  return embedding(numbers, std::move(resized));                           // [images, 1 + P, C]
}

Variable ClipVisionEmbeddings::operator()(const Tensor& pixels) const {
  const std::int64_t p = config_.patch, C = config_.tower.width, channels = config_.channels;
  const bool fits = pixels.defined() && pixels.rank() == 4 && pixels.dtype() == DType::f32 &&
                    pixels.size(1) == channels && pixels.size(2) >= p && pixels.size(3) >= p &&
                    pixels.size(2) % p == 0 && pixels.size(3) % p == 0;
  if (!fits) {
    fail("model",
         "pixels must be f32 [images, {}, H, W], H and W multiples of patch_size = {}, "
         "got {}",
         channels, p,
         pixels.defined() ? fmt::format("{} {}", name(pixels.dtype()), to_string(pixels.shape()))
                          : "nothing");
  }
  const std::int64_t images = pixels.size(0), height = pixels.size(2) / p,
                     width = pixels.size(3) / p, P = height * width, fan_in = channels * p * p;
  // A convolution whose stride is its size is a product with the patches as rows.
  Variable x = reshape(pixels, Shape{images, channels, height, p, width, p});
  x = transpose(transpose(transpose(std::move(x), 1, 2), 2, 4), 3, 4);
  x = reshape(contiguous(std::move(x)), Shape{images, P, fan_in});  // [images, P, 3 p p]
  x = cast(std::move(x), patch_embedding.dtype());
  x = linear(std::move(x), reshape(patch_embedding, Shape{C, fan_in}));  // [images, P, C]
  const Tensor zeros = Tensor::zeros(Shape{images, 1}, DType::i64, pixels.device());
  Variable first = embedding(zeros, reshape(class_embedding, Shape{1, C}));  // [images, 1, C]
  x = concat({std::move(first), std::move(x)}, 1);                           // [images, 1 + P, C]
  return reprise::add(std::move(x), positions(images, height, width));
}

ClipVisionTower::ClipVisionTower(const ClipVisionConfig& config, Place place)
    : embeddings(config, place),
      pre_layrnorm(config.tower.width, config.tower.epsilon, place),
      encoder(config.tower, place),
      post_layernorm(config.tower.width, config.tower.epsilon, place),
      config_(config) {
  add("embeddings", embeddings);
  add("pre_layrnorm", pre_layrnorm);
  add("encoder", encoder);
  add("post_layernorm", post_layernorm);
}

Variable ClipVisionTower::hidden_state(const Tensor& pixels, std::int64_t index) const {
  const std::int64_t states = config_.tower.layers + 1;
  if (index < -states || index >= states) {
    fail("model", "the number of a hidden state must be from {} to {}, got {}", -states, states - 1,
         index);
  }
  const auto count = static_cast<std::size_t>(index < 0 ? states + index : index);
  Variable x = pre_layrnorm(embeddings(pixels));             // [images, 1 + P, C]
  return encoder("vision.layers", count, std::move(x), {});  // [images, 1 + P, C]
}

Variable ClipVisionTower::patches(const Tensor& pixels, std::int64_t index) const {
  Variable x = hidden_state(pixels, index);  // [images, 1 + P, C]
  const std::int64_t tokens = x.size(1);
  return contiguous(slice(std::move(x), 1, 1, tokens));  // [images, P, C]
}

Variable ClipVisionTower::pooled(const Variable& last) const {
  const Shape rows{last.size(0), last.size(2)};
  return post_layernorm(reshape(contiguous(slice(last, 1, 0, 1)), rows));  // [images, C]
}

void ClipVisionTower::initialize(Generator& generator) {
  const ClipTowerConfig& tower = config_.tower;
  const double deviation = tower.initializer_range * tower.initializer_factor;
  fill_normal(embeddings.class_embedding.write(),
              tower.initializer_factor / std::sqrt(static_cast<double>(tower.width)), generator);
  fill_normal(embeddings.patch_embedding.write(), deviation, generator);
  fill_normal(embeddings.position_embedding.weight.write(), deviation, generator);
  initialize_blocks(encoder, tower, generator);
  for (LayerNorm* norm : {&pre_layrnorm, &post_layernorm}) {
    for (const NamedParameter& entry : norm->named_parameters()) {
      initialize_parameter({"." + entry.path, entry.parameter, false}, 0, generator);
    }
  }
}

ClipTextEmbeddings::ClipTextEmbeddings(const ClipTextConfig& config, Place place)
    : token_embedding(config.vocabulary, config.tower.width, std::nullopt, place),
      position_embedding(config.positions, config.tower.width, std::nullopt, place) {
  add("token_embedding", token_embedding);
  add("position_embedding", position_embedding);
}

Variable ClipTextEmbeddings::operator()(const Tensor& ids, const Tensor& positions) const {
  return reprise::add(token_embedding(ids), position_embedding(positions));  // [B, T, C]
}

ClipTextTower::ClipTextTower(const ClipTextConfig& config, Place place)
    : embeddings(config, place),
      encoder(config.tower, place),
      final_layer_norm(config.tower.width, config.tower.epsilon, place),
      config_(config) {
  add("embeddings", embeddings);
  add("encoder", encoder);
  add("final_layer_norm", final_layer_norm);
}

void ClipTextTower::check(const Batch& batch) const {
  const auto expect = [](std::string_view argument, const Tensor& tensor, bool fits) {
    if (!fits) {
      fail("model", "{} must be i64 [B, T], got {}", argument,
           tensor.defined() ? fmt::format("{} {}", name(tensor.dtype()), to_string(tensor.shape()))
                            : "nothing");
    }
  };
  const Tensor& ids = batch.ids;
  expect("ids", ids, ids.defined() && ids.rank() == 2 && ids.dtype() == DType::i64);
  for (const auto& [argument, tensor] :
       {std::pair("mask", &batch.mask), std::pair("positions", &batch.positions)}) {
    expect(argument, *tensor,
           !tensor->defined() || (tensor->dtype() == DType::i64 && tensor->shape() == ids.shape()));
  }
  if (!batch.starts.empty()) {
    fail("model", "starts must be absent: a text is a row");
  }
  if (ids.size(1) > config_.positions) {
    fail("model", "a text may have {} tokens, got {}", config_.positions, ids.size(1));
  }
}

// Where each text ends, as rows of [B T].
Tensor ClipTextTower::ends(const Tensor& ids) const {
  const std::int64_t B = ids.size(0), T = ids.size(1);
  const std::vector<std::int64_t> all = ids.to_vector<std::int64_t>();
  std::vector<std::int64_t> rows;
  for (std::int64_t b = 0; b < B; ++b) {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(b * T);
    const auto end = begin + static_cast<std::ptrdiff_t>(T);
    const auto at = config_.end_of_text == kMistakenEnd
                        ? std::max_element(begin, end)  // the first of them
                        : std::find(begin, end, config_.end_of_text);
    if (at == end) {
      fail("model", "row {} of ids has no end of text, id {}", b, config_.end_of_text);
    }
    rows.push_back(at - all.begin());
  }
  return Tensor::from(rows, Shape{B}, ids.device());
}

Variable ClipTextTower::pooled(const Batch& batch) const {
  check(batch);
  const Tensor at = ends(batch.ids);
  const Tensor positions = batch.positions.defined()
                               ? batch.positions
                               : numbered(batch.ids.size(0), batch.ids.size(1), batch.ids.device());
  Variable x = embeddings(batch.ids, positions);  // [B, T, C]
  x = encoder("text.layers", encoder.layers.size(), std::move(x),
              {.causal = true, .mask = batch.mask});     // [B, T, C]
  return final_layer_norm(take_rows(std::move(x), at));  // [B, C]
}

void ClipTextTower::initialize(Generator& generator) {
  const double deviation = 0.02 * config_.tower.initializer_factor;
  fill_normal(embeddings.token_embedding.weight.write(), deviation, generator);
  fill_normal(embeddings.position_embedding.weight.write(), deviation, generator);
  initialize_blocks(encoder, config_.tower, generator);
  for (const NamedParameter& entry : final_layer_norm.named_parameters()) {
    initialize_parameter({"." + entry.path, entry.parameter, false}, 0, generator);
  }
}

Clip::Clip(const ClipConfig& config, Place place)
    : logit_scale("logit_scale", parameter_tensor(Shape{}, place)),
      text_model(config.text, place),
      vision_model(config.vision, place),
      visual_projection(config.vision.tower.width, config.projection, {}, place),
      text_projection(config.text.tower.width, config.projection, {}, place),
      config_(config) {
  add("logit_scale", logit_scale);
  add("text_model", text_model);
  add("vision_model", vision_model);
  add("visual_projection", visual_projection);
  add("text_projection", text_projection);
  name_parameters();
}

Variable Clip::image_embeds(const Batch& batch) const {
  Variable pooled = vision_model.pooled(vision_model.hidden_state(batch.pixels, -1));
  return l2_normalize(visual_projection(std::move(pooled)));  // [images, E]
}

Variable Clip::text_embeds(const Batch& batch) const {
  return l2_normalize(text_projection(text_model.pooled(batch)));  // [B, E]
}

Variable Clip::logits_per_text(Variable texts, Variable images) const {
  Variable cosines = matmul(std::move(texts), std::move(images), {.transpose_b = true});
  return reprise::scale(std::move(cosines), exp(logit_scale));  // [B, images]
}

bool Clip::has_loss(const Batch& batch) const {
  return batch.ids.defined() && batch.pixels.defined();
}

Variable Clip::loss(const Batch& batch, const LossOptions& options) {
  if (!has_loss(batch)) {
    fail("loss", "the batch must have ids and pixels");
  }
  if (options.items && !(*options.items > 0)) {
    fail("loss", "items must be above 0, got {}", *options.items);
  }
  if (batch.ids.size(0) != batch.pixels.size(0)) {
    fail("loss", "there must be a text for each of the {} images, got {}", batch.pixels.size(0),
         batch.ids.size(0));
  }
  Variable images = image_embeds(batch);
  Variable by_text = logits_per_text(text_embeds(batch), std::move(images));  // [B, B]
  Variable by_image = contiguous(transpose(by_text, 0, 1));                   // [B, B]
  std::vector<std::int64_t> own(static_cast<std::size_t>(batch.ids.size(0)));
  std::iota(own.begin(), own.end(), 0);
  const Tensor labels = Tensor::from(own, Shape{batch.ids.size(0)}, batch.ids.device());
  const double items = options.items.value_or(0);
  Variable both = reprise::add(cross_entropy(std::move(by_text), labels, items),
                               cross_entropy(std::move(by_image), labels, items));
  return reprise::scale(std::move(both), 0.5);
}

std::vector<NamedOutput> Clip::outputs(const Batch& batch) {
  std::vector<NamedOutput> result;
  Variable images, texts;
  if (batch.pixels.defined()) {
    images = image_embeds(batch);
    result.push_back({"image_embeds", images});
  }
  if (batch.ids.defined()) {
    texts = text_embeds(batch);
    result.push_back({"text_embeds", texts});
  }
  if (images.defined() && texts.defined()) {
    Variable logits = logits_per_text(std::move(texts), std::move(images));
    result.push_back({"logits_per_image", contiguous(transpose(logits, 0, 1))});
    result.push_back({"logits_per_text", std::move(logits)});
  }
  return result;
}

void Clip::initialize(Generator& generator) {
  text_model.initialize(generator);
  vision_model.initialize(generator);
  for (Linear* projection : {&visual_projection, &text_projection}) {
    fill_normal(projection->weight.write(),
                config_.initializer_factor / std::sqrt(static_cast<double>(projection->in())),
                generator);
  }
  const Tensor scale = logit_scale.write();
  if (!scale.is_meta()) {
    scale.copy_from(Tensor::full(Shape{}, scale.dtype(), config_.logit_scale, scale.device()));
  }
}

bool Clip::is_buffer(std::string_view key) const {
  return is_position_buffer(key);
}

std::string Clip::write_config() const {
  nlohmann::json text = write_tower(config_.text.tower);
  text["model_type"] = "clip_text_model";
  text["vocab_size"] = config_.text.vocabulary;
  text["max_position_embeddings"] = config_.text.positions;
  text["eos_token_id"] = config_.text.end_of_text;
  const nlohmann::json json = {{"model_type", "clip"},
                               {"architectures", {"CLIPModel"}},
                               {"text_config", text},
                               {"vision_config", write_clip_vision_config(config_.vision)},
                               {"projection_dim", config_.projection},
                               {"logit_scale_init_value", config_.logit_scale},
                               {"initializer_factor", config_.initializer_factor}};
  return json.dump(2) + "\n";
}

ClipVision::ClipVision(const ClipVisionConfig& config, Place place) : vision_model(config, place) {
  add("embeddings", vision_model.embeddings);
  add("pre_layrnorm", vision_model.pre_layrnorm);
  add("encoder", vision_model.encoder);
  add("post_layernorm", vision_model.post_layernorm);
  name_parameters();
}

std::vector<FileKey> ClipVision::file_keys(const std::string& path) const {
  return {{"vision_model." + path}, {path}};
}

Variable ClipVision::loss(const Batch& batch, const LossOptions& options) {
  if (options.items) {
    fail("loss", "items must be absent: there are no labels to divide by");
  }
  return mean_square(vision_model.patches(batch.pixels, -2));
}

std::vector<NamedOutput> ClipVision::outputs(const Batch& batch) {
  return {{"hidden", vision_model.hidden_state(batch.pixels, -1)}};
}

bool ClipVision::is_buffer(std::string_view key) const {
  return is_position_buffer(key);
}

std::string ClipVision::write_config() const {
  nlohmann::json json = write_clip_vision_config(vision_model.config());
  json["architectures"] = {"CLIPVisionModel"};
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

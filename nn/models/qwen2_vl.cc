#include "nn/models/qwen2_vl.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include <fmt/format.h>

#include "autograd/rows.h"
#include "core/error.h"
#include "nn/models/attend.h"

namespace reprise::nn {
namespace {

std::vector<std::int64_t> read_sections(JsonReader& text, std::int64_t rotated) {
  JsonReader rope = text.object(text.has("rope_parameters") ? "rope_parameters" : "rope_scaling");
  const std::vector<std::int64_t> sections =
      rope.integers("mrope_section", std::vector<std::int64_t>{16, 24, 24});
  const bool positive = std::ranges::all_of(
      sections, [&](std::int64_t size) { return size >= 0 && size <= rotated; });
  const bool fit =
      sections.size() == 3 && positive &&
      std::accumulate(sections.begin(), sections.end(), std::int64_t{0}) == rotated / 2;
  if (text.status().ok() && !fit) {
    rope.refuse("mrope_section", fmt::format("must be three sizes that add up to half of a head's "
                                             "{} elements, got [{}]",
                                             rotated, fmt::join(sections, ", ")));
  }
  return sections;
}

}  // namespace

Qwen2VlConfig read_qwen2_vl_config(JsonReader& json) {
  Qwen2VlConfig config;
  JsonReader text = json.has("text_config") ? json.object("text_config") : json;
  config.text = read_llama_config(text, "qwen2_vl");
  // Beside text_config in files of today, in it in some older ones.
  config.text.tied = config.text.tied || json.boolean("tie_word_embeddings", false);
  config.sections = read_sections(text, config.text.rope.dim);
  JsonReader vision = json.object("vision_config");
  config.vision = read_qwen2_vl_vision_config(vision);
  if (json.status().ok() && config.vision.out != config.text.width) {
    vision.refuse("hidden_size", fmt::format("must be the decoder's hidden_size = {}, got {}",
                                             config.text.width, config.vision.out));
  }
  config.image_token = json.integer("image_token_id", 151655);
  config.video_token = json.integer("video_token_id", 151656);
  config.vision_start_token = json.integer("vision_start_token_id", 151652);
  config.vision_end_token = json.integer("vision_end_token_id", 151653);
  for (const auto& [key, id] : {std::pair("image_token_id", config.image_token),
                                std::pair("video_token_id", config.video_token)}) {
    if (json.status().ok() && (id < 0 || id >= config.text.vocabulary)) {
      json.refuse(key, fmt::format("must be from 0 to below vocab_size = {}, got {}",
                                   config.text.vocabulary, id));
    }
  }
  return config;
}

Qwen2VlTrunk::Qwen2VlTrunk(const Qwen2VlConfig& config, Place place)
    : visual(config.vision, place), language_model(config.text, place) {
  add("visual", visual);
  add("language_model", language_model);
}

Qwen2Vl::Qwen2Vl(const Qwen2VlConfig& config, Place place) : model(config, place), config_(config) {
  add("model", model);
  if (!config.text.tied) {
    lm_head.emplace(config.text.width, config.text.vocabulary, LinearOptions{}, place);
    add("lm_head", *lm_head);
  }
  name_parameters();
}

Variable Qwen2Vl::hidden(const Batch& batch) {
  check(batch);
  if (batch.image_tokens.defined()) {
    fail("model", "image_tokens must be absent: {} knows them by their ids", type());
  }
  const std::vector<Qwen2VlGrid> grids = grids_of(batch);
  const Device device = embedding_table().value().device();
  const Rotation rotation =
      rotation_of(config_.text.rope, positions(batch), device, {.sections = config_.sections});
  Variable x = model.language_model.embed_tokens(batch.ids);  // [B, T, C]
  if (batch.pixels.defined()) {
    Variable images = model.visual(batch.pixels, grids);                // [M, C]
    x = put_rows(std::move(x), vision_rows(batch), std::move(images));  // [B, T, C]
  }
  return model.language_model(std::move(x), visible_of(batch), rotation);
}

Tensor Qwen2Vl::vision_rows(const Batch& batch) const {
  std::vector<std::int64_t> rows;
  const std::vector<std::int64_t> ids = batch.ids.to_vector<std::int64_t>();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (is_vision(ids[i])) {
      rows.push_back(static_cast<std::int64_t>(i));
    }
  }
  return Tensor::from(rows, Shape{static_cast<std::int64_t>(rows.size())}, batch.ids.device());
}

std::vector<Qwen2VlGrid> Qwen2Vl::grids_of(const Batch& batch) const {
  const std::int64_t tokens = batch.ids.numel() == 0 ? 0 : vision_rows(batch).numel();
  if (!batch.pixels.defined() && !batch.grids.defined()) {
    if (tokens > 0) {
      fail("model", "ids hold {} image tokens, but the batch has no images", tokens);
    }
    return {};
  }
  std::vector<Qwen2VlGrid> grids = qwen2_vl_grids(config_.vision, batch.pixels, batch.grids);
  const std::int64_t features =
      batch.pixels.size(0) / (config_.vision.merge * config_.vision.merge);
  if (features != tokens) {
    fail("model", "{} images have {} features, but ids hold {} image tokens", grids.size(),
         features, tokens);
  }
  return grids;
}

Tensor Qwen2Vl::positions(const Batch& batch) const {
  if (batch.positions.defined() && batch.positions.rank() == 3) {
    return batch.positions;
  }
  const std::int64_t B = batch.ids.size(0), T = batch.ids.size(1);
  if (batch.ids.numel() == 0) {
    return Tensor::empty(Shape{3, B, T}, DType::i64, batch.ids.device());
  }
  std::vector<std::int64_t> numbers;
  if (batch.positions.defined()) {
    const std::vector<std::int64_t> given = batch.positions.to_vector<std::int64_t>();
    for (int row = 0; row < 3; ++row) {
      numbers.insert(numbers.end(), given.begin(), given.end());
    }
  } else {
    numbers = counted_positions(batch);
  }
  return Tensor::from(numbers, Shape{3, B, T}, batch.ids.device());
}

std::vector<std::int64_t> Qwen2Vl::counted_positions(const Batch& batch) const {
  const std::int64_t B = batch.ids.size(0), T = batch.ids.size(1), m = config_.vision.merge;
  const std::vector<std::int64_t> ids = batch.ids.to_vector<std::int64_t>();
  const std::vector<std::int64_t> mask =
      batch.mask.defined() ? batch.mask.to_vector<std::int64_t>() : std::vector<std::int64_t>{};
  const std::vector<Qwen2VlGrid> grids = grids_of(batch);
  const auto starts_text = [&](std::int64_t b, std::int64_t t) {
    return t == 0 || (!batch.starts.empty() &&
                      std::ranges::binary_search(batch.starts[static_cast<std::size_t>(b)], t));
  };
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(3 * B * T), 0);
  const auto put = [&](std::size_t at, std::int64_t time, std::int64_t row, std::int64_t column) {
    numbers[at] = time;
    numbers[at + ids.size()] = row;
    numbers[at + 2 * ids.size()] = column;
  };
  std::size_t image = 0;  // the one that is being read, or the next
  std::int64_t read = 0;  // its tokens so far
  std::int64_t next = 0;  // the position of the next token of text
  for (std::int64_t i = 0; i < B * T; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const bool starts = starts_text(i / T, i % T), vision = is_vision(ids[at]);
    const bool padding = !mask.empty() && mask[at] == 0;
    if (vision && padding) {
      fail("model", "image tokens must not be padding, as is token {} of row {}", i % T, i / T);
    }
    if (read > 0 && (starts || !vision)) {
      fail("model", "the {} tokens of image {} must follow each other in one text, but only {} do",
           grids[image].patches() / (m * m), image, read);
    }
    next = starts ? 0 : next;
    if (vision) {
      const std::int64_t h = grids[image].h / m, w = grids[image].w / m;
      put(at, next + read / (h * w), next + read / w % h, next + read % w);
      if (++read == grids[image].t * h * w) {
        next += std::max({grids[image].t, h, w});
        read = 0;
        ++image;
      }
    } else if (!padding) {
      put(at, next, next, next);
      ++next;
    }
  }
  return numbers;
}

void Qwen2Vl::initialize(Generator& generator) {
  for (const NamedParameter& entry : named_parameters()) {
    const bool visual = entry.path.starts_with("model.visual.");
    initialize_parameter(entry,
                         visual ? config_.vision.initializer_range : config_.text.initializer_range,
                         generator);
  }
  if (config_.text.padding) {
    const std::int64_t row = *config_.text.padding;
    embedding_table().write().slice(0, row, row + 1).zero();
  }
}

std::vector<FileKey> Qwen2Vl::file_keys(const std::string& path) const {
  for (const auto& [ours, published] :
       {std::pair<std::string_view, std::string>("model.visual.", "visual."),
        std::pair<std::string_view, std::string>("model.language_model.", "model.")}) {
    if (path.starts_with(ours)) {
      return {{published + path.substr(ours.size())}, {path}};
    }
  }
  return {{path}};
}

bool Qwen2Vl::is_buffer(std::string_view key) const {
  return key.ends_with("rotary_emb.inv_freq") || key.ends_with("rotary_pos_emb.inv_freq");
}

std::string Qwen2Vl::write_config() const {
  nlohmann::json json = llama_json(config_.text);
  json.erase("head_dim");  // not an option of this model
  if (json["rope_scaling"].is_null()) {
    json["rope_scaling"] = {{"type", "mrope"}};
  }
  json["rope_scaling"]["mrope_section"] = config_.sections;
  json["model_type"] = "qwen2_vl";
  json["architectures"] = {"Qwen2VLForConditionalGeneration"};
  json["vision_config"] = qwen2_vl_vision_json(config_.vision);
  json["image_token_id"] = config_.image_token;
  json["video_token_id"] = config_.video_token;
  json["vision_start_token_id"] = config_.vision_start_token;
  json["vision_end_token_id"] = config_.vision_end_token;
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn

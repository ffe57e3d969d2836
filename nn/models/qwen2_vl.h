// Qwen2-VL. Wang et al., "Qwen2-VL: enhancing vision-language model's perception of the world at
// any resolution", 2024: the decoder of Qwen2, into whose rows of tokens the vision tower puts
// images, and positions of three numbers (time, row, column), a third of the frequencies each.
//
//   Batch batch{.ids = ids, .labels = labels, .pixels = pixels, .grids = grids};
//   backward(model.loss(batch));
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "nn/models/language_model.h"
#include "nn/models/llama.h"
#include "nn/models/qwen2_vl_vision.h"

namespace reprise::nn {

struct Qwen2VlConfig {
  LlamaConfig text;                          // keys of text_config, or beside the others
  Qwen2VlVisionConfig vision;                // vision_config
  std::vector<std::int64_t> sections;        // rope_scaling.mrope_section: D / 2 in three parts
  std::int64_t image_token = 151655;         // image_token_id
  std::int64_t video_token = 151656;         // video_token_id
  std::int64_t vision_start_token = 151652;  // vision_start_token_id
  std::int64_t vision_end_token = 151653;    // vision_end_token_id
};

// Problems are noted in `json`, which holds the whole file.
Qwen2VlConfig read_qwen2_vl_config(JsonReader& json);

class Qwen2VlTrunk : public Module {
 public:
  Qwen2VlTrunk(const Qwen2VlConfig& config, Place place);

  Qwen2VlVision visual;
  LlamaTrunk language_model;
};

class Qwen2Vl : public LanguageModel {
 public:
  Qwen2Vl(const Qwen2VlConfig& config, Place place);

  // A batch without pixels is text alone. Images and videos, in the order of their tokens row by
  // row, fill all tokens of ids that are image_token or video_token; throws Error when they are
  // not as many, or when the batch does not fit the model.
  Variable hidden(const Batch& batch) override;
  // i64 [3, B, T], those of the batch or as the model counts: a text on, one by one, in all three;
  // an image's tokens at (time, row, column) from where the text was; the text after it on from
  // the largest number so far plus 1. Anew in each text of a row; padding is not counted, and is 0.
  Tensor positions(const Batch& batch) const;

  void initialize(Generator& generator) override;
  std::string_view type() const override { return "qwen2_vl"; }
  std::int64_t vocabulary() const override { return config_.text.vocabulary; }
  std::int64_t max_positions() const override { return config_.text.positions; }
  Linear* head() override { return lm_head ? &*lm_head : nullptr; }
  Parameter& embedding_table() override { return model.language_model.embed_tokens.weight; }
  std::string_view trunk_prefix() const override { return "model."; }
  // Published files call the parts visual and model; newer code, and so the paths here,
  // model.visual and model.language_model. Written are the names of the published files.
  std::vector<FileKey> file_keys(const std::string& path) const override;
  bool is_buffer(std::string_view key) const override;
  const Qwen2VlConfig& config() const { return config_; }

  Qwen2VlTrunk model;
  std::optional<Linear> lm_head;  // unless tied

 protected:
  bool takes_images() const override { return true; }
  std::int64_t numbers_a_position() const override { return 3; }

 private:
  std::string write_config() const override;
  bool is_vision(std::int64_t id) const {
    return id == config_.image_token || id == config_.video_token;
  }
  // The rows of [B T] that hold image tokens: i64 [M].
  Tensor vision_rows(const Batch& batch) const;
  // Of images that have as many features as there are image tokens.
  std::vector<Qwen2VlGrid> grids_of(const Batch& batch) const;
  // What positions() counts: [3 B T].
  std::vector<std::int64_t> counted_positions(const Batch& batch) const;

  Qwen2VlConfig config_;
};

}  // namespace reprise::nn

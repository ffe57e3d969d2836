// InternLM-XComposer2. Dong et al., "InternLM-XComposer2: mastering free-form text-image
// composition and comprehension in vision-language large model", 2024; "..-4KHD", 2024; "..-2.5",
// 2024: InternLM2 that reads images. A CLIP tower and a projector make tokens of an image; the five
// linear layers of each block add a low-rank part at those tokens only (partial LoRA, part of the
// base model: adapters of nn/lora.h go around it and act on all tokens).
//
// 2 reads one square image. 4KHD and 2.5 read tiles: a view of the whole image, then the image cut
// into h x w squares of the same size, row by row. Each 2 x 2 patches become one token; a learned
// separator ends each row of tokens, another stands between the view and the tiles:
//   view | sub ..  glb  tiles | sub ..        ((h w + 1) s^2 + 1 + (h + 1) s tokens, s a side)
//
// A batch has f32 pixels [views, 3, S, S] of all images one after the other, and image_tokens; with
// tiles also grids i64 [images, 3] = (1, h, w), and 1 + h w views an image. Images fill the image
// tokens of the rows in order.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "nn/models/clip.h"
#include "nn/models/internlm2.h"
#include "nn/models/language_model.h"

namespace reprise::nn {

// Of one linear layer. y += scale B(A(dropout(x))) at image tokens.
struct PloraConfig {
  std::int64_t rank = 256;
  double scale = 1;
};

struct XComposer2Config {
  InternLm2Config decoder;
  // Published configs do not describe the tower: it is CLIP L/14 of another size.
  ClipVisionConfig vision;
  bool tiles = false;
  // The files say neither rank nor scale. The rank is that of the weights; 4KHD's wqkv alone has
  // its class' own rank 8 and, so, scale 2.
  PloraConfig plora, plora_qkv;
  double plora_dropout = 0.05;
};

// What the file does not say is taken from the weights where it comes with some
// (JsonReader::stored_shape), else from the published models: img_size is 2's, a context of 24576
// tokens 2.5's, what is left 4KHD's.
XComposer2Config read_xcomposer2_config(JsonReader& json);

// A linear layer with a low-rank part at image tokens. A and B are no modules: an adapter for all
// linear layers goes on the layer, not on its parts.
class PloraLinear : public InternLm2Linear {
 public:
  PloraLinear(std::int64_t in, std::int64_t out, LinearOptions options, const PloraConfig& plora,
              double dropout, Place place);
  Variable operator()(Variable x, const Variable& images) const override;

  Parameter plora_a, plora_b;

 private:
  // y with the part of x [M, in], the image tokens.
  Variable with_part(Variable y, Variable x, const Variable& images) const;

  double scale_, dropout_;
};

class XComposer2Projector : public Module {
 public:
  XComposer2Projector(std::int64_t in, std::int64_t width, Place place);
  Variable operator()(Variable x) const;

  Linear first, second;
};

class XComposer2 : public LanguageModel {
 public:
  XComposer2(const XComposer2Config& config, Place place);

  Variable hidden(const Batch& batch) override;
  // The tokens of all images of the batch, [M, C].
  Variable image_features(const Batch& batch) const;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return "internlmxcomposer2"; }
  std::int64_t vocabulary() const override { return config_.decoder.vocabulary; }
  std::int64_t max_positions() const override { return config_.decoder.positions; }
  Linear* head() override { return output ? &*output : nullptr; }
  Parameter& embedding_table() override { return model.tok_embeddings.weight; }
  bool is_buffer(std::string_view key) const override;
  const XComposer2Config& config() const { return config_; }

  InternLm2Trunk model;
  std::optional<Linear> output;  // unless tied
  ClipVisionTower vit;
  XComposer2Projector vision_proj;
  Parameter plora_glb_GN, plora_sub_GN;  // [1, 1, 4 C_vision], [1, 1, 1, 4 C_vision]; with tiles

 protected:
  bool takes_images() const override { return true; }

 private:
  Variable assembled(Variable patches, std::int64_t height, std::int64_t width,
                     const Tensor& grids) const;
  std::string write_config() const override;

  XComposer2Config config_;
};

// Views of an image f32 [3, h S, w S], already normalised: [1 + h w, 3, S, S], the whole of it
// resized (bicubic, without antialiasing), then its tiles.
Tensor xcomposer2_views(const Tensor& image, std::int64_t side);

}  // namespace reprise::nn

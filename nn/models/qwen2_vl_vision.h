// The vision tower of Qwen2-VL. Wang et al., "Qwen2-VL: enhancing vision-language model's
// perception of the world at any resolution", 2024: images of any size as patches, rotary positions
// of row and column, attention inside of a frame, and 2 x 2 neighbours merged into one token at the
// end.
//
// An image is a grid (t, h, w) of t pairs of frames (a still image is 1) and h x w patches, which
// come in blocks of m x m: by t, then rows and columns of blocks, then row and column in a block.
#pragma once

#include <cstdint>
#include <vector>

#include "nn/linear.h"
#include "nn/models/activation.h"
#include "nn/models/rotation.h"
#include "nn/module.h"
#include "nn/norm.h"
#include "nn/weights/json.h"

namespace reprise::nn {

struct Qwen2VlVisionConfig {
  std::int64_t layers = 32;                        //     depth
  std::int64_t width = 1280;                       // E   embed_dim
  std::int64_t heads = 16;                         // H   num_heads
  std::int64_t inner = 5120;                       // F   E mlp_ratio
  Activation activation = Activation::quick_gelu;  //     hidden_act
  std::int64_t channels = 3;                       //     in_channels
  std::int64_t patch = 14;                         // p   patch_size
  std::int64_t frames = 2;                         //     temporal_patch_size
  std::int64_t merge = 2;                          // m   spatial_merge_size
  std::int64_t out = 3584;                         // C   hidden_size: width of the decoder
  double theta = 10000;                            //     rope_parameters.rope_theta
  double initializer_range = 0.02;

  std::int64_t pixels() const { return channels * frames * patch * patch; }  // of a patch
};

// Of the object "vision_config". Problems are noted in `json`.
Qwen2VlVisionConfig read_qwen2_vl_vision_config(JsonReader& json);
nlohmann::json qwen2_vl_vision_json(const Qwen2VlVisionConfig& config);

// The images of a batch.
struct Qwen2VlGrid {
  std::int64_t t, h, w;
  std::int64_t patches() const { return t * h * w; }
};
// Checks pixels (floating [P, pixels()]) and grids (i64 [images, 3]) against the config and each
// other. Throws Error.
std::vector<Qwen2VlGrid> qwen2_vl_grids(const Qwen2VlVisionConfig& config, const Tensor& pixels,
                                        const Tensor& grids);

// A convolution over patches that do not overlap: a product with each.
class Qwen2VlPatchProjection : public Module {
 public:
  Qwen2VlPatchProjection(const Qwen2VlVisionConfig& config, Place place);
  Variable operator()(Variable x) const;

  Parameter weight;  // [E, channels, frames, p, p]
};

class Qwen2VlPatchEmbed : public Module {
 public:
  Qwen2VlPatchEmbed(const Qwen2VlVisionConfig& config, Place place);

  Qwen2VlPatchProjection proj;
};

class Qwen2VlVisionAttention : public Module {
 public:
  Qwen2VlVisionAttention(const Qwen2VlVisionConfig& config, Place place);
  // x [1, P, E]; frames i64 [1, P]: the number of each patch's frame.
  Variable operator()(Variable x, const Tensor& frames, const Rotation& rotation) const;

  Linear qkv, proj;

 private:
  std::int64_t heads_;
};

class Qwen2VlVisionMlp : public Module {
 public:
  Qwen2VlVisionMlp(const Qwen2VlVisionConfig& config, Place place);
  Variable operator()(Variable x) const;

  Linear fc1, fc2;

 private:
  Activation activation_;
};

class Qwen2VlVisionBlock : public Module {
 public:
  Qwen2VlVisionBlock(const Qwen2VlVisionConfig& config, Place place);
  Variable operator()(Variable x, const Tensor& frames, const Rotation& rotation) const;

  LayerNorm norm1, norm2;
  Qwen2VlVisionAttention attn;
  Qwen2VlVisionMlp mlp;
};

class Qwen2VlMerger : public Module {
 public:
  Qwen2VlMerger(const Qwen2VlVisionConfig& config, Place place);
  // [1, P, E] -> [P / m^2, C].
  Variable operator()(Variable x) const;

  LayerNorm ln_q;
  // "mlp.0" and "mlp.2"; the gelu between them is mlp.1.
  Linear first, second;

 private:
  class Pair : public Module {
   public:
    Pair(Linear& first, Linear& second);
  };
  Pair mlp_;
  std::int64_t merged_;
};

class Qwen2VlVision : public Module {
 public:
  Qwen2VlVision(const Qwen2VlVisionConfig& config, Place place);
  // pixels [P, pixels()] -> [P / m^2, C]: the images one after the other, each row by row.
  Variable operator()(const Tensor& pixels, const std::vector<Qwen2VlGrid>& grids) const;

  Qwen2VlPatchEmbed patch_embed;
  ModuleList<Qwen2VlVisionBlock> blocks;
  Qwen2VlMerger merger;

 private:
  // Rows and columns: i64 [2, P].
  Tensor positions(const std::vector<Qwen2VlGrid>& grids, Device device) const;

  Qwen2VlVisionConfig config_;
};

}  // namespace reprise::nn

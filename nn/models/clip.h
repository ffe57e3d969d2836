// CLIP. Radford et al., "Learning transferable visual models from natural language supervision",
// 2021: a tower for images and one for texts, trained so that an image and its text have embeddings
// of the same direction.
//
// The towers are blocks of one kind: pre-norm, biases everywhere, learned positions. Images are f32
// [images, 3, H, W], already normalised; a side may be any multiple of the patch, the table of
// positions is then resized.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/attention.h"
#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/models/activation.h"
#include "nn/models/model.h"
#include "nn/norm.h"

namespace reprise::nn {

// What both towers have.
struct ClipTowerConfig {
  std::int64_t width = 768;                        // C   hidden_size; 512 for texts
  std::int64_t inner = 3072;                       // F   intermediate_size; 2048 for texts
  std::int64_t layers = 12;                        // L   num_hidden_layers
  std::int64_t heads = 12;                         // H   num_attention_heads; 8 for texts
  Activation activation = Activation::quick_gelu;  //     hidden_act
  double epsilon = 1e-5;                           //     layer_norm_eps
  double attention_dropout = 0;                    //     attention_dropout
  double initializer_range = 0.02, initializer_factor = 1;
};
struct ClipVisionConfig {
  ClipTowerConfig tower;
  std::int64_t channels = 3;  // num_channels
  std::int64_t image = 224;   // image_size: that of the table of positions
  std::int64_t patch = 32;    // patch_size
  std::int64_t side() const { return image / patch; }
};
struct ClipTextConfig {
  ClipTowerConfig tower{.width = 512, .inner = 2048, .heads = 8};
  std::int64_t vocabulary = 49408;  // V   vocab_size
  std::int64_t positions = 77;      //     max_position_embeddings
  // The text's embedding is taken at its first token of this id; with 2, which older files have by
  // mistake, at the first token of the largest id.
  std::int64_t end_of_text = 49407;  //     eos_token_id
};
struct ClipConfig {
  ClipVisionConfig vision;
  ClipTextConfig text;
  std::int64_t projection = 512;  // E   projection_dim
  double logit_scale = 2.6592;    //     logit_scale_init_value
  double initializer_factor = 1;
};

// Problems are noted in `json`.
ClipVisionConfig read_clip_vision_config(JsonReader json, const ClipVisionConfig& defaults = {});
ClipTextConfig read_clip_text_config(JsonReader json);
// Both from one file. Where older files have vision_config_dict or text_config_dict, that counts
// and the class defaults for what it lacks: nothing of vision_config or text_config does.
ClipConfig read_clip_config(JsonReader& json);

nlohmann::json write_clip_vision_config(const ClipVisionConfig& config);

class ClipAttention : public Module {
 public:
  ClipAttention(const ClipTowerConfig& config, Place place);
  // `visible`: causality and the mask; the rest is the layer's own.
  Variable operator()(Variable x, const AttentionSpec& visible) const;

  Linear k_proj, v_proj, q_proj, out_proj;

 private:
  std::int64_t heads_;
  double dropout_;
};

class ClipMlp : public Module {
 public:
  ClipMlp(const ClipTowerConfig& config, Place place);
  Variable operator()(Variable x) const;

  Linear fc1, fc2;

 private:
  Activation activation_;
};

class ClipBlock : public Module {
 public:
  ClipBlock(const ClipTowerConfig& config, Place place);
  Variable operator()(Variable x, const AttentionSpec& visible) const;

  ClipAttention self_attn;
  LayerNorm layer_norm1, layer_norm2;
  ClipMlp mlp;
};

class ClipEncoder : public Module {
 public:
  ClipEncoder(const ClipTowerConfig& config, Place place);
  // The first `count` blocks, as segments NAME.0, NAME.1, ...
  Variable operator()(std::string_view name, std::size_t count, Variable x,
                      const AttentionSpec& visible) const;

  ModuleList<ClipBlock> layers;
};

class ClipVisionEmbeddings : public Module {
 public:
  ClipVisionEmbeddings(const ClipVisionConfig& config, Place place);
  // [images, 3, H, W] -> [images, 1 + P, C]: the class, then the patches row by row.
  Variable operator()(const Tensor& pixels) const;

  Parameter class_embedding, patch_embedding;
  Embedding position_embedding;

 private:
  Variable positions(std::int64_t images, std::int64_t height, std::int64_t width) const;

  ClipVisionConfig config_;
};

class ClipVisionTower : public Module {
 public:
  ClipVisionTower(const ClipVisionConfig& config, Place place);

  // Number `index` of the L + 1 hidden states [images, 1 + P, C]: 0 is what the first block reads,
  // k what block k - 1 gives; -1 is the last of them, which is not normed. Later blocks do not run.
  Variable hidden_state(const Tensor& pixels, std::int64_t index) const;
  // The same without the class: [images, P, C].
  Variable patches(const Tensor& pixels, std::int64_t index) const;
  // The last hidden state [images, 1 + P, C] to its class, normed: [images, C].
  Variable pooled(const Variable& last) const;

  void initialize(Generator& generator);
  const ClipVisionConfig& config() const { return config_; }

  ClipVisionEmbeddings embeddings;
  LayerNorm pre_layrnorm;  // as the files spell it
  ClipEncoder encoder;
  LayerNorm post_layernorm;

 private:
  ClipVisionConfig config_;
};

class ClipTextEmbeddings : public Module {
 public:
  ClipTextEmbeddings(const ClipTextConfig& config, Place place);
  Variable operator()(const Tensor& ids, const Tensor& positions) const;

  Embedding token_embedding, position_embedding;
};

class ClipTextTower : public Module {
 public:
  ClipTextTower(const ClipTextConfig& config, Place place);

  // [B, C]: the last hidden state at the end of each text, normed. Uses ids, mask and positions.
  Variable pooled(const Batch& batch) const;

  void initialize(Generator& generator);
  const ClipTextConfig& config() const { return config_; }

  ClipTextEmbeddings embeddings;
  ClipEncoder encoder;
  LayerNorm final_layer_norm;

 private:
  void check(const Batch& batch) const;
  Tensor ends(const Tensor& ids) const;

  ClipTextConfig config_;
};

class Clip : public Model {
 public:
  Clip(const ClipConfig& config, Place place);

  // Cross-entropy of each image among the texts and of each text among the images, where image i
  // belongs to text i; the mean of both. With `items` the sums are divided by that.
  Variable loss(const Batch& batch, const LossOptions& options = {}) override;
  bool has_loss(const Batch& batch) const override;
  // "image_embeds" [images, E] and "text_embeds" [B, E], of length 1; with both also
  // "logits_per_image" [images, B] and "logits_per_text" [B, images].
  std::vector<NamedOutput> outputs(const Batch& batch) override;
  void initialize(Generator& generator) override;
  std::string_view type() const override { return "clip"; }
  bool is_buffer(std::string_view key) const override;
  const ClipConfig& config() const { return config_; }

  Variable image_embeds(const Batch& batch) const;
  Variable text_embeds(const Batch& batch) const;

  Parameter logit_scale;
  ClipTextTower text_model;
  ClipVisionTower vision_model;
  Linear visual_projection, text_projection;

 private:
  Variable logits_per_text(Variable texts, Variable images) const;
  std::string write_config() const override;

  ClipConfig config_;
};

// The tower for images alone.
class ClipVision : public Model {
 public:
  ClipVision(const ClipVisionConfig& config, Place place);

  // The mean of the squares of the last but one hidden state, without the class: something to
  // differentiate, that leaves the last block and post_layernorm without a gradient.
  Variable loss(const Batch& batch, const LossOptions& options = {}) override;
  bool has_loss(const Batch& batch) const override { return batch.pixels.defined(); }
  // "hidden": the last hidden state.
  std::vector<NamedOutput> outputs(const Batch& batch) override;
  void initialize(Generator& generator) override { vision_model.initialize(generator); }
  std::string_view type() const override { return "clip_vision_model"; }
  // Files call the tower vision_model, today's code and the adapters that it writes do not.
  std::vector<FileKey> file_keys(const std::string& path) const override;
  bool is_buffer(std::string_view key) const override;

  ClipVisionTower vision_model;

 private:
  std::string write_config() const override;
};

}  // namespace reprise::nn

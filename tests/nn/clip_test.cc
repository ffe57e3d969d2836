// CLIP beyond its parity cases: what configs mean, which tokens and hidden states count, memory.
#include "nn/models/clip.h"

#include <cmath>
#include <functional>
#include <numeric>

#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "nn/weights/json.h"
#include "tests/error_of.h"
#include "tests/nn/predicted_peak.h"

namespace reprise::nn {
namespace {

using testing::error_of;
using testing::expect_predicted_peak;

using Ids = std::vector<std::int64_t>;
using Floats = std::vector<float>;

const std::string kTowers = R"("projection_dim": 6,
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "image_size": 12, "patch_size": 4},
    "text_config": {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
                    "num_attention_heads": 3, "vocab_size": 31, "max_position_embeddings": 8,
                    "eos_token_id": )";
std::string clip_of(int end_of_text, const std::string& rest = "") {
  return R"({"model_type": "clip", )" + kTowers + std::to_string(end_of_text) + "}" + rest + "}";
}
const std::string kVision = R"({"model_type": "clip_vision_model", "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4})";

absl::StatusOr<std::unique_ptr<Model>> read(const std::string& text,
                                            Place place = {meta, DType::f32}) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

template <class M>
std::unique_ptr<M> build(const std::string& text, Place place = {}) {
  auto model = read(text, place);
  EXPECT_TRUE(model.ok()) << model.status();
  Generator generator{7, 0};
  (*model)->initialize(generator);
  for (const NamedParameter& entry : (*model)->named_parameters()) {
    const Tensor value = entry.parameter->write();
    if (!value.is_meta() && value.rank() > 0) {  // so that every path counts
      for (std::int64_t i = 0; i < value.numel(); ++i) {
        value.data<float>()[i] += 0.1f * static_cast<float>((i * 7) % 5 - 2);
      }
    }
  }
  return std::unique_ptr<M>(static_cast<M*>(model->release()));
}

Tensor pixels_of(std::int64_t images, std::int64_t height = 12, std::int64_t width = 12,
                 float offset = 0) {
  Floats values(static_cast<std::size_t>(images * 3 * height * width));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = std::sin(0.37f * static_cast<float>(i) + offset);
  }
  return Tensor::from(values, Shape{images, 3, height, width});
}

Batch batch_of(const Ids& ids, std::int64_t rows) {
  Batch batch;
  batch.ids = Tensor::from(ids, Shape{rows, static_cast<std::int64_t>(ids.size()) / rows});
  batch.pixels = pixels_of(rows);
  return batch;
}

Floats floats(const Variable& x) {
  return x.tensor().to_vector<float>();
}

std::int64_t count(Model& model) {
  const auto parameters = model.parameters();
  return std::accumulate(
      parameters.begin(), parameters.end(), std::int64_t{0},
      [](std::int64_t sum, const Parameter* p) { return sum + p->shape().numel(); });
}

TEST(Clip, SizesOfPublishedModels) {
  const std::string vision = R"("hidden_size": 1024, "intermediate_size": 4096,
      "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14)";
  const std::string large = R"({"model_type": "clip", "projection_dim": 768, "vision_config": {)" +
                            vision + R"(}, "text_config": {"hidden_size": 768,
      "intermediate_size": 3072, "num_attention_heads": 12}})";
  EXPECT_EQ(count(**read(large)), 427'944'193);
  EXPECT_EQ(count(**read(R"({"model_type": "clip"})")), 151'277'313);  // B/32
  EXPECT_EQ(count(**read(R"({"model_type": "clip_vision_model", )" + vision + "}")), 303'507'456);
  // The tower's own config inside of that of a larger model.
  EXPECT_EQ(
      count(**read(R"({"model_type": "clip_vision_model", "vision_config": {)" + vision + "}}")),
      303'507'456);
}

TEST(Clip, DefaultsAreThoseOfTheClasses) {
  JsonReader json = *JsonReader::parse("{}", "c.json");
  const ClipConfig config = read_clip_config(json);
  EXPECT_EQ(config.vision.tower.width, 768);
  EXPECT_EQ(config.vision.tower.inner, 3072);
  EXPECT_EQ(config.vision.tower.heads, 12);
  EXPECT_EQ(config.vision.patch, 32);
  EXPECT_EQ(config.text.tower.width, 512);
  EXPECT_EQ(config.text.tower.inner, 2048);
  EXPECT_EQ(config.text.tower.heads, 8);
  EXPECT_EQ(config.text.positions, 77);
  EXPECT_EQ(config.text.end_of_text, 49407);
  EXPECT_EQ(config.text.tower.activation, Activation::quick_gelu);
  EXPECT_EQ(config.text.tower.epsilon, 1e-5);
  EXPECT_EQ(config.projection, 512);
}

// The trap of older files: the class defaults that the reference fills *_dict with also win.
TEST(Clip, ConfigDictsAndTheirDefaultsOverride) {
  JsonReader json = *JsonReader::parse(R"({
      "text_config": {"hidden_size": 640, "num_attention_heads": 10, "layer_norm_eps": 0.5},
      "text_config_dict": {"hidden_size": 256, "eos_token_id": 2},
      "vision_config": {"hidden_size": 96, "patch_size": 16}, "vision_config_dict": null})",
                                       "c.json");
  const ClipConfig config = read_clip_config(json);
  ASSERT_TRUE(json.status().ok()) << json.status();
  EXPECT_EQ(config.text.tower.width, 256);
  EXPECT_EQ(config.text.tower.heads, 8);
  EXPECT_EQ(config.text.tower.epsilon, 1e-5);
  EXPECT_EQ(config.text.end_of_text, 2);
  EXPECT_EQ(config.vision.tower.width, 96);
  EXPECT_EQ(config.vision.patch, 16);
}

TEST(Clip, ConfigErrors) {
  const auto problem = [](const std::string& text) {
    return std::string(read(text).status().message());
  };
  EXPECT_EQ(problem(R"({"model_type": "clip", "vision_config": {"num_attention_heads": 7}})"),
            "c.json: vision_config.num_attention_heads must divide hidden_size = 768, got 7");
  EXPECT_EQ(problem(R"({"model_type": "clip", "text_config_dict": {"num_attention_heads": 7}})"),
            "c.json: text_config_dict.num_attention_heads must divide hidden_size = 512, got 7");
  EXPECT_EQ(problem(R"({"model_type": "clip_vision_model", "image_size": 336})"),
            "c.json: image_size must be a multiple of patch_size = 32, got 336");
  EXPECT_EQ(problem(R"({"model_type": "clip_vision_model", "image_size": 16385})"),
            "c.json: image_size must be at most 16384, got 16385");
  EXPECT_EQ(problem(R"({"model_type": "clip", "projection_dim": 0})"),
            "c.json: projection_dim must be at least 1, got 0");
}

TEST(Clip, WhatIsWrittenBuildsTheSameModel) {
  for (const std::string& text : {clip_of(5, R"(, "logit_scale_init_value": 1.5)"), kVision}) {
    const auto first = read(text);
    ASSERT_TRUE(first.ok()) << first.status();
    (*first)->set_source("");
    const std::string written = (*first)->config_json();
    const auto second = read(written);
    ASSERT_TRUE(second.ok()) << second.status();
    EXPECT_EQ((*second)->type(), (*first)->type());
    (*second)->set_source("");
    EXPECT_EQ((*second)->config_json(), written);
    EXPECT_EQ(count(**first), count(**second));
  }
}

TEST(Clip, ATextIsTakenAtItsFirstEnd) {
  const auto embeds = [](Clip& model, const Ids& ids) {
    Batch batch;
    batch.ids = Tensor::from(ids, Shape{1, static_cast<std::int64_t>(ids.size())});
    return floats(model.text_embeds(batch));
  };
  const auto model = build<Clip>(clip_of(5));
  // Causality: what follows the end is not seen, whatever it is.
  EXPECT_EQ(embeds(*model, {1, 3, 5, 5, 5}), embeds(*model, {1, 3, 5, 9, 30}));
  EXPECT_NE(embeds(*model, {1, 3, 9, 5, 5}), embeds(*model, {1, 3, 5, 9, 5}));
  EXPECT_EQ(error_of([&] {
              (void)embeds(*model, {1, 2, 3});
            }),
            "[model] row 0 of ids has no end of text, id 5");
}

// Older files say 2 whatever their tokenizer does.
TEST(Clip, WithAnEndOfTwoATextIsTakenAtItsFirstLargestId) {
  const auto embeds = [](Clip& model, const Ids& ids) {
    Batch batch;
    batch.ids = Tensor::from(ids, Shape{1, static_cast<std::int64_t>(ids.size())});
    return floats(model.text_embeds(batch));
  };
  const auto model = build<Clip>(clip_of(2));
  EXPECT_EQ(embeds(*model, {1, 3, 30, 30, 30}), embeds(*model, {1, 3, 30, 9, 4}));
  EXPECT_EQ(embeds(*model, {1, 2, 30, 30, 2}), embeds(*model, {1, 2, 30, 3, 2}));
  EXPECT_NE(embeds(*model, {1, 2, 30, 30, 2}), embeds(*model, {1, 3, 30, 30, 2}));
}

TEST(Clip, PaddingIsNotSeen) {
  const auto model = build<Clip>(clip_of(5));
  Batch padded;
  padded.ids = Tensor::from(Ids{9, 9, 1, 3, 5}, Shape{1, 5});
  padded.mask = Tensor::from(Ids{0, 0, 1, 1, 1}, Shape{1, 5});
  padded.positions = Tensor::from(Ids{0, 0, 0, 1, 2}, Shape{1, 5});
  Batch bare;
  bare.ids = Tensor::from(Ids{1, 3, 5}, Shape{1, 3});
  const Floats a = floats(model->text_embeds(padded)), b = floats(model->text_embeds(bare));
  padded.mask = {};
  const Floats seen = floats(model->text_embeds(padded));
  double apart = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    EXPECT_NEAR(a[i], b[i], 1e-5);
    apart += std::abs(static_cast<double>(seen[i] - b[i]));
  }
  EXPECT_GT(apart, 1e-3);
}

TEST(Clip, HiddenStatesAreNumberedFromBothEnds) {
  const auto model = build<ClipVision>(kVision);
  const ClipVisionTower& tower = model->vision_model;
  const Tensor pixels = pixels_of(2);
  const auto state = [&](std::int64_t index) { return floats(tower.hidden_state(pixels, index)); };
  EXPECT_EQ(state(-1), state(3));
  EXPECT_EQ(state(-2), state(2));
  EXPECT_EQ(state(-4), state(0));
  EXPECT_NE(state(-1), state(-2));
  EXPECT_EQ(state(0), floats(tower.pre_layrnorm(tower.embeddings(pixels))));
  const Floats patches = floats(tower.patches(pixels, -1)), last = state(-1);
  for (std::size_t i = 0; i < 9 * 16; ++i) {  // the class is gone, of either image
    EXPECT_EQ(patches[i], last[16 + i]);
    EXPECT_EQ(patches[9 * 16 + i], last[11 * 16 + i]);
  }
  EXPECT_EQ(error_of([&] { (void)state(4); }),
            "[model] the number of a hidden state must be from -4 to 3, got 4");
  EXPECT_EQ(error_of([&] { (void)state(-5); }),
            "[model] the number of a hidden state must be from -4 to 3, got -5");
}

TEST(Clip, BlocksAfterTheHiddenStateHaveNoGradient) {
  const auto model = build<ClipVision>(kVision);
  Batch batch;
  batch.pixels = pixels_of(2);
  Tape tape;
  const Tape::Scope scope(tape);
  backward(model->loss(batch));
  for (const NamedParameter& entry : model->named_parameters()) {
    const bool after = entry.path.find(".layers.2.") != std::string::npos ||
                       entry.path.find("post_layernorm") != std::string::npos;
    EXPECT_EQ(entry.parameter->has_gradient(), !after) << entry.path;
  }
}

// The trap: HF's hidden states are not normed, only the class token that is pooled.
TEST(Clip, PostLayernormTouchesOnlyThePooledClass) {
  const auto model = build<ClipVision>(kVision);
  const ClipVisionTower& tower = model->vision_model;
  const Tensor pixels = pixels_of(1);
  const Floats last = floats(tower.hidden_state(pixels, -1));
  const Floats pooled = floats(tower.pooled(tower.hidden_state(pixels, -1)));
  model->vision_model.post_layernorm.weight.write().data<float>()[3] += 1;
  EXPECT_EQ(floats(tower.hidden_state(pixels, -1)), last);
  EXPECT_NE(floats(tower.pooled(tower.hidden_state(pixels, -1))), pooled);
  ASSERT_EQ(pooled.size(), 16u);
}

TEST(Clip, OtherImageSizesResizeTheTableOfPositions) {
  const auto model = build<ClipVision>(kVision);
  Parameter& table = model->vision_model.embeddings.position_embedding.weight;
  const auto state = [&](std::int64_t height, std::int64_t width) {
    return floats(model->vision_model.hidden_state(pixels_of(1, height, width), 0));
  };
  EXPECT_EQ(state(8, 20).size(), (1 + 2 * 5) * 16u);
  EXPECT_EQ(state(24, 24).size(), (1 + 6 * 6) * 16u);
  // With equal rows for the patches, any resizing gives these rows again: the class keeps its own.
  const Tensor value = table.write();
  for (std::int64_t i = 16; i < value.numel(); ++i) {
    value.data<float>()[i] = 0.3f * static_cast<float>(i % 16);
  }
  const Tensor pixels = pixels_of(1, 8, 20);
  const Floats found = floats(model->vision_model.embeddings(pixels));
  for (std::int64_t i = 0; i < value.numel(); ++i) {
    value.data<float>()[i] = 0;
  }
  const Floats bare = floats(model->vision_model.embeddings(pixels));
  for (std::size_t i = 16; i < found.size(); ++i) {
    EXPECT_NEAR(found[i] - bare[i], 0.3f * static_cast<float>(i % 16), 1e-5);
  }
  // The gradient reaches every row.
  Batch batch;
  batch.pixels = pixels;
  Tape tape;
  const Tape::Scope scope(tape);
  backward(model->loss(batch));
  ASSERT_TRUE(table.has_gradient());
  for (const float g : table.gradient().to_vector<float>()) {
    EXPECT_NE(g, 0);
  }
}

TEST(Clip, TheTemperatureIsNotClamped) {
  const auto model = build<Clip>(clip_of(5));
  const Batch batch = batch_of({1, 5, 2, 5}, 2);
  const auto logit = [&](float scale) {
    model->logit_scale.write().data<float>()[0] = scale;
    for (const NamedOutput& output : model->outputs(batch)) {
      if (output.name == "logits_per_text") {
        return floats(output.value)[1];
      }
    }
    return 0.0f;
  };
  EXPECT_NEAR(logit(6) / logit(0), std::exp(6.0f), 0.1f);
}

TEST(Clip, OutputsOfOneTowerAlone) {
  const auto model = build<Clip>(clip_of(5));
  Batch batch = batch_of({1, 5, 2, 5}, 2);
  EXPECT_EQ(model->outputs(batch).size(), 4u);
  Batch images = batch, texts = batch;
  images.ids = {};
  texts.pixels = {};
  ASSERT_EQ(model->outputs(images).size(), 1u);
  EXPECT_EQ(model->outputs(images)[0].name, "image_embeds");
  ASSERT_EQ(model->outputs(texts).size(), 1u);
  EXPECT_EQ(model->outputs(texts)[0].name, "text_embeds");
  EXPECT_FALSE(model->has_loss(images) || model->has_loss(texts));
}

std::vector<std::pair<std::string, Floats>> gradients(Model& model, const Batch& batch,
                                                      const Policies& policies = {}) {
  Tape tape;
  const Tape::Scope scope(tape, policies);
  for (Parameter* parameter : model.parameters()) {
    parameter->zero_gradient();
  }
  backward(model.loss(batch));
  std::vector<std::pair<std::string, Floats>> result;
  for (const NamedParameter& entry : model.named_parameters()) {
    if (entry.parameter->has_gradient()) {
      result.emplace_back(entry.path, entry.parameter->gradient().to_vector<float>());
    }
  }
  return result;
}

TEST(Clip, PoliciesAreBitwiseEqualWithDropoutAndResizing) {
  JsonReader json = *JsonReader::parse(clip_of(5), "c.json");
  ClipConfig config = read_clip_config(json);
  config.vision.tower.attention_dropout = config.text.tower.attention_dropout = 0.3;
  Clip model(config, {});
  Generator generator{3, 0};
  model.initialize(generator);
  Batch batch = batch_of({1, 3, 5, 5, 4, 5, 5, 5}, 2);
  batch.pixels = pixels_of(2, 16, 8);
  const auto still = gradients(model, batch);
  model.train(generator);
  const auto run = [&](const std::string& policy) {
    generator = {5, 100};
    return gradients(model, batch, Policies::named(policy));
  };
  const auto expected = run("keep-all");
  EXPECT_NE(expected, still);
  for (const std::string& name : Policies::names()) {
    EXPECT_EQ(run(name), expected) << name;
  }
}

TEST(Clip, AFrozenTowerHasNoGradient) {
  const auto model = build<Clip>(clip_of(5));
  EXPECT_GT(model->freeze("vision_model.*"), 30);
  for (const auto& [path, gradient] : gradients(*model, batch_of({1, 5, 2, 5}, 2))) {
    EXPECT_FALSE(path.starts_with("vision_model.")) << path;
  }
  EXPECT_TRUE(model->visual_projection.weight.has_gradient());
}

TEST(Clip, ADryRunPredictsThePeak) {
  const auto real = build<Clip>(clip_of(5)), shapes = build<Clip>(clip_of(5), {meta, DType::f32});
  Batch batch = batch_of({1, 3, 5, 5, 4, 5, 5, 5}, 2);
  batch.pixels = pixels_of(2, 16, 8);
  expect_predicted_peak(*real, *shapes, batch);
}

TEST(Clip, InitialValuesFollowThePaper) {
  JsonReader json = *JsonReader::parse(
      R"({"model_type": "clip", "projection_dim": 64, "vision_config": {"hidden_size": 64,
          "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 64, "patch_size": 8}, "text_config": {"hidden_size": 100,
          "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
          "vocab_size": 90}})",
      "c.json");
  const auto model = *build_model(json, Place{});
  Generator generator{1, 0};
  model->initialize(generator);
  const auto expect = [&](const std::string& path, double deviation) {
    double sum = 0;
    const Floats values = model->find_parameter(path)->value().to_vector<float>();
    for (const float v : values) {
      sum += static_cast<double>(v) * static_cast<double>(v);
    }
    const double found = std::sqrt(sum / static_cast<double>(values.size()));
    EXPECT_NEAR(found, deviation, 0.05 * deviation + (values.size() < 200 ? 0.2 * deviation : 0))
        << path;
  };
  const std::string block = "vision_model.encoder.layers.1.";
  expect("vision_model.embeddings.class_embedding", 1.0 / 8);
  expect("vision_model.embeddings.patch_embedding.weight", 0.02);
  expect("vision_model.embeddings.position_embedding.weight", 0.02);
  expect("text_model.embeddings.token_embedding.weight", 0.02);
  expect(block + "self_attn.q_proj.weight", 1.0 / 8 / 2);
  expect(block + "self_attn.out_proj.weight", 1.0 / 8);
  expect(block + "mlp.fc1.weight", 1 / std::sqrt(128.0));
  expect(block + "mlp.fc2.weight", 1.0 / 8 / 2);
  expect("text_model.encoder.layers.0.mlp.fc2.weight", 1.0 / 10 / std::sqrt(2.0));
  expect("visual_projection.weight", 1.0 / 8);
  expect("text_projection.weight", 1.0 / 10);
  expect("vision_model.pre_layrnorm.weight", 1);
  expect(block + "mlp.fc1.bias", 0);
  expect("logit_scale", 2.6592);
}

TEST(Clip, OldBuffersArePassedOver) {
  const auto clip = read(clip_of(5)), vision = read(kVision);
  for (const Model* model : {clip->get(), vision->get()}) {
    EXPECT_TRUE(model->is_buffer("vision_model.embeddings.position_ids"));
    EXPECT_FALSE(model->is_buffer("vision_model.embeddings.class_embedding"));
  }
  EXPECT_TRUE((*clip)->is_buffer("text_model.embeddings.position_ids"));
}

TEST(Clip, Mistakes) {
  const auto model = build<Clip>(clip_of(5));
  const auto with = [&](const std::function<void(Batch&)>& change) {
    return error_of([&] {
      Batch batch = batch_of({1, 5, 2, 5}, 2);
      change(batch);
      (void)model->loss(batch);
    });
  };
  EXPECT_EQ(with([](Batch&) {}), "no error");
  EXPECT_EQ(with([](Batch& b) { b.pixels = {}; }), "[loss] the batch must have ids and pixels");
  EXPECT_EQ(with([](Batch& b) { b.pixels = pixels_of(3); }),
            "[loss] there must be a text for each of the 3 images, got 2");
  EXPECT_EQ(with([](Batch& b) { b.pixels = pixels_of(2, 12, 14); }),
            "[model] pixels must be f32 [images, 3, H, W], H and W multiples of patch_size = 4, "
            "got f32 [2, 3, 12, 14]");
  EXPECT_NE(with([](Batch& b) {
              b.pixels = Tensor::zeros(Shape{2, 1, 12, 12}, DType::f32);
            }),
            "no error");
  EXPECT_NE(with([](Batch& b) {
              b.pixels = Tensor::zeros(Shape{2, 3, 0, 12}, DType::f32);
            }),
            "no error");
  EXPECT_EQ(with([](Batch& b) {
              b.ids = Tensor::zeros(Shape{2, 2}, DType::i32);
            }),
            "[model] ids must be i64 [B, T], got i32 [2, 2]");
  EXPECT_EQ(with([](Batch& b) {
              b.mask = Tensor::zeros(Shape{2, 3}, DType::i64);
            }),
            "[model] mask must be i64 [B, T], got i64 [2, 3]");
  EXPECT_EQ(with([](Batch& b) {
              b.ids = Tensor::full(Shape{2, 9}, DType::i64, 5);
            }),
            "[model] a text may have 8 tokens, got 9");
  EXPECT_EQ(with([](Batch& b) {
              b.starts = {{0}, {0}};
            }),
            "[model] starts must be absent: a text is a row");
  EXPECT_NE(with([](Batch& b) {
              b.ids = Tensor::from(Ids{31, 5, 1, 5}, Shape{2, 2});
            }),
            "no error");
  EXPECT_EQ(error_of([&] {
              (void)model->loss(batch_of({1, 5}, 1), {.items = 0});
            }),
            "[loss] items must be above 0, got 0");
  const auto vision = build<ClipVision>(kVision);
  EXPECT_NE(error_of([&] { (void)vision->loss({}); }).find("got nothing"), std::string::npos);
  Batch images;
  images.pixels = pixels_of(1);
  EXPECT_EQ(error_of([&] { (void)vision->loss(images, {.items = 2}); }),
            "[loss] items must be absent: there are no labels to divide by");
}

}  // namespace
}  // namespace reprise::nn

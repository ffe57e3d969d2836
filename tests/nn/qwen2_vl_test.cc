// Qwen2-VL beyond the agreement with the reference that the parity cases show: positions, who sees
// whom in the tower, the splice, names of weights, adapters, use twice in a step.
#include "nn/models/qwen2_vl.h"

#include <cmath>
#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "autograd/elementwise.h"
#include "autograd/tape.h"
#include "nn/lora.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "tests/error_of.h"
#include "tests/nn/files.h"
#include "tests/nn/predicted_peak.h"

namespace reprise::nn {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using testing::expect_predicted_peak;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;
using Ids = std::vector<std::int64_t>;
using Floats = std::vector<float>;

constexpr std::int64_t kImage = 20, kVideo = 21;

const std::string kText = R"("vocab_size": 23, "hidden_size": 16, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rope_theta": 100.0)";
const std::string kRest = R"("model_type": "qwen2_vl", "image_token_id": 20, "video_token_id": 21,
    "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2,
                      "hidden_size": 16})";
const std::string kConfig =
    "{" + kText + R"(, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]}, )" + kRest;

absl::StatusOr<std::unique_ptr<Model>> try_build(const std::string& text, Place place) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

struct Vl {
  std::unique_ptr<Model> owner;
  Qwen2Vl& model;
};

Vl build(const std::string& more = "", Place place = {}) {
  auto built = try_build(kConfig + more + "}", place);
  EXPECT_TRUE(built.ok()) << built.status();
  auto& model = dynamic_cast<Qwen2Vl&>(**built);
  Vl result{*std::move(built), model};
  Generator generator{3, 0};
  result.model.initialize(generator);
  if (place.device == cpu) {
    float x = 0;
    for (Parameter* parameter : result.model.parameters()) {
      float* const values = parameter->write().data<float>();
      for (std::int64_t i = 0; i < parameter->shape().numel(); ++i) {
        values[i] = 12 * values[i] * (parameter->shape().rank() > 1 ? 1 : 0.08f) +
                    0.02f * static_cast<float>(std::fmod(x += 1, 5) - 2);
      }
    }
  }
  return result;
}

Tensor pixels_of(std::int64_t patches, std::uint64_t seed = 1) {
  Floats values;
  for (std::int64_t i = 0; i < patches * 24; ++i) {
    values.push_back(std::sin(static_cast<float>(i * 7 + static_cast<std::int64_t>(seed) * 31)));
  }
  return Tensor::from(values, Shape{patches, 24});
}

Batch batch_of(const Ids& ids, const std::vector<Ids>& grids, std::int64_t rows = 1) {
  const Shape shape{rows, static_cast<std::int64_t>(ids.size()) / rows};
  Batch batch;
  batch.ids = Tensor::from(ids, shape);
  Ids labels = ids;
  for (std::int64_t& label : labels) {
    label = label == kImage || label == kVideo ? -100 : label;
  }
  batch.labels = Tensor::from(labels, shape);
  if (!grids.empty()) {
    Ids sizes;
    std::int64_t patches = 0;
    for (const Ids& grid : grids) {
      sizes.insert(sizes.end(), grid.begin(), grid.end());
      patches += grid[0] * grid[1] * grid[2];
    }
    batch.grids = Tensor::from(sizes, Shape{static_cast<std::int64_t>(grids.size()), 3});
    batch.pixels = pixels_of(patches);
  }
  return batch;
}

// One image of 2 x 4 patches, two tokens.
Batch small() {
  return batch_of({1, 2, kImage, kImage, 3, 4, 5}, {{1, 2, 4}});
}

Floats logits(LanguageModel& model, const Batch& batch) {
  return model.logits(batch).tensor().to_vector<float>();
}

std::int64_t count(Module& model) {
  std::int64_t sum = 0;
  for (const Parameter* parameter : model.parameters()) {
    sum += parameter->shape().numel();
  }
  return sum;
}

// "ttt hhh www" of one row.
std::vector<Ids> rows_of(const Tensor& positions, std::int64_t row) {
  const Ids all = positions.to_vector<std::int64_t>();
  const auto B = positions.size(1), T = positions.size(2);
  std::vector<Ids> result;
  for (std::int64_t kind = 0; kind < 3; ++kind) {
    const auto first = all.begin() + (kind * B + row) * T;
    result.emplace_back(first, first + T);
  }
  return result;
}

TEST(Qwen2Vl, SizesOfPublishedModels) {
  const auto two = try_build(R"({"model_type": "qwen2_vl", "hidden_size": 1536,
      "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
      "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": true,
      "vision_config": {"hidden_size": 1536, "in_chans": 3, "spatial_patch_size": 14}})",
                             {meta, DType::bf16});
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_EQ(count(**two), 2'208'985'600);
  auto& first = dynamic_cast<Qwen2Vl&>(**two);
  EXPECT_EQ(count(first.model.visual), 665'271'296);
  EXPECT_EQ(count(first.model.visual.merger), 34'087'936);
  EXPECT_EQ(count(first.model.visual.blocks[0]), 19'677'440);
  const auto seven = try_build(R"({"model_type": "qwen2_vl", "hidden_size": 3584,
      "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
      "num_key_value_heads": 4, "vocab_size": 152064})",
                               {meta, DType::bf16});
  ASSERT_TRUE(seven.ok()) << seven.status();
  EXPECT_EQ(count(**seven), 8'291'375'616);
  auto& second = dynamic_cast<Qwen2Vl&>(**seven);
  EXPECT_EQ(count(second.model.visual), 675'759'104);
  EXPECT_EQ(count(second.model.visual.merger), 44'575'744);
}

TEST(Qwen2Vl, DefaultsAreThoseOfTheClasses) {
  JsonReader json = *JsonReader::parse(
      R"({"model_type": "qwen2_vl", "vision_config": {"hidden_size": 8192}})", "c.json");
  const Qwen2VlConfig config = read_qwen2_vl_config(json);
  ASSERT_TRUE(json.status().ok()) << json.status();
  EXPECT_EQ(config.text.epsilon, 1e-5);  // published files say 1e-6
  EXPECT_EQ(config.text.rope.theta, 1e6);
  EXPECT_EQ(config.text.vocabulary, 152064);
  EXPECT_EQ(config.text.kv_heads, 8);
  EXPECT_TRUE(config.text.qkv_bias);
  EXPECT_FALSE(config.text.output_bias || config.text.tied || config.text.padding);
  EXPECT_THAT(config.sections, ElementsAre(16, 24, 24));
  EXPECT_EQ(config.image_token, 151655);
  EXPECT_EQ(config.video_token, 151656);
  EXPECT_EQ(config.vision.width, 1280);
  EXPECT_EQ(config.vision.inner, 5120);
  EXPECT_EQ(config.vision.heads, 16);
  EXPECT_EQ(config.vision.pixels(), 1176);
  EXPECT_EQ(config.vision.merge, 2);
  EXPECT_EQ(config.vision.activation, Activation::quick_gelu);
}

TEST(Qwen2Vl, FlatAndNestedConfigsAreTheSame) {
  const auto flat = build();
  const auto nested = try_build("{\"text_config\": {" + kText +
                                    R"(, "tie_word_embeddings": true, "rope_parameters":
                   {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 2, 1]}}, )" +
                                    kRest + "}",
                                {});
  ASSERT_TRUE(nested.ok()) << nested.status();
  auto& other = dynamic_cast<Qwen2Vl&>(**nested);
  EXPECT_EQ(other.config().sections, flat.model.config().sections);
  EXPECT_EQ(other.config().text.rope.theta, 100);
  EXPECT_TRUE(other.config().text.tied);  // which older files have inside
  EXPECT_FALSE(flat.model.config().text.tied);
  EXPECT_EQ(count(other) + 23 * 16, count(flat.model));
}

TEST(Qwen2Vl, ConfigsThatAreWrong) {
  const auto problem = [](const std::string& from, const std::string& to) {
    std::string text = kConfig + "}";
    const std::size_t at = text.find(from);
    EXPECT_NE(at, text.npos) << from;
    text.replace(at, from.size(), to);
    return std::string(try_build(text, {meta, DType::f32}).status().message());
  };
  for (const std::string wrong : {"[1, 2, 2]", "[2, 2]", "[-1, 3, 2]", "[]"}) {
    EXPECT_THAT(problem("[1, 2, 1]", wrong),
                HasSubstr("c.json: rope_scaling.mrope_section must be three sizes that add up to "
                          "half of a head's 8 elements, got ["))
        << wrong;
  }
  EXPECT_EQ(problem("\"hidden_size\": 16}", "\"hidden_size\": 32}"),
            "c.json: vision_config.hidden_size must be the decoder's hidden_size = 16, got 32");
  EXPECT_EQ(problem("\"num_heads\": 2", "\"num_heads\": 3"),
            "c.json: vision_config.num_heads must divide embed_dim = 16, got 3");
  EXPECT_EQ(problem("\"num_heads\": 2", "\"num_heads\": 8"),
            "c.json: vision_config.num_heads must leave a multiple of 4 elements in a head, for "
            "pairs of rows and columns, got 2");
  EXPECT_EQ(problem("\"image_token_id\": 20", "\"image_token_id\": 23"),
            "c.json: image_token_id must be from 0 to below vocab_size = 23, got 23");
  EXPECT_EQ(problem("\"mlp_ratio\": 2", "\"mlp_ratio\": 0"),
            "c.json: vision_config.mlp_ratio must be above 0 and at most 1024, got 0");
  EXPECT_EQ(problem("\"num_attention_heads\": 2", "\"num_attention_heads\": 3"),
            "c.json: num_attention_heads must divide hidden_size = 16, got 3");
  EXPECT_EQ(problem("\"patch_size\": 2", "\"patch_size\": 0"),
            "c.json: vision_config.patch_size must be at least 1, got 0");
}

TEST(Qwen2Vl, PositionsGoOnFromTheLargest) {
  const auto vl = build();
  // Two words, an image of 2 x 3 tokens, two words: 2 + max(1, 2, 3) = 5 is next.
  const Batch batch =
      batch_of({1, 2, kImage, kImage, kImage, kImage, kImage, kImage, 3, 4}, {{1, 4, 6}});
  EXPECT_THAT(rows_of(vl.model.positions(batch), 0),
              ElementsAre(Ids{0, 1, 2, 2, 2, 2, 2, 2, 5, 6}, Ids{0, 1, 2, 2, 2, 3, 3, 3, 5, 6},
                          Ids{0, 1, 2, 3, 4, 2, 3, 4, 5, 6}));
  // More pairs of frames than rows or columns: time is the largest.
  EXPECT_THAT(rows_of(vl.model.positions(batch_of(
                          {kVideo, kVideo, kVideo, kVideo, kVideo, kVideo, 7, 8, 9}, {{3, 2, 4}})),
                      0),
              ElementsAre(Ids{0, 0, 1, 1, 2, 2, 3, 4, 5}, Ids{0, 0, 0, 0, 0, 0, 3, 4, 5},
                          Ids{0, 1, 0, 1, 0, 1, 3, 4, 5}));
  // Two images that touch, and the second row on its own.
  const Batch two = batch_of({kImage, kImage, kImage, 5, 6, 7, 1, kImage, kImage, 1, 1, 1},
                             {{1, 2, 4}, {1, 2, 2}, {1, 4, 2}}, 2);
  EXPECT_THAT(rows_of(vl.model.positions(two), 0),
              ElementsAre(Ids{0, 0, 2, 3, 4, 5}, Ids{0, 0, 2, 3, 4, 5}, Ids{0, 1, 2, 3, 4, 5}));
  EXPECT_THAT(rows_of(vl.model.positions(two), 1),
              ElementsAre(Ids{0, 1, 1, 3, 4, 5}, Ids{0, 1, 2, 3, 4, 5}, Ids{0, 1, 1, 3, 4, 5}));
}

TEST(Qwen2Vl, PositionsOfPaddingAndPackedTexts) {
  const auto vl = build();
  Batch batch = batch_of({0, 0, 1, kImage, kImage, 2, 3, 0}, {{1, 2, 4}});
  batch.mask = Tensor::from(Ids{0, 0, 1, 1, 1, 1, 1, 0}, Shape{1, 8});
  EXPECT_THAT(rows_of(vl.model.positions(batch), 0),
              ElementsAre(Ids{0, 0, 0, 1, 1, 3, 4, 0}, Ids{0, 0, 0, 1, 1, 3, 4, 0},
                          Ids{0, 0, 0, 1, 2, 3, 4, 0}));
  batch.mask = {};
  batch.starts = {{0, 2, 6}};
  EXPECT_THAT(rows_of(vl.model.positions(batch), 0),
              ElementsAre(Ids{0, 1, 0, 1, 1, 3, 0, 1}, Ids{0, 1, 0, 1, 1, 3, 0, 1},
                          Ids{0, 1, 0, 1, 2, 3, 0, 1}));
  // Given ones are taken: one number a token, or three.
  batch.positions = Tensor::from(Ids{0, 1, 2, 3, 4, 5, 6, 9}, Shape{1, 8});
  const Ids same{0, 1, 2, 3, 4, 5, 6, 9};
  EXPECT_THAT(rows_of(vl.model.positions(batch), 0), ElementsAre(same, same, same));
  batch.positions = Tensor::zeros(Shape{3, 1, 8}, DType::i64);
  EXPECT_TRUE(vl.model.positions(batch).shares_storage(batch.positions));
}

TEST(Qwen2Vl, PackedTextsSeeThemselvesOnly) {
  const auto vl = build();
  Batch packed = batch_of({1, kImage, kImage, 2, 3, kImage, kImage, 4}, {{1, 2, 4}, {1, 4, 2}});
  packed.starts = {{0, 4}};
  const Floats all = logits(vl.model, packed);
  Batch first = batch_of({1, kImage, kImage, 2}, {{1, 2, 4}});
  Batch second = batch_of({3, kImage, kImage, 4}, {{1, 4, 2}});
  first.pixels = packed.pixels.slice(0, 0, 8).clone();
  second.pixels = packed.pixels.slice(0, 8, 16).clone();
  Floats apart = logits(vl.model, first);
  const Floats rest = logits(vl.model, second);
  apart.insert(apart.end(), rest.begin(), rest.end());
  ASSERT_EQ(all.size(), apart.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    EXPECT_NEAR(all[i], apart[i], 1e-4);
  }
}

TEST(Qwen2Vl, TextAloneIsQwen2) {
  const auto vl = build();
  JsonReader json = *JsonReader::parse(
      "{\"model_type\": \"qwen2\", " + kText + ", \"rms_norm_eps\": 1e-5}", "c.json");
  const auto qwen = *build_language_model(json, {});
  for (const NamedParameter& entry : qwen->named_parameters()) {
    const std::string path = entry.path.starts_with("model.")
                                 ? "model.language_model." + entry.path.substr(6)
                                 : entry.path;
    entry.parameter->write().copy_from(vl.model.find_parameter(path)->value());
  }
  const Batch batch = batch_of({1, 2, 3, 4, 5, 6}, {});
  EXPECT_EQ(logits(vl.model, batch), logits(*qwen, batch));
}

TEST(Qwen2Vl, APatchSeesItsOwnFrameOnly) {
  const auto vl = build();
  // A video of two pairs of frames, then an image: frames of 4 x 4, 4 x 4 and 2 x 4 patches.
  const Batch batch = batch_of({1}, {{2, 4, 4}, {1, 2, 4}});
  const auto grids = qwen2_vl_grids(vl.model.config().vision, batch.pixels, batch.grids);
  const auto features = [&](const Tensor& pixels) {
    return vl.model.model.visual(pixels, grids).tensor().to_vector<float>();
  };
  const Floats before = features(batch.pixels);
  ASSERT_EQ(before.size(), 10u * 16);
  const std::vector<std::pair<std::int64_t, std::int64_t>> frames = {{0, 4}, {4, 8}, {8, 10}};
  for (const auto& [first, last] : frames) {
    Tensor changed = batch.pixels.clone();
    changed.slice(0, 4 * first, 4 * first + 1).zero();
    const Floats after = features(changed);
    for (std::int64_t token = 0; token < 10; ++token) {
      const bool same = std::equal(before.begin() + token * 16, before.begin() + (token + 1) * 16,
                                   after.begin() + token * 16);
      EXPECT_EQ(same, token < first || token >= last) << first << " " << token;
    }
  }
}

TEST(Qwen2Vl, ImagesReplaceTheRowsOfTheirTokens) {
  const auto vl = build();
  const Batch batch = small();
  Tape tape;
  const Tape::Scope scope(tape, {});
  backward(vl.model.loss(batch));
  const Floats table = vl.model.embedding_table().gradient().to_vector<float>();
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_EQ(table[kImage * 16 + i], 0);  // untied: nothing comes from the head
    EXPECT_NE(table[2 * 16 + i], 0);
  }
  for (const NamedParameter& entry : vl.model.named_parameters()) {
    EXPECT_TRUE(entry.parameter->has_gradient()) << entry.path;
  }
  // What the table holds there does not matter, pixels do.
  const Floats before = logits(vl.model, batch);
  vl.model.embedding_table().write().slice(0, kImage, kImage + 1).zero();
  EXPECT_EQ(logits(vl.model, batch), before);
  Batch other = batch;
  other.pixels = pixels_of(8, 2);
  EXPECT_NE(logits(vl.model, other), before);
}

TEST(Qwen2Vl, TextAloneLeavesTheTowerAlone) {
  const auto vl = build();
  Tape tape;
  const Tape::Scope scope(tape, {});
  backward(vl.model.loss(batch_of({1, 2, 3, 4}, {})));
  for (const NamedParameter& entry : vl.model.named_parameters()) {
    EXPECT_EQ(entry.parameter->has_gradient(), !entry.path.starts_with("model.visual."))
        << entry.path;
  }
}

TEST(Qwen2Vl, Mistakes) {
  const auto vl = build();
  const auto with = [&](const std::function<void(Batch&)>& change) {
    return error_of([&] {
      Batch batch = small();
      change(batch);
      (void)vl.model.loss(batch);
    });
  };
  EXPECT_EQ(with([](Batch&) {}), "no error");
  const auto ids = [](const Ids& values) {
    return [values](Batch& b) { b.ids = Tensor::from(values, Shape{1, 7}); };
  };
  EXPECT_EQ(with(ids({1, 2, kImage, 2, 3, 4, 5})),
            "[model] 1 images have 2 features, but ids hold 1 image tokens");
  EXPECT_EQ(with(ids({1, kImage, kImage, kImage, 3, 4, 5})),
            "[model] 1 images have 2 features, but ids hold 3 image tokens");
  EXPECT_EQ(with(ids({1, 2, kImage, 3, kImage, 4, 5})),
            "[model] the 2 tokens of image 0 must follow each other in one text, but only 1 do");
  EXPECT_EQ(with([](Batch& b) {
              b.starts = {{0, 3}};
            }),
            "[model] the 2 tokens of image 0 must follow each other in one text, but only 1 do");
  EXPECT_EQ(with([](Batch& b) { b.pixels = b.grids = {}; }),
            "[model] ids hold 2 image tokens, but the batch has no images");
  EXPECT_EQ(with([](Batch& b) { b.grids = {}; }),
            "[model] grids must be i64 [images, 3], got nothing");
  EXPECT_EQ(with([](Batch& b) { b.pixels = {}; }),
            "[model] pixels must be floating [patches, pixels] = [8, 24], as the grids say, got "
            "nothing");
  EXPECT_EQ(with([](Batch& b) { b.pixels = pixels_of(9); }),
            "[model] pixels must be floating [patches, pixels] = [8, 24], as the grids say, got "
            "f32 [9, 24]");
  EXPECT_EQ(with([](Batch& b) {
              b.grids = Tensor::from(Ids{1, 1, 8}, Shape{1, 3});
            }),
            "[model] grids must be whole blocks of 2 x 2 patches, got 1 x 8 for image 0");
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-2}, INT64_MAX}) {
    EXPECT_EQ(
        with([&](Batch& b) {
          b.grids = Tensor::from(Ids{1, bad, 4}, Shape{1, 3});
        }),
        "[model] grids must be from 1 to 262144, got " + std::to_string(bad) + " for image 0");
  }
  EXPECT_EQ(with([](Batch& b) {
              b.mask = Tensor::from(Ids{1, 1, 1, 0, 1, 1, 1}, Shape{1, 7});
            }),
            "[model] image tokens must not be padding, as is token 3 of row 0");
  EXPECT_EQ(with([](Batch& b) { b.image_tokens = b.ids; }),
            "[model] image_tokens must be absent: qwen2_vl knows them by their ids");
  EXPECT_EQ(with([](Batch& b) {
              b.positions = Tensor::zeros(Shape{2, 1, 7}, DType::i64);
            }),
            "[model] positions must be i64 [B, T] = [3, 1, 7], got i64 [2, 1, 7]");
  Batch none;
  none.ids = Tensor::empty(Shape{0, std::int64_t{1} << 40}, DType::i64);
  EXPECT_EQ(vl.model.hidden(none).tensor().numel(), 0);
}

using Gradients = std::vector<std::pair<std::string, Floats>>;
Gradients gradients(Model& model, const std::function<Variable()>& loss,
                    const std::string& policy = "keep-all") {
  for (Parameter* parameter : model.parameters()) {
    parameter->zero_gradient();
  }
  Tape tape;
  const Tape::Scope scope(tape, Policies::named(policy));
  backward(loss());
  Gradients result;
  for (const NamedParameter& entry : model.named_parameters()) {
    if (entry.parameter->has_gradient()) {
      result.emplace_back(entry.path, entry.parameter->gradient().to_vector<float>());
    }
  }
  return result;
}

TEST(Qwen2Vl, MayBeUsedTwiceInOneStep) {
  const auto vl = build();
  const Batch a = small();
  Batch b = batch_of({7, kImage, kImage, kImage, kImage, 8, 9}, {{2, 2, 4}});
  b.pixels = pixels_of(16, 5);
  const auto loss_of = [&](const Batch& batch) { return [&] { return vl.model.loss(batch); }; };
  const auto both = [&] { return add(vl.model.loss(a), vl.model.loss(b)); };
  const Gradients one = gradients(vl.model, loss_of(a)), two = gradients(vl.model, loss_of(b));
  const Gradients sum = gradients(vl.model, both);
  ASSERT_EQ(sum.size(), vl.model.parameters().size());
  for (std::size_t i = 0; i < sum.size(); ++i) {
    double scale = 0, error = 0;
    for (std::size_t j = 0; j < sum[i].second.size(); ++j) {
      const float expected = one[i].second[j] + two[i].second[j];
      error = std::max(error, std::abs(static_cast<double>(sum[i].second[j] - expected)));
      scale = std::max(scale, std::abs(static_cast<double>(expected)));
    }
    EXPECT_LE(error, 1e-5 * scale + 1e-6) << sum[i].first;
  }
  for (const std::string& policy : Policies::names()) {
    EXPECT_EQ(gradients(vl.model, both, policy), sum) << policy;
  }
}

TEST(Qwen2Vl, AFrozenTowerHasNoBackward) {
  const auto vl = build();
  Generator generator{1, 0};
  add_lora(vl.model,
           {.rank = 2, .alpha = 4, .init = LoraInit::random, .targets = {{"q_proj", "v_proj"}, ""}},
           generator);
  for (const std::string& policy : Policies::names()) {
    const auto step = [&](const Batch& batch) {
      return measure_step([&] { return vl.model.loss(batch); }, Policies::named(policy), cpu);
    };
    const StepReport text = step(batch_of({1, 2, 3, 3, 3, 4, 5}, {})), images = step(small());
    EXPECT_GT(images.forward_flops, text.forward_flops);
    EXPECT_EQ(images.tape.replayed_records, text.tape.replayed_records) << policy;
    const auto saved = static_cast<std::size_t>(MemoryKind::saved);
    EXPECT_EQ(images.peak[saved], text.peak[saved]) << policy;
  }
  const Gradients found = gradients(vl.model, [&] { return vl.model.loss(small()); });
  EXPECT_EQ(found.size(), 8u);
  for (const auto& [path, gradient] : found) {
    EXPECT_THAT(path, HasSubstr("lora_"));
  }
}

TEST(Qwen2Vl, ADryRunPredictsThePeak) {
  const auto real = build(), shapes = build("", {meta, DType::f32});
  expect_predicted_peak(real.model, shapes.model, small());
}

TEST(Qwen2Vl, BothGenerationsOfNamesLoad) {
  const auto vl = build();
  const Batch batch = small();
  const Floats expected = logits(vl.model, batch);
  const Folder published;
  ASSERT_TRUE(save_model(vl.model, published.path().string()).ok());
  const auto file = SafetensorsFile::open(published.at("model.safetensors"));
  ASSERT_TRUE(file.ok());
  for (const std::string key :
       {"visual.patch_embed.proj.weight", "visual.merger.mlp.2.bias", "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}) {
    EXPECT_NE(file->find(key), nullptr) << key;
  }
  EXPECT_EQ(file->tensors().size(), vl.model.parameters().size());
  const Folder newer;
  std::vector<NamedTensor> tensors;
  for (const NamedParameter& entry : vl.model.named_parameters()) {
    tensors.push_back({entry.path, entry.parameter->value()});
  }
  testing::write(newer.at("config.json"), testing::contents(published.at("config.json")));
  ASSERT_TRUE(write_safetensors(newer.at("model.safetensors"), tensors).ok());
  for (const Folder* folder : {&published, &newer}) {
    const auto loaded = load_model(folder->path().string());
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(logits(dynamic_cast<LanguageModel&>(**loaded), batch), expected);
  }
}

TEST(Qwen2Vl, AdaptersOfBothGenerationsLoad) {
  const Folder old;
  std::filesystem::copy(
      golden("qwen2_vl_lora") / "adapter", old.path(),
      std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
  std::vector<NamedTensor> tensors;
  const auto file = SafetensorsFile::open(
      (golden("qwen2_vl_lora") / "adapter/adapter_model.safetensors").string());
  ASSERT_TRUE(file.ok());
  for (const StoredTensor& tensor : file->tensors()) {
    const std::string part = "language_model.";
    const std::size_t at = tensor.name.find(part);
    ASSERT_NE(at, std::string::npos) << tensor.name;
    tensors.push_back(
        {std::string(tensor.name).erase(at, part.size()), file->read(tensor.name)->clone()});
  }
  ASSERT_TRUE(write_safetensors(old.at("adapter_model.safetensors"), tensors).ok());
  Floats first;
  for (const std::string& folder :
       {(golden("qwen2_vl_lora") / "adapter").string(), old.path().string()}) {
    const auto model = load_model(golden("qwen2_vl_lora").string());
    ASSERT_TRUE(model.ok()) << model.status();
    const auto config = load_adapter(**model, folder);
    ASSERT_TRUE(config.ok()) << config.status();
    Batch batch;
    batch.ids = Tensor::from(Ids{1, 2, 3, 4}, Shape{1, 4});
    const Floats found = logits(dynamic_cast<LanguageModel&>(**model), batch);
    EXPECT_TRUE(first.empty() || first == found);
    first = found;
    // It is saved under the names of today.
    const Folder out;
    ASSERT_TRUE(save_adapter(**model, out.path().string()).ok());
    const auto saved = SafetensorsFile::open(out.at("adapter_model.safetensors"));
    EXPECT_NE(saved->find("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A"
                          ".weight"),
              nullptr);
  }
}

TEST(Qwen2Vl, WhatIsWrittenBuildsTheSameModel) {
  const auto vl = build(R"(, "tie_word_embeddings": true, "pad_token_id": 2)");
  vl.model.set_source("");
  const std::string written = vl.model.config_json();
  const auto again = try_build(written, {meta, DType::f32});
  ASSERT_TRUE(again.ok()) << again.status();
  auto& second = dynamic_cast<Qwen2Vl&>(**again);
  second.set_source("");
  EXPECT_EQ(second.config_json(), written);
  EXPECT_EQ(count(second), count(vl.model));
  EXPECT_EQ(second.config().sections, vl.model.config().sections);
  EXPECT_EQ(second.config().vision.inner, vl.model.config().vision.inner);
  EXPECT_EQ(second.config().text.padding, 2);
}

TEST(Qwen2Vl, ThePaddingRowHasNoGradient) {
  const auto vl = build(R"(, "pad_token_id": 2)");
  (void)gradients(vl.model, [&] { return vl.model.loss(small()); });
  const Floats table = vl.model.embedding_table().gradient().to_vector<float>();
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_EQ(table[2 * 16 + i], 0);
    EXPECT_NE(table[3 * 16 + i], 0);
  }
}

}  // namespace
}  // namespace reprise::nn

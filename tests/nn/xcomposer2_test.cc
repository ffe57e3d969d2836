// InternLM-XComposer2 beyond its parity cases: whom PLoRA acts on, where image tokens come from,
// what published configs mean.
#include "nn/models/xcomposer2.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include <gtest/gtest.h>

#include "autograd/dropout.h"
#include "autograd/tape.h"
#include "nn/adapters/lora.h"
#include "nn/initialize.h"
#include "nn/lora.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "tests/error_of.h"
#include "tests/nn/files.h"
#include "tests/nn/predicted_peak.h"

namespace reprise::nn {
namespace {

using testing::error_of;
using testing::expect_predicted_peak;

using Ids = std::vector<std::int64_t>;
using Floats = std::vector<float>;

const std::string kDecoder = R"({"model_type": "internlmxcomposer2", "bias": false,
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 23, "max_position_embeddings": 64, "pad_token_id": 2,
    "plora_rank": 3, "vision_config": {"hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": )";
const std::string kSquare = kDecoder + R"(8}, "img_size": 8})";  // 4 tokens an image
const std::string kTiles = kDecoder + "8}}";                     // 1 token a view

absl::StatusOr<std::unique_ptr<Model>> read(const std::string& text,
                                            Place place = {meta, DType::f32}) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  return build_model(json, place);
}

std::unique_ptr<XComposer2> build(const std::string& text, Place place = {}) {
  auto model = read(text, place);
  EXPECT_TRUE(model.ok()) << model.status();
  auto* const found = dynamic_cast<XComposer2*>(model->release());
  EXPECT_NE(found, nullptr);
  Generator generator{7, 0};
  found->initialize(generator);
  for (const NamedParameter& entry : found->named_parameters()) {
    const Tensor value = entry.parameter->write();
    for (std::int64_t i = 0; !value.is_meta() && i < value.numel(); ++i) {
      value.data<float>()[i] += 0.1f * static_cast<float>((i * 7) % 5 - 2);
    }
  }
  return std::unique_ptr<XComposer2>(found);
}

Tensor pixels_of(std::int64_t views, std::int64_t side = 8) {
  Floats values(static_cast<std::size_t>(views * 3 * side * side));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = std::sin(0.37f * static_cast<float>(i));
  }
  return Tensor::from(values, Shape{views, 3, side, side});
}

// Two rows of 7: text; text, the four tokens of an image, text.
Batch some_images() {
  Batch batch;
  batch.ids = Tensor::from(Ids{3, 1, 4, 1, 5, 9, 2, 6, 5, 0, 0, 0, 0, 8}, Shape{2, 7});
  batch.labels =
      Tensor::from(Ids{3, 1, 4, 1, 5, 9, 2, 6, 5, -100, -100, -100, -100, 8}, Shape{2, 7});
  batch.image_tokens = Tensor::from(Ids{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0}, Shape{2, 7});
  batch.pixels = pixels_of(1);
  return batch;
}
Batch no_images() {
  Batch batch = some_images();
  batch.image_tokens = Tensor::zeros(Shape{2, 7}, DType::i64);
  batch.pixels = {};
  return batch;
}
Batch all_images() {
  Batch batch;
  batch.ids = Tensor::zeros(Shape{1, 8}, DType::i64);
  batch.labels = Tensor::from(Ids{3, 1, 4, 1, 5, 9, 2, 6}, Shape{1, 8});
  batch.image_tokens = Tensor::full(Shape{1, 8}, DType::i64, 1);
  batch.pixels = pixels_of(2);
  return batch;
}

Floats logits(LanguageModel& model, const Batch& batch) {
  return model.logits(batch).tensor().to_vector<float>();
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

std::int64_t count(Model& model, const std::string& part = "") {
  std::int64_t sum = 0;
  for (const NamedParameter& entry : model.named_parameters()) {
    sum += entry.path.find(part) != std::string::npos ? entry.parameter->shape().numel() : 0;
  }
  return sum;
}

// What the published files have in common.
std::string published(const std::string& rest) {
  return R"({"bias": false, "hidden_size": 4096, "intermediate_size": 14336,
      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
      "vocab_size": 92544, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "pad_token_id": 2,
      "auto_map": {"AutoModelForCausalLM":
      "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"},
      )" +
         rest + "}";
}
const std::string k2 = published(R"("model_type": "internlmxcomposer2", "img_size": 490,
    "architectures": ["InternLMXComposer2ForCausalLM"], "max_position_embeddings": 32768,
    "rope_scaling": {"type": "dynamic", "factor": 1.0}, "max_length": 4096)");
const std::string k4Khd = published(R"("model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"], "max_position_embeddings": 32768,
    "rope_scaling": null, "max_length": 16384)");
const std::string k25 = published(R"("model_type": "internlmxcomposer2",
    "architectures": ["InternLMXComposer2ForCausalLM"], "max_position_embeddings": 24576,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_length": 16384)");

TEST(XComposer2, SizesOfPublishedModels) {
  const auto two5 = build(k25, {meta, DType::bf16});
  EXPECT_EQ(count(*two5), 8'679'815'168);
  EXPECT_EQ(count(*two5, "Plora_"), 603'979'776);
  EXPECT_EQ(count(*two5, "vision_proj."), 33'562'624);
  EXPECT_EQ(count(*two5, "vit.vision_tower.vision_model."), 304'556'032);
  EXPECT_EQ(count(*two5, "_GN"), 2 * 4096);
  const auto two = build(k2, {meta, DType::bf16});
  EXPECT_EQ(count(*two, "position_embedding"), 1226 * 1024);  // 490 / 14 is 35
  EXPECT_EQ(count(*two, "_GN"), 0);
  EXPECT_EQ(count(*two, "vision_proj.0.weight"), 4096 * 1024);
  EXPECT_EQ(count(*two), 7'737'708'544 + 603'979'776 + 20'979'712 + 304'172'032);
  const auto khd = build(k4Khd, {meta, DType::bf16});
  EXPECT_EQ(count(*khd, "vit."), 303'507'456);
  EXPECT_EQ(count(*khd, "Plora_"), 603'979'776 - 32 * 248 * (4096 + 6144));
}

// The trap: 4KHD's wqkv alone is of rank 8, whose scale is then 16 / 8.
TEST(XComposer2, RankAndScaleOf4Khd) {
  const XComposer2Config khd = build(k4Khd, {meta, DType::bf16})->config();
  EXPECT_TRUE(khd.tiles);
  EXPECT_EQ(khd.plora.rank, 256);
  EXPECT_EQ(khd.plora.scale, 1);
  EXPECT_EQ(khd.plora_qkv.rank, 8);
  EXPECT_EQ(khd.plora_qkv.scale, 2);
  const XComposer2Config two5 = build(k25, {meta, DType::bf16})->config();
  EXPECT_EQ(two5.plora_qkv.rank, 256);
  EXPECT_EQ(two5.plora_qkv.scale, 1);
  EXPECT_EQ(two5.plora_dropout, 0.05);
}

// The trap: model_type may be that of the decoder, and the architecture too.
TEST(XComposer2, IsKnownByItsClassesNotByItsModelType) {
  for (const std::string type : {"internlm2", "internlm", "internlmxcomposer2"}) {
    const auto by_architecture = read(
        R"({"model_type": ")" + type +
        R"(", "num_hidden_layers": 0, "img_size": 224, "architectures": ["InternLMXComposer2ForCausalLM"]})");
    ASSERT_TRUE(by_architecture.ok()) << by_architecture.status();
    EXPECT_EQ((*by_architecture)->type(), "internlmxcomposer2");
  }
  EXPECT_EQ(build(k4Khd, {meta, DType::bf16})->type(), "internlmxcomposer2");
  const auto plain = read(R"({"model_type": "internlm2", "num_hidden_layers": 0,
                              "architectures": ["InternLM2ForCausalLM"]})");
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ((*plain)->type(), "internlm2");
}

TEST(XComposer2, ConfigErrors) {
  const auto problem = [](const std::string& text) {
    return std::string(read(text).status().message());
  };
  EXPECT_EQ(problem(kDecoder + "12}}"),
            "c.json: vision_config.image_size must have an even number of patches of 4, got 12");
  EXPECT_EQ(problem(kDecoder + R"(8}, "img_size": 0})"),
            "c.json: img_size must be at least 1, got 0");
  EXPECT_EQ(problem(kDecoder + R"(8}, "img_size": 8, "plora_dropout": 1})"),
            "c.json: plora_dropout must be from 0 to below 1, got 1");
}

TEST(XComposer2, WhatIsWrittenBuildsTheSameModel) {
  for (const std::string& text : {kSquare, kTiles, k4Khd}) {
    const auto first = read(text);
    ASSERT_TRUE(first.ok()) << first.status();
    (*first)->set_source("");
    const std::string written = (*first)->config_json();
    const auto second = read(written);
    ASSERT_TRUE(second.ok()) << second.status();
    (*second)->set_source("");
    EXPECT_EQ((*second)->config_json(), written);
    EXPECT_EQ(count(**first), count(**second));
    const auto& one = dynamic_cast<XComposer2&>(**first).config();
    const auto& two = dynamic_cast<XComposer2&>(**second).config();
    EXPECT_EQ(one.tiles, two.tiles);
    EXPECT_EQ(one.plora_qkv.scale, two.plora_qkv.scale);
  }
}

TEST(XComposer2, ATiedHeadMayBeInTheFile) {
  const auto tied = read(kDecoder + R"(8}, "tie_word_embeddings": true})"), apart = read(kSquare);
  ASSERT_TRUE(tied.ok()) << tied.status();
  EXPECT_EQ((*tied)->head(), nullptr);
  EXPECT_TRUE((*tied)->is_buffer("output.weight"));
  EXPECT_FALSE((*apart)->is_buffer("output.weight"));
}

// What no config says: rank, image size and tiles are those of the weights.
TEST(XComposer2, SizesComeFromTheWeights) {
  const auto square = load_model(testing::golden("xcomposer2").string());
  ASSERT_TRUE(square.ok()) << square.status();
  const auto& two = dynamic_cast<XComposer2&>(**square).config();
  EXPECT_EQ(two.plora.rank, 4);
  EXPECT_EQ(two.plora_qkv.scale, 1);
  EXPECT_FALSE(two.tiles);
  const auto tiles = load_model(testing::golden("xcomposer2_tiles").string());
  ASSERT_TRUE(tiles.ok()) << tiles.status();
  const auto& khd = dynamic_cast<XComposer2&>(**tiles).config();
  EXPECT_EQ(khd.plora.rank, 4);
  EXPECT_EQ(khd.plora_qkv.rank, 8);
  EXPECT_EQ(khd.plora_qkv.scale, 2);
  EXPECT_TRUE(khd.tiles);

  // Back and forth, bit by bit, from a config that says neither.
  const testing::Folder folder;
  ASSERT_TRUE(save_model(**tiles, folder.path().string()).ok());
  const auto again = load_model(folder.path().string());
  ASSERT_TRUE(again.ok()) << again.status();
  const auto before = (*tiles)->named_parameters(), after = (*again)->named_parameters();
  ASSERT_EQ(before.size(), after.size());
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(before[i].path, after[i].path);
    EXPECT_EQ(before[i].parameter->value().to_vector<float>(),
              after[i].parameter->value().to_vector<float>());
  }
  // A square image needs its size, which the table of positions has but the file must have too.
  std::filesystem::copy(
      testing::golden("xcomposer2"), folder.path(),
      std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
  auto config = nlohmann::json::parse(testing::contents(folder.at("config.json")));
  config.erase("img_size");
  testing::write(folder.at("config.json"), config.dump());
  EXPECT_EQ(load_model(folder.path().string()).status().message(),
            folder.at("config.json") +
                ": img_size is missing, and the weights have no separators of tiles");
}

TEST(XComposer2, PloraActsOnImageTokensOnly) {
  const auto model = build(kSquare);
  const Floats images = logits(*model, some_images()), text = logits(*model, no_images());
  for (const NamedParameter& entry : model->named_parameters()) {
    if (entry.path.find("Plora_B") != std::string::npos) {
      entry.parameter->write().zero();
    }
  }
  const Floats without = logits(*model, some_images());
  EXPECT_EQ(logits(*model, no_images()), text);
  // The row of text, and what stands before the image.
  EXPECT_TRUE(std::equal(without.begin(), without.begin() + 9 * 23, images.begin()));
  for (std::size_t t = 9; t < 14; ++t) {  // the image, and what sees it
    EXPECT_FALSE(std::equal(without.begin() + static_cast<std::ptrdiff_t>(t * 23),
                            without.begin() + static_cast<std::ptrdiff_t>(t * 23 + 23),
                            images.begin() + static_cast<std::ptrdiff_t>(t * 23)))
        << t;
  }
}

TEST(XComposer2, OnAllTokensPloraIsAChangeOfTheWeights) {
  const auto model = build(kSquare);
  const Floats expected = logits(*model, all_images());
  for (const NamedModule& entry : model->named_modules()) {
    auto* const layer = dynamic_cast<PloraLinear*>(entry.module);
    if (layer == nullptr) {
      continue;
    }
    const Tensor weight = layer->weight.write(), a = layer->plora_a.value(),
                 b = layer->plora_b.write();
    for (std::int64_t o = 0; o < layer->out(); ++o) {
      for (std::int64_t i = 0; i < layer->in(); ++i) {
        for (std::int64_t r = 0; r < 3; ++r) {
          weight.data<float>()[o * layer->in() + i] +=
              b.data<float>()[o * 3 + r] * a.data<float>()[r * layer->in() + i];
        }
      }
    }
    b.zero();
  }
  const Floats found = logits(*model, all_images());
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 1e-4 * (1 + std::abs(expected[i])));
  }
}

// The trap: a batch of text still trains nothing of PLoRA, with gradients that are there.
TEST(XComposer2, WithoutImageTokensPloraHasZeroGradients) {
  const auto model = build(kSquare);
  for (const bool given : {true, false}) {
    Batch batch = no_images();
    if (!given) {
      batch.image_tokens = {};
    }
    int zeros = 0;
    for (const auto& [path, gradient] : gradients(*model, batch)) {
      EXPECT_FALSE(path.starts_with("vit.") || path.starts_with("vision_proj.")) << path;
      if (path.find("Plora_") != std::string::npos) {
        EXPECT_EQ(gradient, Floats(gradient.size(), 0.0f)) << path;
        ++zeros;
      }
    }
    EXPECT_EQ(zeros, 2 * 5 * 2);  // layers, linears, A and B
  }
}

// The trap: the last hidden state of the tower, not the last but one, and not normed.
TEST(XComposer2, ImagesAreTheLastHiddenStateOfTheTower) {
  const auto model = build(kSquare);
  const auto found = gradients(*model, some_images());
  int last = 0;
  for (const auto& [path, gradient] : found) {
    EXPECT_EQ(path.find("post_layernorm"), std::string::npos);
    last += path.find("vision_model.encoder.layers.1.") != std::string::npos ? 1 : 0;
  }
  EXPECT_EQ(last, 16);
  EXPECT_EQ(found.size() + 2, model->parameters().size());
}

TEST(XComposer2, PloraDropoutIsOnInTraining) {
  const auto model = build(kSquare);
  Generator generator{1, 0};
  const auto loss = [&](const Batch& batch) { return model->loss(batch).tensor().item<float>(); };
  const float still = loss(all_images()), text = loss(no_images());
  model->train(generator);
  EXPECT_NE(loss(all_images()), still);
  EXPECT_EQ(loss(no_images()), text);
  model->evaluate();
  EXPECT_EQ(loss(all_images()), still);
  const auto run = [&](const std::string& policy) {
    generator = {5, 100};
    model->train(generator);
    return gradients(*model, some_images(), Policies::named(policy));
  };
  const auto expected = run("keep-all");
  for (const std::string& name : Policies::names()) {
    EXPECT_EQ(run(name), expected) << name;
  }
}

TEST(XComposer2, AdaptersGoAroundPloraOnAllTokens) {
  const auto model = build(kSquare);
  const Floats before = logits(*model, no_images());
  LoraConfig config{.rank = 2, .init = LoraInit::random};
  config.targets.names = {"attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
                          "feed_forward.w3"};
  Generator generator{2, 0};
  add_lora(*model, config, generator);
  const Floats after = logits(*model, no_images());
  EXPECT_FALSE(std::equal(before.begin(), before.begin() + 23, after.begin()));
  const auto found = gradients(*model, some_images());
  EXPECT_EQ(found.size(), 2u * 5 * 2);
  for (const auto& [path, gradient] : found) {
    EXPECT_NE(path.find(".lora_"), std::string::npos) << path;
    EXPECT_NE(gradient, Floats(gradient.size(), 0.0f)) << path;
  }
}

// As PEFT computes it around any layer, with P the layer's own output, f = m / |W + s B A|:
//   y = P + (f - 1) (P - b) + f s B A x, and where dropout is on P + (f - 1) W x~ + f s B A x~.
TEST(XComposer2, WeightDecomposedAdaptersScalePloraToo) {
  const Place place{cpu, DType::f32};
  PloraLinear layer(6, 5, {.bias = true}, {.rank = 2, .scale = 1.5}, /*dropout=*/0, place);
  Generator generator{11, 0};
  for (Parameter* p : layer.parameters()) {
    fill_normal(p->write(), 1, generator);
  }
  Lora lora({.in = 6, .out = 5, .rank = 3, .scale = 0.5, .dropout = 0.4, .weight_decomposed = true},
            place);
  lora.initialize(LoraInit::random, generator);
  fill_normal(lora.magnitude.write(), 1, generator);
  const Tensor x = Tensor::empty({1, 4, 6}, DType::f32);
  fill_normal(x, 1, generator);
  const Tensor images = Tensor::from(std::vector<std::int64_t>{1, 2}, {2});
  const Floats own = layer(x, images).tensor().to_vector<float>();
  layer.set_lora(&lora);
  const auto weight = layer.weight.value().to_vector<float>();
  const auto a = lora.a.value().to_vector<float>(), b = lora.b.value().to_vector<float>();
  const auto bias = layer.bias.value().to_vector<float>();
  const auto m = lora.magnitude.value().to_vector<float>();
  for (const bool dropped : {false, true}) {
    Generator draws{12, 0}, same = draws;
    if (dropped) {
      layer.train(draws);
    }
    const Floats in = (dropped ? dropout(x, 0.4, same).tensor() : x).to_vector<float>();
    const Floats y = layer(x, images).tensor().to_vector<float>();
    for (std::size_t o = 0; o < 5; ++o) {
      double squares = 0, product[4] = {}, low[4] = {};
      for (std::size_t i = 0; i < 6; ++i) {
        double delta = 0;
        for (std::size_t r = 0; r < 3; ++r) {
          delta += 0.5 * b[o * 3 + r] * a[r * 6 + i];
        }
        squares += std::pow(weight[o * 6 + i] + delta, 2);
        for (std::size_t t = 0; t < 4; ++t) {
          product[t] += static_cast<double>(weight[o * 6 + i]) * in[t * 6 + i];
          low[t] += delta * in[t * 6 + i];
        }
      }
      const double f = m[o] / std::sqrt(squares);
      for (std::size_t t = 0; t < 4; ++t) {
        const double base = own[t * 5 + o];
        const double scaled = dropped ? product[t] : base - bias[o];
        EXPECT_NEAR(y[t * 5 + o], base + (f - 1) * scaled + f * low[t], 1e-4) << dropped << o << t;
      }
    }
  }
}

// The trap: for PEFT, A and B would be linear layers like all others.
TEST(XComposer2, AllLinearLeavesPloraAlone) {
  const auto model = build(kSquare, {meta, DType::f32});
  int blocks = 0;
  for (const std::string& path : lora_targets(*model, {.all_linear = true})) {
    EXPECT_EQ(path.find("Plora"), std::string::npos) << path;
    EXPECT_NE(path, "output");
    blocks += path.starts_with("model.layers.") ? 1 : 0;
  }
  EXPECT_EQ(blocks, 2 * 5);
}

TEST(XComposer2, AdaptersOfThePublishedRecipe) {
  const auto model = build(k25, {meta, DType::bf16});
  LoraConfig config{.rank = 64, .alpha = 64};
  config.targets.names = {"attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
                          "feed_forward.w3"};
  Generator generator;
  add_lora(*model, config, generator);
  EXPECT_EQ(count(*model, ".lora_"), 150'994'944);
}

// The checks of the fact sheet, on shapes alone.
TEST(XComposer2, TokensOfAnImageInTiles) {
  const auto model = build(
      published(
          R"("model_type": "internlmxcomposer2", "num_hidden_layers": 0, "max_position_embeddings": 24576,
                                        "vision_config": {"num_hidden_layers": 0})"),
      {meta, DType::bf16});
  for (const auto& [grid, tokens] : std::vector<std::pair<Ids, std::int64_t>>{
           {{1, 3, 4}, 5281}, {{1, 3, 5}, 6481}, {{1, 1, 1}, 841}}) {
    Batch batch;
    batch.grids = Tensor::from(grid, Shape{1, 3}, meta);
    batch.pixels = Tensor::empty(Shape{1 + grid[1] * grid[2], 3, 560, 560}, DType::f32, meta);
    EXPECT_EQ(model->image_features(batch).shape(), (Shape{tokens, 4096}));
  }
}

// The order of tokens, seen through the projector: a view, its separators, then tiles by rows.
TEST(XComposer2, TilesAreAssembledRowByRow) {
  const auto model = build(kTiles);
  model->plora_glb_GN.write().data<float>()[0] += 1;
  const auto features = [&](const Tensor& pixels, const Ids& grids) {
    Batch batch;
    batch.pixels = pixels;
    batch.grids = Tensor::from(grids, Shape{static_cast<std::int64_t>(grids.size() / 3), 3});
    return model->image_features(batch).tensor();
  };
  // Views of 2 x 2 patches are one token each: view sub glb | tile tile sub | tile tile sub.
  const Tensor pixels = pixels_of(5);
  const Tensor found = features(pixels, {1, 2, 2});
  ASSERT_EQ(found.shape(), (Shape{9, 16}));
  const auto row = [&](const Tensor& x, std::int64_t i) {
    return x.slice(0, i, i + 1).to_vector<float>();
  };
  EXPECT_EQ(row(found, 1), row(found, 5));  // sub
  EXPECT_EQ(row(found, 1), row(found, 8));
  EXPECT_NE(row(found, 1), row(found, 2));     // glb
  const auto alone = [&](std::int64_t view) {  // as the view of an image of its own
    const Tensor one = Tensor::zeros(Shape{2, 3, 8, 8}, DType::f32);
    one.slice(0, 0, 1).copy_from(pixels.slice(0, view, view + 1));
    return row(features(one, {1, 1, 1}), 0);
  };
  const std::vector<std::int64_t> places = {0, 3, 4, 6, 7};
  for (std::int64_t view = 0; view < 5; ++view) {
    const Floats a = row(found, places[static_cast<std::size_t>(view)]), b = alone(view);
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(a[i], b[i], 1e-5) << view;
    }
  }
  // Images follow one another.
  const Tensor two = features(pixels, {1, 1, 2, 1, 1, 1});
  EXPECT_EQ(two.size(0), 6 + 5);
}

TEST(XComposer2, ViewsOfAnImage) {
  Floats values(3 * 8 * 12);
  std::iota(values.begin(), values.end(), 0.0f);
  const Tensor image = Tensor::from(values, Shape{3, 8, 12});
  const Tensor views = xcomposer2_views(image, 4);
  ASSERT_EQ(views.shape(), (Shape{7, 3, 4, 4}));
  const float* const v = views.data<float>();
  // Tile (1, 2) is number 6; its channel 1, row 2, column 3 is (1, 4 + 2, 8 + 3) of the image.
  EXPECT_EQ(v[((6 * 3 + 1) * 4 + 2) * 4 + 3], values[(1 * 8 + 6) * 12 + 11]);
  // The resized image keeps a plane a plane away from its edges: (dst + 1/2) in / out - 1/2.
  const float at = v[((0 * 3 + 0) * 4 + 1) * 4 + 1];
  EXPECT_NEAR(at, (1.5f * 2 - 0.5f) * 12 + (1.5f * 3 - 0.5f), 1e-3);
  EXPECT_EQ(error_of([&] { (void)xcomposer2_views(image, 5); }),
            "[views] image must be f32 [3, H, W], H and W multiples of 5, got f32 [3, 8, 12]");
}

TEST(XComposer2, ADryRunPredictsThePeak) {
  const auto real = build(kTiles), shapes = build(kTiles, {meta, DType::f32});
  Batch batch = some_images();  // 1 + 1 view of a token each: view sub glb tile sub
  batch.ids = Tensor::from(Ids{3, 1, 4, 1, 5, 9, 2, 6, 0, 0, 0, 0, 0, 8}, Shape{2, 7});
  batch.image_tokens = Tensor::from(Ids{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0}, Shape{2, 7});
  batch.pixels = pixels_of(2);
  batch.grids = Tensor::from(Ids{1, 1, 1}, Shape{1, 3});
  expect_predicted_peak(*real, *shapes, batch);
}

TEST(XComposer2, Mistakes) {
  const auto square = build(kSquare), tiles = build(kTiles);
  const auto with = [&](XComposer2& model, const std::function<void(Batch&)>& change) {
    return error_of([&] {
      Batch batch = some_images();
      change(batch);
      (void)model.loss(batch);
    });
  };
  EXPECT_EQ(with(*square, [](Batch&) {}), "no error");
  EXPECT_EQ(with(*square, [](Batch& b) { b.pixels = pixels_of(2); }),
            "[model] the images give 8 tokens, but image_tokens has 4 of them");
  EXPECT_EQ(with(*square, [](Batch& b) { b.image_tokens = {}; }),
            "[model] the images give 4 tokens, but image_tokens has 0 of them");
  EXPECT_EQ(with(*square, [](Batch& b) { b.pixels = {}; }),
            "[model] image_tokens has 4 of them, but there are no pixels");
  EXPECT_EQ(with(*square, [](Batch& b) { b.image_tokens = Tensor::zeros(Shape{7}, DType::i64); }),
            "[model] image_tokens must be i64 [B, T] = [2, 7], got i64 [7]");
  EXPECT_EQ(with(*square,
                 [](Batch& b) {
                   b.grids = Tensor::from(Ids{1, 1, 1}, Shape{1, 3});
                 }),
            "[model] grids must be absent: this model's images are one view each");
  EXPECT_EQ(with(*tiles, [](Batch&) {}), "[model] grids must be i64 [images, 3], got nothing");
  EXPECT_EQ(with(*tiles,
                 [](Batch& b) {
                   b.grids = Tensor::from(Ids{1, 1, 1}, Shape{1, 3});
                 }),
            "[model] grids stand for 2 views, got pixels of 1");
  for (const Ids& grid : {Ids{2, 1, 1}, Ids{1, 0, 1}, Ids{1, 1, INT64_MAX}, Ids{1, -1, -1}}) {
    EXPECT_NE(with(*tiles,
                   [&](Batch& b) {
                     b.grids = Tensor::from(grid, Shape{1, 3});
                   })
                  .find("[model] grids of 1 views must be (1, height, width) in tiles, got ("),
              std::string::npos);
  }
  EXPECT_EQ(with(*tiles,
                 [](Batch& b) {
                   b.pixels = pixels_of(2, 12);
                   b.grids = Tensor::from(Ids{1, 1, 1}, Shape{1, 3});
                 }),
            "[model] pixels must have an even number of patches along each side, got 3 x 3");
}

}  // namespace
}  // namespace reprise::nn

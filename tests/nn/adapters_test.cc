// Adapters beyond one plain LoRA: several by name, DoRA, embeddings, other dtypes, merging, export.
#include <cmath>
#include <cstring>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autograd/reduce.h"
#include "autograd/tape.h"
#include "nn/embedding.h"
#include "nn/initialize.h"
#include "nn/linear.h"
#include "nn/lora.h"
#include "nn/models/clip.h"
#include "nn/models/qwen2_vl.h"
#include "nn/models/xcomposer2.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "tests/error_of.h"
#include "tests/nn/adapter_models.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::backward_of;
using testing::batch_of;
using testing::bytes_of;
using ::testing::ElementsAre;
using testing::error_of;
using testing::Folder;
using testing::golden;
using testing::load;
using testing::logits;
using testing::relative;

TEST(Adapters, SwitchingOnAndOffIsBitwise) {
  const std::string name = "qwen2_lora";
  const auto model = load(name);
  const Batch batch = batch_of(name);
  const auto base = logits(*model, batch);
  const auto base_bytes = bytes_of(*model);
  ASSERT_TRUE(load_adapter(*model, (golden(name) / "adapter").string(), "first").ok());
  const auto first = logits(*model, batch);
  Generator generator{5, 0};
  add_lora(*model,
           {.rank = 2,
            .init = LoraInit::random,
            .targets = {{"up_proj"}, ""},
            .modules_to_save = {"lm_head"},
            .bias = "all"},
           generator, "second");
  // What it trains besides is a copy.
  model->find_parameter("lm_head.weight")->write().data<float>()[3] += 1;
  model->find_parameter("model.layers.0.self_attn.q_proj.bias")->write().data<float>()[0] += 1;
  const auto second = logits(*model, batch);
  EXPECT_THAT(adapter_names(*model), ElementsAre("first", "second"));
  EXPECT_EQ(active_adapter(*model), "second");
  EXPECT_NE(first, base);
  EXPECT_NE(second, first);
  for (int round = 0; round < 2; ++round) {
    deactivate_adapters(*model);
    EXPECT_EQ(active_adapter(*model), "");
    EXPECT_EQ(logits(*model, batch), base);
    EXPECT_TRUE(bytes_of(*model) == base_bytes);
    EXPECT_TRUE(model->trainable_parameters().empty());
    activate_adapter(*model, "first");
    EXPECT_EQ(logits(*model, batch), first);
    EXPECT_EQ(model->trainable_parameters().size(), 28u);
    EXPECT_EQ(model->find_parameter("model.layers.0.mlp.up_proj.lora_A.weight")->shape()[0], 4);
    activate_adapter(*model, "second");
    EXPECT_EQ(logits(*model, batch), second);
    EXPECT_EQ(model->trainable_parameters().size(), 2u * 2 + 1 + 6);
    EXPECT_EQ(model->find_parameter("model.layers.0.mlp.up_proj.lora_A.weight")->shape()[0], 2);
  }
  // A save writes the model without any.
  const Folder out;
  ASSERT_TRUE(save_model(*model, out.path().string()).ok());
  EXPECT_TRUE(bytes_of(**load_model(out.path().string())) == base_bytes);
  // Gradients of the active one alone.
  backward_of(*model, batch);
  std::size_t with = 0;
  for (const Parameter* p : model->parameters()) {
    with += p->has_gradient() ? 1 : 0;
  }
  EXPECT_EQ(with, 11u);
  remove_adapter(*model, "second");
  EXPECT_EQ(logits(*model, batch), base);
  EXPECT_THAT(adapter_names(*model), ElementsAre("first"));
  EXPECT_EQ(error_of([&] { activate_adapter(*model, "second"); }),
            "[lora] the model has no adapter \"second\"");
  EXPECT_EQ(error_of([&] { add_lora(*model, {}, generator, "first"); }),
            "[lora] the model has an adapter \"first\" already");
}

TEST(Adapters, WhatCannotBeLoadedLeavesTheModelAsItWas) {
  const auto model = load("qwen2_lora");
  model->find_parameter("model.norm.weight")->set_trainable(false);
  const auto before = bytes_of(*model);
  // Of a base with another width.
  const auto config = nlohmann::json::parse(
      testing::contents(golden("qwen2_lora") / "adapter/adapter_config.json"));
  const Folder folder;
  testing::write(folder.at("adapter_config.json"), config.dump());
  std::vector<NamedTensor> tensors;
  const auto file =
      SafetensorsFile::open((golden("qwen2_lora") / "adapter/adapter_model.safetensors").string());
  for (const StoredTensor& tensor : file->tensors()) {
    const Tensor value = *file->read(tensor.name);
    const bool narrow = tensor.name.ends_with("0.self_attn.q_proj.lora_A.weight");
    tensors.push_back({tensor.name, narrow ? Tensor::zeros({4, 48}, DType::f32) : value});
  }
  ASSERT_TRUE(write_safetensors(folder.at("adapter_model.safetensors"), tensors).ok());
  const auto loaded = load_adapter(*model, folder.path().string());
  EXPECT_EQ(std::string(loaded.status().message()),
            folder.at("adapter_model.safetensors") +
                ": the adapter is for another base or rank: "
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight must have shape "
                "[4, 32], got [4, 48]");
  EXPECT_TRUE(bytes_of(*model) == before);
  EXPECT_TRUE(adapter_names(*model).empty());
  EXPECT_FALSE(model->find_parameter("model.norm.weight")->trainable());
  EXPECT_TRUE(model->find_parameter("lm_head.weight")->trainable());
  // The one that was active is again.
  Generator generator;
  add_lora(*model, {}, generator, "mine");
  EXPECT_FALSE(load_adapter(*model, folder.path().string()).ok());
  EXPECT_EQ(active_adapter(*model), "mine");
  EXPECT_EQ(model->trainable_parameters().size(), 8u);
}

TEST(Adapters, OfABf16ModelAreF32AndAreWrittenSo) {
  const std::string name = "qwen2_lora";
  const auto model = load(name, DType::bf16);
  ASSERT_TRUE(load_adapter(*model, (golden(name) / "adapter").string()).ok());
  const Batch batch = batch_of(name);
  backward_of(*model, batch);
  for (const NamedParameter& entry : model->named_parameters()) {
    EXPECT_EQ(entry.parameter->dtype(), entry.adapter ? DType::f32 : DType::bf16) << entry.path;
    if (entry.adapter) {
      EXPECT_EQ(entry.parameter->gradient().dtype(), DType::f32) << entry.path;
    }
  }
  const Folder out;
  ASSERT_TRUE(save_adapter(*model, out.path().string()).ok());
  EXPECT_TRUE(testing::contents(out.at("adapter_model.safetensors")) ==
              testing::contents(golden(name) / "adapter/adapter_model.safetensors"));
  // Unless they are to be of the model's type.
  const auto narrow = load(name, DType::bf16);
  ASSERT_TRUE(load_adapter(*narrow, (golden(name) / "adapter").string(), "x", false).ok());
  for (const Parameter* p : narrow->parameters()) {
    EXPECT_EQ(p->dtype(), DType::bf16);
  }
  EXPECT_LT(relative(logits(*narrow, batch), logits(*model, batch)), 2e-2);
}

// Bytes that the tape keeps of y = layer(x) beyond x, which others may share, and y.
std::int64_t kept_bytes(DType base, bool widen, double dropout) {
  Linear layer(64, 96, {}, Place{cpu, base});
  layer.weight.set_trainable(false);
  Lora lora({.in = 64, .out = 96, .rank = 4, .dropout = dropout},
            Place{cpu, widen ? DType::f32 : base});
  layer.set_lora(&lora);
  Generator generator;
  layer.train(generator);
  Tape tape;
  Tape::Scope scope(tape);
  const Variable x = Variable::leaf(Tensor::zeros(Shape{128, 64}, base));
  const std::int64_t before = allocator(cpu).report().live_bytes;
  const Variable y = layer(x);
  const std::int64_t kept = allocator(cpu).report().live_bytes - before - y.tensor().bytes();
  layer.set_lora(nullptr);
  return kept;
}

TEST(Adapters, KeepTheirInputOnceWhateverItsTypeAndDropout) {
  const std::int64_t u = 128 * 4;  // elements
  EXPECT_EQ(kept_bytes(DType::f32, false, 0), 4 * u);
  EXPECT_EQ(kept_bytes(DType::f32, false, 0.5), 4 * u);
  EXPECT_EQ(kept_bytes(DType::bf16, false, 0.5), 2 * u);
  EXPECT_EQ(kept_bytes(DType::bf16, true, 0.5), 4 * u);
}

TEST(Adapters, InitialValues) {
  const auto model = load("qwen2_lora");
  Generator generator{3, 0};
  add_lora(*model,
           {.rank = 16, .init = LoraInit::gaussian, .targets = {{"down_proj", "embed_tokens"}, ""}},
           generator);
  double squares = 0, count = 0;
  for (const NamedParameter& entry : adapter_parameters(*model)) {
    const auto values = entry.parameter->value().to_vector<float>();
    double own = 0;
    for (const float x : values) {
      own += static_cast<double>(x) * x;
    }
    if (entry.path.ends_with("lora_A.weight")) {
      squares += own;
      count += static_cast<double>(values.size());
    } else if (entry.path.ends_with("lora_embedding_B")) {
      EXPECT_NEAR(std::sqrt(own / static_cast<double>(values.size())), 1, 0.1);
    } else {
      EXPECT_EQ(own, 0) << entry.path;
    }
  }
  EXPECT_NEAR(std::sqrt(squares / count), 1.0 / 16, 0.006);
}

TEST(Adapters, APaddingRowHasNoGradientThroughAnEmbeddingsAdapter) {
  const auto model = load("llama_lora_embedding");
  ASSERT_TRUE(load_adapter(*model, (golden("llama_lora_embedding") / "adapter").string()).ok());
  const Batch batch = batch_of("llama_lora_embedding");
  const std::vector<std::int64_t> ids = batch.ids.to_vector<std::int64_t>();
  ASSERT_EQ(std::count(ids.begin(), ids.end(), 5), 2);
  backward_of(*model, batch);
  const Parameter& a = *model->find_parameter("model.embed_tokens.lora_embedding_A");
  const auto gradient = a.gradient().to_vector<float>();
  const auto rows = static_cast<std::size_t>(a.shape()[1]);
  double padding = 0, other = 0;
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    (i % rows == 5 ? padding : other) += std::abs(gradient[i]);
  }
  EXPECT_EQ(padding, 0);
  EXPECT_GT(other, 0);
}

TEST(Adapters, WeightDecomposedStartsAsTheModelItself) {
  for (const std::string name : {"qwen2_dora", "gpt2", "llama"}) {
    const auto model = load(name);
    const Batch batch = batch_of(name);
    const auto before = logits(*model, batch);
    Generator generator{3, 0};
    add_lora(*model, {.rank = 4, .weight_decomposed = true, .all_linear = true}, generator);
    EXPECT_LT(relative(logits(*model, batch), before), 1e-6) << name;
    backward_of(*model, batch);
    for (const NamedParameter& entry : adapter_parameters(*model)) {
      double sum = 0;
      for (const float g : entry.parameter->gradient().to_vector<float>()) {
        sum += std::abs(g);
      }
      EXPECT_EQ(sum == 0, entry.path.ends_with("lora_A.weight")) << entry.path;
    }
  }
}

// With dropout only what was learned sees the dropped input.
TEST(Adapters, WeightDecomposedWithDropout) {
  constexpr std::int64_t kRows = 5, kIn = 8, kOut = 6, kRank = 2;
  constexpr double kP = 0.4, kScale = 0.5;
  Linear layer(kIn, kOut, {.bias = true}, Place{});
  Lora lora({.in = kIn,
             .out = kOut,
             .rank = kRank,
             .scale = kScale,
             .dropout = kP,
             .weight_decomposed = true},
            Place{});
  Generator values{4, 0};
  const auto draw = [&](Parameter& p) {
    std::vector<float> drawn;
    for (std::int64_t i = 0; i < p.shape().numel(); ++i) {
      const auto at = static_cast<std::uint64_t>(i);
      drawn.push_back(static_cast<float>(uniform(philox(9, values.next_offset + at)[0]) + 0.2));
    }
    values.next_offset += 1000;
    p.write().copy_from(Tensor::from(drawn, p.shape()));
    return drawn;
  };
  const auto w = draw(layer.weight), bias = draw(layer.bias), a = draw(lora.a), b = draw(lora.b),
             m = draw(lora.magnitude);
  Parameter input("x", Tensor::zeros({kRows, kIn}, DType::f32));
  const auto x = draw(input);
  layer.set_lora(&lora);
  Generator generator{11, 40};
  layer.train(generator);
  const auto y = layer(input.value()).tensor().to_vector<float>();
  EXPECT_EQ(generator.next_offset, 40u + kRows * kIn / 4);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t o = 0; o < kOut; ++o) {
      double whole = bias[static_cast<std::size_t>(o)], dropped = 0, adapted = 0, squares = 0;
      for (std::int64_t i = 0; i < kIn; ++i) {
        const auto at = static_cast<std::uint64_t>(row * kIn + i);
        const double from = x[at];
        const bool keep = uniform(philox(11, 40 + at / 4)[at % 4]) >= kP;
        const double weight = w[static_cast<std::size_t>(o * kIn + i)];
        double merged = weight;
        for (std::int64_t r = 0; r < kRank; ++r) {
          merged += kScale * b[static_cast<std::size_t>(o * kRank + r)] *
                    a[static_cast<std::size_t>(r * kIn + i)];
        }
        squares += merged * merged;
        whole += weight * from;
        dropped += keep ? weight * from / (1 - kP) : 0;
        adapted += keep ? merged * from / (1 - kP) : 0;
      }
      const double factor = m[static_cast<std::size_t>(o)] / std::sqrt(squares);
      EXPECT_NEAR(y[static_cast<std::size_t>(row * kOut + o)], whole + factor * adapted - dropped,
                  1e-5);
    }
  }
  // The same under a replay.
  const auto gradients = [&](const char* policy) {
    generator.next_offset = 40;
    for (Parameter* p : {&lora.a, &lora.b, &lora.magnitude}) {
      p->zero_gradient();
    }
    Tape tape;
    const Tape::Scope scope(tape, Policies::named(policy));
    backward(checkpoint("layer", [&] { return mean_square(layer(input.value())); }));
    std::vector<std::vector<float>> all;
    for (const Parameter* p : {&lora.a, &lora.b, &lora.magnitude}) {
      all.push_back(p->gradient().to_vector<float>());
    }
    return all;
  };
  EXPECT_EQ(gradients("keep-all"), gradients("inputs-only"));
  layer.set_lora(nullptr);
}

TEST(Adapters, OfATowerForImages) {
  const auto model = load("clip_vision");
  Generator generator;
  add_lora(*model, {.init = LoraInit::random, .targets = {{"q_proj"}, ""}}, generator);
  const Folder folder;
  ASSERT_TRUE(save_adapter(*model, folder.path().string()).ok());
  const auto config =
      nlohmann::json::parse(testing::contents(folder.path() / "adapter_config.json"));
  EXPECT_TRUE(config["task_type"].is_null());
  const std::string path = folder.at("adapter_model.safetensors");
  std::vector<NamedTensor> tensors;
  {
    const auto file = SafetensorsFile::open(path);
    ASSERT_NE(file->find("base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
              nullptr);
    for (const StoredTensor& tensor : file->tensors()) {
      std::string name = tensor.name;
      name.insert(std::string("base_model.model.").size(), "vision_model.");
      tensors.push_back({name, file->read(tensor.name)->clone()});
    }
  }
  EXPECT_TRUE(load_adapter(*load("clip_vision"), folder.path().string()).ok());
  ASSERT_TRUE(write_safetensors(path, tensors).ok());
  EXPECT_TRUE(load_adapter(*load("clip_vision"), folder.path().string()).ok());
}

TEST(Adapters, AFrozenBaseHasNoGradientsAndTheAdaptersHave) {
  const auto gradients = static_cast<std::size_t>(MemoryKind::gradients);
  const std::int64_t before = allocator(cpu).report().live[gradients];
  const auto model = load("qwen2_lora");
  ASSERT_TRUE(load_adapter(*model, (golden("qwen2_lora") / "adapter").string()).ok());
  backward_of(*model, batch_of("qwen2_lora"), "inputs-only");
  std::int64_t bytes = 0;
  for (const Parameter* p : model->trainable_parameters()) {
    bytes += p->value().bytes();
    double sum = 0;
    for (const float g : p->gradient().to_vector<float>()) {
      sum += std::abs(g);
    }
    EXPECT_GT(sum, 0) << p->name();
  }
  EXPECT_EQ(allocator(cpu).report().live[gradients] - before, bytes);
}

// Blocks in front of the first adapter: neither records nor values nor FLOPs of backward.
TEST(Adapters, AFrozenPrefixKeepsNothing) {
  const auto measured = [](int layers, const char* policy) {
    const std::string config = R"({"model_type": "llama", "vocab_size": 31, "hidden_size": 64,
        "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": )" +
                               std::to_string(layers) + "}";
    JsonReader json = *JsonReader::parse(config, "c.json");
    const auto model = *build_model(json, {meta, DType::f32});
    Generator generator;
    add_lora(*model, {.layers = {layers - 1}}, generator);
    Batch batch;
    batch.ids = batch.labels = Tensor::zeros({2, 40}, DType::i64, meta);
    Tape tape;
    const Tape::Scope scope(tape, Policies::named(policy));
    const std::int64_t before = allocator(meta).report().live_bytes;
    const Variable loss = model->loss(batch);
    const std::int64_t kept = allocator(meta).report().live_bytes - before;
    const std::int64_t records = tape.report().records, segments = tape.report().segments;
    backward(loss);
    EXPECT_GT(kept, 0);
    return std::tuple(kept, records, segments, tape.report().backward_flops);
  };
  for (const char* policy : {"keep-all", "keep-products", "inputs-only", "nested"}) {
    EXPECT_EQ(measured(2, policy), measured(5, policy)) << policy;
  }
}

// The towers of models that see, frozen: as if they ran without a tape.
TEST(Adapters, AFrozenTowerRecordsNothing) {
  for (const std::string name : {"qwen2_vl", "xcomposer2", "clip_vision"}) {
    const auto model = load(name);
    const auto file = SafetensorsFile::open((golden(name) / "parity.safetensors").string());
    const Tensor pixels = *file->read("in.pixel_values");
    std::vector<Qwen2VlGrid> grids;
    if (name == "qwen2_vl") {
      const auto sizes = file->read("in.image_grid_thw")->to_vector<std::int64_t>();
      for (std::size_t i = 0; i < sizes.size(); i += 3) {
        grids.push_back({sizes[i], sizes[i + 1], sizes[i + 2]});
      }
    }
    const auto tower = [&] {
      if (auto* const qwen = dynamic_cast<Qwen2Vl*>(model.get())) {
        return qwen->model.visual(pixels, grids);
      }
      auto* const composer = dynamic_cast<XComposer2*>(model.get());
      return composer != nullptr
                 ? composer->vit.patches(pixels, -1)
                 : dynamic_cast<ClipVision&>(*model).vision_model.patches(pixels, -1);
    };
    Allocator& bytes = allocator(cpu);
    const auto step = [&](const std::string& policy) {
      bytes.reset_peak();
      const std::int64_t before = bytes.report().live_bytes;
      Tape tape;
      const Tape::Scope scope(tape, Policies::named(policy));
      const Variable x = tower();
      EXPECT_EQ(bytes.report().live[static_cast<std::size_t>(MemoryKind::saved)] == 0,
                !x.needs_gradient());
      const std::int64_t kept = bytes.report().live_bytes - before - x.tensor().storage_bytes();
      return std::tuple(tape.report().records, tape.report().segments, kept,
                        bytes.report().peak_bytes - before, x.tensor().to_vector<float>());
    };
    const auto trained = step("inputs-only");
    EXPECT_GT(std::get<0>(trained), 10);
    EXPECT_GT(std::get<1>(trained), 0);
    EXPECT_GT(std::get<2>(trained), 0);
    model->freeze();
    const auto expected = no_grad([&] { return tower(); }).tensor().to_vector<float>();
    const auto first = step("keep-all");
    EXPECT_EQ(std::get<0>(first), 0) << name;
    EXPECT_EQ(std::get<1>(first), 0) << name;
    EXPECT_EQ(std::get<2>(first), 0) << name;
    EXPECT_LT(std::get<3>(first), std::get<3>(trained)) << name;
    EXPECT_EQ(std::get<4>(first), expected) << name;
    for (const std::string& policy : Policies::names()) {
      EXPECT_EQ(step(policy), first) << name << " " << policy;
    }
  }
}

}  // namespace
}  // namespace reprise::nn

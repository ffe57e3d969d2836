// Training steps that are launches of a captured graph, beside the same steps one kernel after
// another, on a cuda device or the SIMT shim's: the same bits.
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/captured_step.h"
#include "core/cuda_device.h"
#include "kernels/elementwise.h"
#include "nn/lora.h"
#include "nn/models/language_model.h"
#include "nn/optimizer/schedule.h"
#include "nn/weights/json.h"
#include "tests/device_models.h"
#include "tests/error_of.h"
#if defined(REPRISE_SHIM_DEVICE)
#include "tests/core/cuda_stand_in.h"
#include "tests/simt/simt.h"
#endif
#include "train/on_device.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

using testing::error_of;

using testing::kDevice;
using testing::kGpt2;
using testing::kLlama;

struct Story {
  const char* name;
  const char* config;
  DType dtype = DType::f32;
  std::int64_t lora = 0;
  bool masters = false;
  double max_norm = 0.5;
  bool every_policy = false;
};
void PrintTo(const Story& story, std::ostream* out) {
  *out << story.name;
}

constexpr Story kAnyStory{"gpt2", kGpt2};

// Batch `number`: other ids each time, some labels ignored, the last tokens of a row padding.
nn::Batch batch_of(int number, std::int64_t tokens = 9, Device device = kDevice) {
  std::vector<std::int64_t> ids, labels, mask;
  for (std::int64_t i = 0; i < 2 * tokens; ++i) {
    ids.push_back((i * i + (3 + number) * i + number) % 59);
    labels.push_back(i % (5 + number) == 3 ? -100 : ids.back());
    mask.push_back(i >= 2 * tokens - 1 - number % 3 ? 0 : 1);
  }
  nn::Batch batch;
  batch.ids = Tensor::from(ids, {2, tokens}, device);
  batch.labels = Tensor::from(labels, {2, tokens}, device);
  batch.mask = Tensor::from(mask, {2, tokens}, device);
  return batch;
}

struct Subject {
  Generator generator{5, 0};
  std::unique_ptr<nn::LanguageModel> model;
  std::unique_ptr<Trainer> trainer;

  Subject(const Story& story, bool graph, const std::string& policy = "inputs-only")
      : Subject(story, graph ? StepGraphs::on : StepGraphs::off, policy) {}
  Subject(const Story& story, StepGraphs graph, const std::string& policy = "inputs-only") {
    auto json = nn::JsonReader::parse(story.config, story.name);
    model = *nn::build_language_model(*json, {kDevice, story.dtype});
    model->initialize(generator);
    if (story.lora > 0) {
      nn::LoraConfig lora;
      lora.rank = story.lora;
      lora.dropout = 0.1;
      lora.all_linear = true;
      nn::add_lora(*model, lora, generator);
    }
    TrainerOptions options{.adamw = {.weight_decay = 0.1},
                           .max_norm = story.max_norm,
                           .policies = Policies::named(policy),
                           .graph = graph};
    options.adamw.master_weights = story.masters;
    trainer = std::make_unique<Trainer>(*model, generator, std::move(options));
  }

  // The bytes of all that is trained, after each of the steps, behind the loss.
  std::vector<std::string> steps(int count) {
    const nn::Schedule schedule(nn::ScheduleKind::linear, 1e-2, 8, 2);
    std::vector<std::string> all;
    for (int i = 0; i < count; ++i) {
      const double loss = trainer->step(batch_of(i), schedule.at(trainer->steps()));
      all.push_back(fmt::format("{}: {}", loss, trained()));
    }
    return all;
  }
  std::string trained() const {
    std::string bytes;
    for (const Parameter* p : trainer->parameters()) {
      const Tensor host = p->value().to(cpu);
      bytes.append(static_cast<const char*>(host.raw()), static_cast<std::size_t>(host.bytes()));
    }
    return fmt::format("{:x} of {} bytes", std::hash<std::string>()(bytes), bytes.size());
  }
};

class StepGraphOnDevice : public ::testing::TestWithParam<Story> {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) {
      GTEST_SKIP() << "there is no device";
    }
    set_checks(false);
  }
  void TearDown() override { set_checks(true); }

 private:
  // The shim runs faster while it does not look for races; the op rows are run with them on.
  static void set_checks([[maybe_unused]] bool on) {
#if defined(REPRISE_SHIM_DEVICE)
    simt::options().check = on;
#endif
  }
};
class StepGraphOfTrainer : public StepGraphOnDevice {};

TEST_P(StepGraphOnDevice, HasTheBitsOfStepsWithout) {
  constexpr int kSteps = 6;
  const std::vector<std::string> expected = Subject(GetParam(), false).steps(kSteps);
  EXPECT_NE(expected[4], expected[5]);
  std::vector<std::string> policies{"inputs-only", "keep-all"};
  if (GetParam().every_policy) {
    policies = Policies::names();
  }
  for (const std::string& policy : policies) {
    Subject run(GetParam(), true, policy);
    EXPECT_EQ(run.steps(kSteps), expected) << policy;
    EXPECT_EQ(run.trainer->launches(), kSteps - 2) << policy;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, StepGraphOnDevice,
    ::testing::Values(Story{.name = "gpt2", .config = kGpt2, .every_policy = true},
                      Story{.name = "llama_lora", .config = kLlama, .lora = 4},
                      Story{.name = "llama_lora_bf16",
                            .config = kLlama,
                            .dtype = DType::bf16,
                            .lora = 4,
                            .max_norm = 0},
                      Story{.name = "llama_bf16_masters",
                            .config = kLlama,
                            .dtype = DType::bf16,
                            .masters = true}),
    [](const auto& story) { return std::string(story.param.name); });

INSTANTIATE_TEST_SUITE_P(One, StepGraphOfTrainer, ::testing::Values(kAnyStory),
                         [](const auto& story) { return std::string(story.param.name); });

// The same batch, and nothing is learned: only what dropout draws is another.
TEST_P(StepGraphOfTrainer, DrawsNewDropoutAtEachLaunch) {
  std::vector<std::vector<double>> losses;
  for (const bool graph : {false, true}) {
    Subject run(GetParam(), graph);
    losses.emplace_back();
    for (int i = 0; i < 6; ++i) {
      losses.back().push_back(run.trainer->step(batch_of(0), 0));
    }
    EXPECT_EQ(run.trainer->launches(), graph ? 4 : 0);
  }
  EXPECT_EQ(losses[1], losses[0]);
  for (std::size_t i = 1; i < losses[1].size(); ++i) {
    EXPECT_NE(losses[1][i], losses[1][i - 1]) << "step " << i;
  }
}

#if defined(REPRISE_SHIM_DEVICE)
TEST_P(StepGraphOfTrainer, IsOneLaunch) {
  auto& runtime = dynamic_cast<testing::CudaStandIn&>(cuda_streams(kDevice).calls());
  Subject run(GetParam(), true);
  std::int64_t kernels = 0, graphs = 0;
  const auto step = [&](int number) {
    const nn::Batch batch = batch_of(number);
    const std::int64_t kernels_before = simt::launches(), graphs_before = runtime.count("launch");
    (void)run.trainer->step(batch, 1e-3);
    kernels = simt::launches() - kernels_before;
    graphs = runtime.count("launch") - graphs_before;
  };
  step(0);
  EXPECT_GT(kernels, 50);
  EXPECT_EQ(graphs, 0);
  for (int number = 1; number < 4; ++number) {
    step(number);
  }
  EXPECT_EQ(kernels, 0);
  EXPECT_EQ(graphs, 1);
  EXPECT_TRUE(runtime.violations().empty()) << runtime.violations().front();
}
#endif

TEST_P(StepGraphOfTrainer, MicroBatchesAreOneGraph) {
  std::vector<std::vector<double>> losses;
  std::string trained;
  for (const bool graph : {false, true}) {
    Subject run(GetParam(), graph, graph ? "keep-products" : "keep-all");
    losses.emplace_back();
    for (int i = 0; i < 5; ++i) {
      const nn::Batch batches[] = {batch_of(i), batch_of(i + 1), batch_of(i + 2)};
      losses.back().push_back(run.trainer->step(batches, 1e-2 / (1 + i), 1.0 / 3));
    }
    EXPECT_EQ(run.trainer->launches(), graph ? 3 : 0);
    trained = graph ? trained : run.trained();
    EXPECT_EQ(run.trained(), trained);
  }
  EXPECT_EQ(losses[1], losses[0]);
}

// Another shape is done as it is, until there are three in a row; from the host or on the device.
TEST_P(StepGraphOfTrainer, AnotherShapeIsAnotherGraph) {
  struct Step {
    std::int64_t tokens, launches;
  };
  const Step steps[] = {{9, 0}, {9, 0}, {9, 1}, {7, 1}, {9, 2}, {7, 2},
                        {7, 2}, {7, 3}, {7, 4}, {9, 4}, {7, 5}};
  Subject plain(GetParam(), false), run(GetParam(), true);
  int number = 0;
  for (const auto& [tokens, launches] : steps) {
    const nn::Batch batch = batch_of(number, tokens);
    const bool from_host = number++ % 2 == 1;
    const double loss = plain.trainer->step(batch, 1e-2);
    EXPECT_EQ(run.trainer->step(from_host ? batch_of(number - 1, tokens, cpu) : batch, 1e-2), loss)
        << number;
    EXPECT_EQ(run.trainer->launches(), launches) << number;
  }
  run.trainer->set_policies(Policies::named("keep-all"));
  (void)run.trainer->step(batch_of(0, 7), 1e-2);
  EXPECT_EQ(run.trainer->launches(), 5) << "the graph had the policies of before";
}

// Evaluation, and steps by hand, between launches.
TEST_P(StepGraphOfTrainer, OtherWorkBetweenLaunches) {
  std::vector<double> results[2];
  for (const bool graph : {false, true}) {
    Subject run(GetParam(), graph);
    for (int i = 0; i < 5; ++i) {
      results[graph].push_back(run.trainer->step(batch_of(i), 1e-2));
      results[graph].push_back(run.trainer->evaluate(batch_of(7, 5 + i)));
      results[graph].push_back(run.trainer->forward_backward(batch_of(8)));
    }
    EXPECT_EQ(run.trainer->launches(), graph ? 3 : 0);
  }
  EXPECT_EQ(results[1], results[0]);
}

TEST_P(StepGraphOfTrainer, ALossThatIsNotFiniteUpdatesNothing) {
  std::string texts[2];
  for (const bool graph : {false, true}) {
    Subject run(GetParam(), graph);
    (void)run.steps(4);
    Parameter& p = *run.trainer->parameters().back();
    const Tensor before = p.value().clone();
    p.write().copy_from(Tensor::full(p.shape(), p.dtype(), std::nan(""), kDevice));
    const std::string trained = run.trained();
    texts[graph] = error_of([&] { (void)run.trainer->step(batch_of(4), 1e-2); });
    EXPECT_EQ(run.trained(), trained);
    EXPECT_EQ(run.trainer->steps(), 4);
    p.write().copy_from(before);
    texts[graph] += fmt::format(", then {}", run.trainer->step(batch_of(5), 1e-2));
  }
  EXPECT_EQ(texts[1], texts[0]);
  EXPECT_TRUE(texts[1].starts_with("[train] the loss is nan at step 5; first op")) << texts[1];
}

// The device finds it, in the launch that would have trained on it.
TEST_P(StepGraphOfTrainer, AWrongIdUpdatesNothing) {
  std::string texts[2];
  for (const bool graph : {false, true}) {
    Subject run(GetParam(), graph);
    (void)run.steps(4);
    nn::Batch wrong = batch_of(4);
    wrong.ids = Tensor::full({2, 9}, DType::i64, 67, kDevice);
    const std::string trained = run.trained();
    texts[graph] = error_of([&] { (void)run.trainer->step(wrong, 1e-2); });
    EXPECT_EQ(run.trained(), trained);
    EXPECT_EQ(run.trainer->steps(), 4);
    EXPECT_TRUE(std::isfinite(run.trainer->step(batch_of(5), 1e-2)));
  }
  EXPECT_EQ(texts[1], texts[0]);
  EXPECT_TRUE(texts[1].starts_with("[embedding] id at position 0 must be in [0, V)")) << texts[1];
}

TEST_P(StepGraphOfTrainer, WhatCannotBeCapturedIsRefused) {
  Subject run(GetParam(), true);
  nn::Batch packed = batch_of(0);
  packed.starts = {{0, 4}, {0}};
  EXPECT_EQ(error_of([&] { (void)run.trainer->step(packed, 1e-2); }),
            "[train] texts that share a row cannot be part of a captured step: train without a "
            "graph, or with a text a row");
  run.trainer->hooks.after = [] {};
  EXPECT_EQ(error_of([&] { (void)run.trainer->step(batch_of(0), 1e-2); }),
            "[train] a step with hooks around backward cannot be captured: train without a graph");
  EXPECT_EQ(error_of([&] { (void)run.trainer->step(std::span<const nn::Batch>(), 1e-2, 1); }),
            "[train] a step needs at least one micro-batch");
}

TEST_P(StepGraphOfTrainer, AutomaticIsOnWhereOpsAreSmall) {
  Subject with(GetParam(), StepGraphs::automatic), without(GetParam(), false);
  EXPECT_EQ(with.steps(6), without.steps(6));
  EXPECT_EQ(with.trainer->launches(), 3);  // one step shows, two are done as they are
  with.trainer->hooks.after = without.trainer->hooks.after = [] {};
  EXPECT_EQ(with.steps(1), without.steps(1));
  EXPECT_EQ(with.trainer->launches(), 3);
}

// Its rotations depend on the highest position, which the host reads.
TEST_P(StepGraphOfTrainer, AutomaticGoesOnWithoutWhereAStepCannotBeCaptured) {
  const Story story{"dynamic", R"({
    "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})"};
  const auto batch = [](int number) {
    nn::Batch all = batch_of(number);
    std::vector<std::int64_t> positions(18);
    for (std::size_t i = 0; i < positions.size(); ++i) {
      positions[i] = static_cast<std::int64_t>(i % 9) + number;
    }
    all.positions = Tensor::from(positions, {2, 9}, kDevice);
    return all;
  };
  Subject on(story, true), automatic(story, StepGraphs::automatic), off(story, false);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(automatic.trainer->step(batch(i), 1e-2), off.trainer->step(batch(i), 1e-2)) << i;
  }
  EXPECT_EQ(automatic.trained(), off.trained());
  EXPECT_EQ(automatic.trainer->launches(), 0);
  const auto three = [&] {
    for (int i = 0; i < 3; ++i) {
      (void)on.trainer->step(batch(i), 1e-2);
    }
  };
  EXPECT_NE(error_of(three).find("cannot be part of a captured step"), std::string::npos);
}

// Labels that lie behind the ids in one tensor are not the ids.
TEST_P(StepGraphOfTrainer, LabelsMayLieBesideTheIds) {
  std::vector<std::string> all[2];
  for (const bool graph : {false, true}) {
    Subject run(GetParam(), graph);
    std::vector<std::int64_t> both(36);
    for (std::size_t i = 0; i < both.size(); ++i) {
      both[i] = static_cast<std::int64_t>(i * 7 % 50);
    }
    const Tensor ids_and_labels = Tensor::from(both, {4, 9});
    nn::Batch batch;
    batch.ids = ids_and_labels.slice(0, 0, 2);
    batch.labels = ids_and_labels.slice(0, 2, 4);
    if (!graph) {
      batch = on(batch, kDevice);
    }
    for (int i = 0; i < 4; ++i) {
      all[graph].push_back(fmt::format("{}: {}", run.trainer->step(batch, 1e-2), run.trained()));
    }
  }
  EXPECT_EQ(all[1], all[0]);
  EXPECT_NE(all[1][0].substr(0, 4), all[1][3].substr(0, 4)) << "it learns";
}

// ---- core/captured_step.h ----------------------------------------------------------------------

TEST_P(StepGraphOfTrainer, ACapturedStepThatTheHostReadsIsRefusedByName) {
  const Tensor x = Tensor::full({8}, DType::f32, 1, kDevice);
  CapturedStep step(kDevice);
  const auto doubled = [&](bool read) {
    return [&x, read] {
      const Tensor y = Tensor::empty({8}, DType::f32, kDevice);
      kernels::scale(x, 2, y);
      if (read) {
        (void)y.to_vector<float>();
      }
      x.copy_from(y);
    };
  };
  EXPECT_EQ(step.run("reads", doubled(true)), CapturedStep::How::plain);
  EXPECT_EQ(step.run("reads", doubled(true)), CapturedStep::How::plain);
  EXPECT_EQ(error_of([&] { step.run("reads", doubled(true)); }),
            "[cuda_copy] cannot be part of a captured step: the host reads or writes elements");
  EXPECT_EQ(x.to_vector<float>()[7], 4) << "the step that was refused has not been done";
  EXPECT_EQ(step.run("reads", doubled(true)), CapturedStep::How::plain);
  EXPECT_EQ(error_of([&] {
              for (int i = 0; i < 3; ++i) {
                step.run("waits", [&] {
                  doubled(false)();
                  cuda_synchronize(kDevice);
                });
              }
            }),
            "[cuda_synchronize] cannot be part of a captured step: the host waits for the device");
  EXPECT_EQ(x.to_vector<float>()[7], 32);
  for (const auto how : {CapturedStep::How::plain, CapturedStep::How::plain,
                         CapturedStep::How::captured, CapturedStep::How::launched}) {
    EXPECT_EQ(step.run("works", doubled(false)), how);
  }
  EXPECT_EQ(x.to_vector<float>()[7], 512);
}

TEST_P(StepGraphOfTrainer, ACapturedStepMayNotFreeWhatWasThereBefore) {
  CapturedStep step(kDevice);
  Tensor kept = Tensor::zeros({8}, DType::f32, kDevice);
  const Tensor to = Tensor::zeros({8}, DType::f32, kDevice);
  const auto replaces = [&] {
    to.copy_from(kept);
    kept = Tensor();
  };
  for (int i = 0; i < 3; ++i) {
    kept = Tensor::full({8}, DType::f32, i, kDevice);
    const std::string error = error_of([&] { step.run("frees", replaces); });
    EXPECT_EQ(error, i < 2 ? "no error"
                           : "[capture] the step frees 1 block of memory that were there before "
                             "it, and cannot be captured: what a captured step reads must stay");
  }
  EXPECT_EQ(error_of([] { CapturedStep on_host(cpu); }),
            "[capture] device must be a cuda device, got cpu");
}

// Two graphs of one device, each with memory of its own.
TEST_P(StepGraphOfTrainer, SeveralCapturedStepsKeepTheirMemory) {
  CapturedStep small(kDevice), large(kDevice);
  const Tensor x = Tensor::full({1 << 12}, DType::f32, 1, kDevice);
  const auto twice = [&](std::int64_t count) {
    return [&x, count] {
      const Tensor part = x.slice(0, 0, count), y = Tensor::empty({count}, DType::f32, kDevice);
      kernels::scale(part, 2, y);
      part.copy_from(y);
    };
  };
  for (int i = 0; i < 4; ++i) {
    small.run("", twice(100));
  }
  for (int i = 0; i < 4; ++i) {
    large.run("", twice(1 << 12));
    small.run("", twice(100));
  }
  EXPECT_EQ(x.to_vector<float>().front(), 1 << 12);
  EXPECT_EQ(x.to_vector<float>().back(), 1 << 4);
}

}  // namespace
}  // namespace reprise::train

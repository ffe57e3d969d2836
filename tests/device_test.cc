// Whole training steps on a cuda device: models, tape, segments and optimizer, by the kernels' cuda
// sides. Built for a device, and for the SIMT shim, whose memory is closed to host code as well.
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "core/cuda_device.h"
#include "core/step_graph.h"
#include "distributed/reducer.h"
#include "kernels/low_rank.h"
#include "kernels/reduce.h"
#include "nn/lora.h"
#include "nn/models/gpt2.h"
#include "nn/models/llama.h"
#include "nn/weights/json.h"
#include "tests/device_models.h"
#include "tests/error_of.h"
#include "tests/op_case.h"
#if defined(REPRISE_SHIM_DEVICE)
#include "tests/simt/device_memory.h"
#include "tests/simt/simt.h"
#endif
#include "train/on_device.h"
#include "train/parity.h"
#include "train/policy_table.h"
#include "train/sample.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

using testing::kDevice;
using testing::kGpt2;
using testing::kLlama;

struct Story {
  const char* name;
  const char* config;
  DType dtype = DType::f32;
  std::int64_t lora = 0;
  bool masters = false;
};
void PrintTo(const Story& story, std::ostream* out) {
  *out << story.name;
}

// The same numbers on every device: they are drawn on the host.
struct Subject {
  Generator generator{5, 0};
  std::unique_ptr<nn::Model> model;
  nn::Batch batch;
  std::unique_ptr<Trainer> trainer;

  Subject(const Story& story, Device device, const std::string& policy = "inputs-only") {
    auto json = nn::JsonReader::parse(story.config, story.name);
    model = *nn::build_model(*json, {device, story.dtype});
    model->initialize(generator);
    if (story.lora > 0) {
      nn::LoraConfig lora;
      lora.rank = story.lora;
      lora.alpha = 16;
      lora.dropout = 0.1;
      lora.all_linear = true;
      nn::add_lora(*model, lora, generator);
    }
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < 2 * 9; ++i) {
      ids.push_back((i * i + 3 * i) % 59);
    }
    batch.ids = batch.labels = Tensor::from(ids, {2, 9}, device);
    std::vector<std::int64_t> tokens(ids.size(), 1);
    tokens.back() = tokens[tokens.size() - 2] = 0;
    batch.mask = Tensor::from(tokens, {2, 9}, device);
    TrainerOptions options{.adamw = {}, .max_norm = 0.5, .policies = Policies::named(policy)};
    options.adamw.master_weights = story.masters;
    trainer = std::make_unique<Trainer>(*model, generator, std::move(options));
  }

  std::vector<double> losses(int steps) {
    std::vector<double> result;
    for (int i = 0; i < steps; ++i) {
      result.push_back(trainer->step(batch, 1e-2));
    }
    return result;
  }
};

std::vector<double> values(const Tensor& tensor) {
  std::vector<double> result;
  if (tensor.dtype() == DType::bf16) {
    for (const bfloat16 x : tensor.to_vector<bfloat16>()) {
      result.push_back(static_cast<double>(to_float(x)));
    }
  } else {
    for (const float x : tensor.to_vector<float>()) {
      result.push_back(static_cast<double>(x));
    }
  }
  return result;
}

// |a - b| / |b| over all gradients together.
double gradient_error(const Subject& ours, const Subject& theirs) {
  double difference = 0, norm = 0;
  const auto& a = ours.trainer->parameters();
  const auto& b = theirs.trainer->parameters();
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i]->gradient().device(), kDevice);
    const std::vector<double> x = values(a[i]->gradient()), y = values(b[i]->gradient());
    for (std::size_t j = 0; j < x.size(); ++j) {
      difference += (x[j] - y[j]) * (x[j] - y[j]);
      norm += y[j] * y[j];
    }
  }
  return std::sqrt(difference / norm);
}

// The shim runs faster while it does not look for races; the op rows are run with them on.
class Unchecked {
 public:
  Unchecked() { set(false); }
  ~Unchecked() { set(true); }
  Unchecked(const Unchecked&) = delete;

 private:
  static void set([[maybe_unused]] bool on) {
#if defined(REPRISE_SHIM_DEVICE)
    simt::options().check = on;
#endif
  }
};

void skip_without_device() {
  if (cuda_device_count() == 0) {
    GTEST_SKIP() << "there is no device";
  }
}

class OnDevice : public ::testing::TestWithParam<Story> {
 protected:
  void SetUp() override { skip_without_device(); }
};
class Devices : public ::testing::Test {
 protected:
  void SetUp() override { skip_without_device(); }
};

TEST_P(OnDevice, AStepIsThatOfTheCpu) {
  const double tolerance = GetParam().dtype == DType::f32 ? 2e-5 : 2e-2;
  Subject ours(GetParam(), kDevice), theirs(GetParam(), cpu);
  const double loss = ours.trainer->forward_backward(ours.batch);  // with the shim's checks
  EXPECT_NEAR(loss, theirs.trainer->forward_backward(theirs.batch), tolerance * 5);
  EXPECT_LT(gradient_error(ours, theirs), tolerance * 2);
}

TEST_P(OnDevice, LossesAreThoseOfTheCpu) {
  const Unchecked faster;
  const double tolerance = GetParam().dtype == DType::f32 ? 2e-4 : 5e-2;
  const std::vector<double> ours = Subject(GetParam(), kDevice).losses(4);
  const std::vector<double> theirs = Subject(GetParam(), cpu).losses(4);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    EXPECT_NEAR(ours[i], theirs[i], tolerance) << "step " << i;
  }
  EXPECT_LT(ours.back(), ours.front());
}

TEST_P(OnDevice, GradientsHaveTheSameBitsUnderEveryPolicyOrderAndRun) {
  const Unchecked faster;
  std::string first;
  const auto expect_same = [&](const std::string& policy, const std::string& how) {
    Subject run(GetParam(), kDevice, policy);
    (void)run.losses(1);  // so that the second step starts from moments and another offset
    (void)run.trainer->forward_backward(run.batch);
    const std::string digest = gradient_digest(run.trainer->parameters());
    first = first.empty() ? digest : first;
    EXPECT_EQ(digest, first) << policy << ", " << how;
  };
  for (const std::string& policy : Policies::names()) {
    expect_same(policy, "the usual schedule");
  }
  expect_same("inputs-only", "again");
  const int last = testing::schedule_count(kDevice) - 1;
  testing::set_schedule(kDevice, last);
  expect_same("inputs-only", "in another schedule");
  testing::set_schedule(kDevice, 0);
}

TEST_P(OnDevice, ADryRunForTheDeviceTakesTheSameBytes) {
  const Unchecked faster;
  for (const std::string& policy : Policies::names()) {
    Subject real(GetParam(), kDevice, policy);
    (void)real.losses(1);
    allocator(kDevice).reset_peak();
    (void)real.losses(1);
    const MemoryReport measured = allocator(kDevice).report();
    const std::int64_t others = measured.live_bytes;
    const DryRunFor stands_for(DeviceKind::cuda);
    const std::int64_t before = allocator(meta).report().live_bytes;
    Subject dry(GetParam(), meta, policy);
    (void)dry.losses(1);
    allocator(meta).reset_peak();
    (void)dry.losses(1);
    const MemoryReport predicted = allocator(meta).report();
    EXPECT_EQ(predicted.peak_bytes - predicted.live_bytes, measured.peak_bytes - others) << policy;
    EXPECT_EQ(predicted.peak_transient_bytes, measured.peak_transient_bytes) << policy;
    EXPECT_EQ(predicted.live_bytes - before, others) << policy;
  }
}

TEST_P(OnDevice, MicroBatchesAddUp) {
  const Unchecked faster;
  Subject ours(GetParam(), kDevice), theirs(GetParam(), cpu);
  for (Subject* run : {&ours, &theirs}) {
    const nn::Batch batches[] = {run->batch, run->batch, run->batch};
    (void)run->trainer->forward_backward(batches, 1.0 / 3);
  }
  EXPECT_LT(gradient_error(ours, theirs), GetParam().dtype == DType::f32 ? 4e-5 : 4e-2);
}

// Two ranks that do the same: what the other has is what this one has.
class Twins final : public distributed::Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 2; }
  bool takes(const Tensor&) const override { return true; }
  void abort(std::string why) override { throw Error(why); }
  void close() override {}
  distributed::Pending start(distributed::Collective collective) override {
    using Kind = distributed::Collective::Kind;
    if (collective.kind == Kind::all_reduce && collective.reduce == distributed::Reduce::sum) {
      EXPECT_EQ(collective.in.device(), kDevice);
      kernels::scale_all({&collective.in, 1}, 2);
    } else if (collective.kind == Kind::all_gather) {
      const std::int64_t half = collective.in.numel();
      const Tensor flat = collective.out.reshape({2 * half});
      flat.slice(0, 0, half).copy_from(collective.in.reshape({half}));
      flat.slice(0, half, 2 * half).copy_from(collective.in.reshape({half}));
    } else {
      EXPECT_TRUE(collective.kind == Kind::agree || collective.kind == Kind::broadcast ||
                  collective.kind == Kind::barrier);
    }
    return distributed::Pending::finished();
  }
};

TEST_P(OnDevice, GradientsAreReducedAndDividedThere) {
  const Unchecked faster;
  Subject alone(GetParam(), kDevice), together(GetParam(), kDevice);
  Twins twins;
  distributed::Reducer reducer(twins, together.trainer->parameters());
  together.trainer->hooks.before = [&](BackwardOptions& options) { reducer.attach(options); };
  together.trainer->hooks.after = [&] { reducer.finish(); };
  EXPECT_EQ(together.losses(2), alone.losses(2));
  EXPECT_EQ(gradient_digest(together.trainer->parameters()),
            gradient_digest(alone.trainer->parameters()));
}

#if defined(REPRISE_SHIM_DEVICE)
// The shim runs what is captured at once: what cannot be captured throws.
TEST_P(OnDevice, ForwardAndBackwardWaitForNothing) {
  const Unchecked faster;
  Subject real(GetParam(), kDevice);
  const DryRunFor stands_for(DeviceKind::cuda);
  Subject shadow(GetParam(), meta);
  for (const bool positions : {false, true}) {
    for (Subject* run : {&real, &shadow}) {
      run->batch.padded_right = true;
      if (positions) {
        run->batch.positions = Tensor::zeros({2, 9}, DType::i64, run->batch.ids.device());
      }
    }
    const Tensor value = Tensor::empty({}, DType::f32, kDevice);
    const auto step = [&](Subject& run) {
      Tape tape;
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      const Variable loss = run.model->loss(run.batch);
      if (!loss.tensor().is_meta()) {
        value.copy_from(loss.tensor());
      }
      backward(loss);
      for (Parameter* p : run.model->parameters()) {
        p->zero_gradient();
      }
    };
    step(real);
    const auto plan = std::make_shared<const MemoryPlan>(plan_step([&] { step(shadow); }));
    StepGraph graph(cuda_streams(kDevice));
    allocator(kDevice).begin_plan(plan);
    EXPECT_EQ(testing::error_of([&] { graph.capture([&] { step(real); }); }), "no error");
    EXPECT_EQ(allocator(kDevice).end_plan().strays, 0);
    EXPECT_TRUE(std::isfinite(value.item<float>()));
  }
}
#endif

#if defined(REPRISE_SHIM_DEVICE)
// What the shim's device has while it lives.
class DeviceBytes {
 public:
  explicit DeviceBytes(std::int64_t bytes) {
    testing::DeviceMemory::instance().total_bytes = bytes;
  }
  ~DeviceBytes() { testing::DeviceMemory::instance().total_bytes = before_; }
  DeviceBytes(const DeviceBytes&) = delete;

 private:
  const std::int64_t before_ = testing::DeviceMemory::instance().total_bytes;
};

// A step whose activations count beside its parameters.
struct LongSubject : Subject {
  LongSubject(const Story& story, const std::string& policy) : Subject(story, kDevice, policy) {
    batch.ids = batch.labels = Tensor::zeros({4, 25}, DType::i64, kDevice);
    batch.mask = Tensor();
  }
};

// The error names the policies that fit: those run where it was thrown, and no others.
TEST_P(OnDevice, WithoutMemoryThePoliciesThatFitAreNamed) {
  const Unchecked faster;
  std::int64_t most = 0, least = INT64_MAX;
  for (const std::string& policy : Policies::names()) {
    const std::int64_t before = allocator(kDevice).report().live_bytes;
    LongSubject run(GetParam(), policy);
    allocator(kDevice).reset_peak();
    (void)run.losses(2);
    const std::int64_t bytes = allocator(kDevice).report().peak_bytes - before;
    most = std::max(most, bytes);
    least = std::min(least, bytes);
  }
  ASSERT_LT(least, most);
  const CudaBytes now = cuda_bytes(kDevice);
  const std::int64_t others = now.total_bytes - now.free_bytes;
  const auto says = [&](const std::string& policy, std::int64_t bytes) {
    const DeviceBytes device(others + bytes);
    LongSubject run(GetParam(), policy);
    return testing::error_of([&] { (void)run.losses(2); });
  };
  const std::int64_t middle = (least + most) / 2;
  const std::string said = says("keep-all", middle);
  EXPECT_TRUE(said.starts_with("[cuda] no memory for ")) << said;
  EXPECT_NE(
      said.find("(" + std::to_string(middle) + " bytes) that cuda:0 has this step fits under: "),
      std::string::npos)
      << said;
  for (const std::string& policy : Policies::names()) {
    const bool named = said.find(" " + policy + " with ") != std::string::npos;
    EXPECT_EQ(says(policy, middle) == "no error", named) << policy << ": " << said;
  }
  EXPECT_EQ(says("inputs-only", most), "no error");
  const std::string none = says("inputs-only", least - 1);
  EXPECT_NE(none.find("; under no policy does this step fit in the "), std::string::npos) << none;
  EXPECT_TRUE(none.ends_with("(" + std::to_string(least) + " bytes)")) << none;
}
#endif

TEST_P(OnDevice, AWrongIdIsNamedByTheStep) {
  const Unchecked faster;
  Subject run(GetParam(), kDevice);
  std::vector<std::int64_t> ids(18, 5), labels = ids;
  ids[11] = 1000;
  labels[4] = -3;
  const auto says = [&](const std::vector<std::int64_t>& numbers,
                        const std::vector<std::int64_t>& targets) {
    nn::Batch batch = run.batch;
    batch.ids = Tensor::from(numbers, {2, 9}, kDevice);
    batch.labels = Tensor::from(targets, {2, 9}, kDevice);
    return testing::error_of([&] { (void)run.trainer->step(batch, 1e-3); });
  };
  const std::string vocabulary = GetParam().config == kGpt2 ? "67" : "61";
  EXPECT_EQ(says(ids, labels),
            "[embedding] id at position 11 must be in [0, V) = [0, " + vocabulary + "), got 1000");
  ids[11] = 6;
  EXPECT_EQ(says(ids, labels),
            "[linear_cross_entropy] label of row 3 must be -100 or in [0, V) = [0, " + vocabulary +
                "), got -3");
  labels[4] = -100;
  EXPECT_EQ(says(ids, labels), "no error");
}

INSTANTIATE_TEST_SUITE_P(
    All, OnDevice,
    ::testing::Values(Story{"gpt2", kGpt2}, Story{"llama_lora", kLlama, DType::f32, 4},
                      Story{"llama_lora_bf16", kLlama, DType::bf16, 4},
                      Story{"llama_bf16_masters", kLlama, DType::bf16, 0, true}),
    [](const auto& story) { return std::string(story.param.name); });

TEST_F(Devices, SampledTextAndEvaluation) {
  const Unchecked faster;
  const Story bytes{"bytes", R"({
    "model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2})"};
  std::string text[2];
  for (const bool device : {false, true}) {
    Subject run(bytes, device ? kDevice : cpu);
    EXPECT_NEAR(run.trainer->evaluate(run.batch), std::log(256), 0.5);
    Generator generator{9, 0};
    run.model->evaluate();
    text[device] =
        sample_text(dynamic_cast<nn::LanguageModel&>(*run.model), "a", 6, 8, 1.0, generator);
  }
  EXPECT_EQ(text[0], text[1]);
}

// A width of which a device makes 512 rows at a time.
TEST_F(Devices, LoraInSeveralPieces) {
  const Unchecked faster;
  constexpr std::int64_t kRows = 516, kWidth = 16384, kRank = 4;
  const auto numbers = [](std::int64_t rows, std::int64_t columns, std::int64_t step) {
    std::vector<float> values(static_cast<std::size_t>(rows * columns));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<std::int64_t>(i) * step % 13 - 6) / 64;
    }
    return Tensor::from(values, {rows, columns});
  };
  const Tensor x = numbers(kRows, kWidth, 5), a = numbers(kRank, kWidth, 7),
               du = numbers(kRows, kRank, 3);
  const kernels::LowRankOptions options{.scale = 2, .probability = 0.25, .seed = 3, .offset = 9};
  std::vector<float> u[2], da[2];
  for (const bool device : {false, true}) {
    const Device place = device ? kDevice : cpu;
    const Tensor to = Tensor::empty({kRows, kRank}, DType::f32, place),
                 gradient = Tensor::empty({kRank, kWidth}, DType::f32, place);
    kernels::low_rank(x.to(place), a.to(place), options, to);
    kernels::low_rank_backward(du.to(place), x.to(place), a.to(place), options, {}, {gradient});
    u[device] = to.to_vector<float>();
    da[device] = gradient.to_vector<float>();
  }
  for (const auto& [ours, theirs] : {std::pair(u[1], u[0]), std::pair(da[1], da[0])}) {
    for (std::size_t i = 0; i < ours.size(); ++i) {
      ASSERT_NEAR(ours[i], theirs[i], 1e-4) << i;
    }
  }
}

TEST_F(Devices, TensorsWithAnyStrides) {
  std::vector<float> numbers(2 * 3 * 4 * 5);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<float>(i);
  }
  const Tensor host = Tensor::from(numbers, {2, 3, 4, 5}), there = host.to(kDevice);
  using View = std::function<Tensor(const Tensor&)>;
  const View views[] = {
      [](const Tensor& x) { return x.transpose(1, 3); },
      [](const Tensor& x) { return x.slice(2, 1, 3); },
      [](const Tensor& x) { return x.slice(3, 1, 5).transpose(0, 2); },
      [](const Tensor& x) { return x.slice(1, 2, 3).slice(3, 4, 5); },
      [](const Tensor& x) { return x.slice(0, 1, 1).transpose(0, 1); },
      [](const Tensor& x) { return x.slice(0, 0, 1).slice(1, 0, 1).slice(2, 0, 1); },
  };
  for (const View& view : views) {
    const Tensor expected = view(host).contiguous(), dense = view(there).contiguous();
    EXPECT_EQ(dense.device(), kDevice);
    EXPECT_TRUE(dense.is_contiguous());
    EXPECT_EQ(dense.to_vector<float>(), expected.to_vector<float>());
    EXPECT_EQ(view(there).to(cpu).to_vector<float>(), expected.to_vector<float>());
    // Into what is strided: from the same device, from the host, and zeros.
    const Tensor target = host.clone(), there_target = there.clone();
    view(target).copy_from(Tensor::full(expected.shape(), DType::f32, -1));
    view(there_target).copy_from(Tensor::full(expected.shape(), DType::f32, -1, kDevice));
    EXPECT_EQ(there_target.to_vector<float>(), target.to_vector<float>());
    view(there_target).copy_from(expected);
    EXPECT_EQ(there_target.to_vector<float>(), numbers);
    view(target).zero();
    view(there_target).zero();
    EXPECT_EQ(there_target.to_vector<float>(), target.to_vector<float>());
  }
  // Rows of 16 bytes that lie together; elements of 2 and 8 bytes.
  for (const DType dtype : {DType::bf16, DType::f32, DType::i64}) {
    Tensor wide = Tensor::zeros({3, 16, 8}, dtype);
    for (std::size_t i = 0; i < static_cast<std::size_t>(wide.bytes()); ++i) {
      static_cast<unsigned char*>(wide.raw())[i] = static_cast<unsigned char>(i * 7);
    }
    const Tensor dense = wide.to(kDevice).transpose(0, 1).contiguous().to(cpu);
    const Tensor expected = wide.transpose(0, 1).contiguous();
    EXPECT_EQ(std::memcmp(dense.raw(), expected.raw(), static_cast<std::size_t>(wide.bytes())), 0);
  }
}

class Parity : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { skip_without_device(); }
};

TEST_P(Parity, HoldsOnTheDeviceUnderEveryPolicy) {
  const Unchecked faster;
  const auto report = run_parity(std::string(REPRISE_SOURCE_DIR) + "/tests/golden/" + GetParam(),
                                 {.device = kDevice, .every_policy = true});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->passed()) << to_text(*report);
}

INSTANTIATE_TEST_SUITE_P(All, Parity, ::testing::Values("gpt2", "qwen2_dora", "internlm2", "clip"),
                         [](const auto& name) { return std::string(name.param); });

TEST_F(Devices, WhatIsNotThereIsRefused) {
  const Device none{DeviceKind::cuda, 99};
  EXPECT_TRUE(std::string(expect_usable(none).message()).ends_with("got cuda:99"))
      << expect_usable(none);
  EXPECT_EQ(run_parity("nowhere", {.device = none}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(expect_usable(kDevice).ok());
}

#if defined(REPRISE_SHIM_DEVICE) && !defined(__SANITIZE_ADDRESS__)
TEST(ShimDeathTest, HostCodeCannotTouchTheMemory) {
  const Tensor there = Tensor::full({4}, DType::f32, 1, kDevice);
  EXPECT_DEATH({ *static_cast<volatile float*>(there.data<float>()) = 2; },
               "the host touches memory of the device");
}
#endif

}  // namespace
}  // namespace reprise::train

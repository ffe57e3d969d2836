#include "train/trainer.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "nn/models/llama.h"
#include "nn/optimizer/adamw.h"

namespace reprise::train {
namespace {

nn::LlamaConfig tiny() {
  nn::LlamaConfig config{.vocabulary = 11, .width = 8, .inner = 12, .layers = 2, .heads = 2};
  config.kv_heads = 2;
  config.head_size = config.rope.dim = 4;
  return config;
}

struct Small {
  nn::Llama model{tiny(), {cpu, DType::f32}};
  Generator generator{3, 0};
  nn::Batch batch;

  Small() {
    model.initialize(generator);
    batch.ids = batch.labels =
        Tensor::from(std::vector<std::int64_t>{1, 2, 3, 4, 5, 6, 7, 8}, Shape{2, 4});
  }
  void spoil(const char* parameter) {
    model.find_parameter(parameter)->write().data<float>()[1] =
        std::numeric_limits<float>::quiet_NaN();
  }
};

template <class F>
std::string problem(F&& f) {
  try {
    f();
  } catch (const Diverged& error) {
    return error.what();
  }
  return "nothing";
}

TEST(CheckFinite, NamesTheFirstOpItsOutputAndItsSegment) {
  Small run;
  run.spoil("model.layers.1.mlp.up_proj.weight");
  Tape tape;
  Tape::Scope scope(tape);
  EXPECT_NO_THROW((void)run.model.loss(run.batch));  // off: nothing is looked at
  tape.reset();
  tape.check_finite(true);
  try {
    (void)run.model.loss(run.batch);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "[linear] output 0 of shape [2, 4, 12] is not finite, in segment layers.1");
  }
  tape.check_finite(false);
  tape.reset();
  EXPECT_NO_THROW((void)run.model.loss(run.batch));
}

TEST(Trainer, ALossThatIsNotFiniteStopsAndNamesStepAndOp) {
  Small run;
  Trainer trainer(run.model, run.generator, {});
  trainer.step(run.batch, 1e-3);
  trainer.step(run.batch, 1e-3);
  run.spoil("model.layers.0.self_attn.o_proj.weight");
  const Tensor before = run.model.find_parameter("model.norm.weight")->value().clone();
  const std::string expected =
      "[linear] output 0 of shape [2, 4, 8] is not finite, in segment layers.0";
  EXPECT_EQ(problem([&] { trainer.step(run.batch, 1e-3); }),
            "[train] the loss is nan at step 3; first op with a non-finite output: " + expected);
  EXPECT_EQ(trainer.steps(), 2);
  const Tensor after = run.model.find_parameter("model.norm.weight")->value();
  EXPECT_EQ(after.to_vector<float>(), before.to_vector<float>());
  EXPECT_EQ(problem([&] { (void)trainer.evaluate(run.batch); }),
            "[train] the loss is nan in evaluation after 2 steps; first op with a non-finite "
            "output: " +
                expected);
}

TEST(Trainer, AGradientThatIsNotFiniteStopsBeforeTheUpdate) {
  Small run;
  Trainer trainer(run.model, run.generator, {});
  Parameter& norm = *run.model.find_parameter("model.norm.weight");
  trainer.hooks.after = [&] {
    norm.write_gradient().data<float>()[2] = std::numeric_limits<float>::infinity();
  };
  const std::vector<float> before = norm.value().to_vector<float>();
  EXPECT_EQ(problem([&] { trainer.step(run.batch, 1e-3); }),
            "[train] the norm of the gradients is inf at step 1; first parameter with a non-finite "
            "gradient: model.norm.weight");
  EXPECT_EQ(norm.value().to_vector<float>(), before);
}

TEST(Trainer, MicroBatchesOfAStepAddUp) {
  Small whole, cut;
  Trainer one(whole.model, whole.generator, {}), two(cut.model, cut.generator, {});
  std::vector<nn::Batch> halves(2);
  for (std::size_t i = 0; i < 2; ++i) {
    const auto row = static_cast<std::int64_t>(i);
    halves[i].ids = halves[i].labels = cut.batch.ids.slice(0, row, row + 1).clone();
  }
  std::vector<std::string> calls;
  two.hooks.before = [&](BackwardOptions&) { calls.push_back("last"); };
  two.hooks.after = [&] { calls.push_back("after last"); };
  two.hooks.before_accumulation = [&](BackwardOptions&) { calls.push_back("one"); };
  two.hooks.after_accumulation = [&] { calls.push_back("after one"); };
  const double loss = one.forward_backward(whole.batch);
  EXPECT_NEAR(two.forward_backward(halves, 0.5), loss, 1e-6);
  EXPECT_EQ(calls, (std::vector<std::string>{"one", "after one", "last", "after last"}));
  for (std::size_t p = 0; p < one.parameters().size(); ++p) {
    const auto expected = one.parameters()[p]->gradient().to_vector<float>();
    const auto got = two.parameters()[p]->gradient().to_vector<float>();
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], 5e-5 + 1.3e-6 * std::abs(expected[i]));
    }
  }
  EXPECT_THROW(two.step(std::span<const nn::Batch>(), 1e-3, 1), Error);
}

TEST(Trainer, EverythingFrozenIsANamedError) {
  Small run;
  run.model.set_trainable("*", false);
  try {
    Trainer(run.model, run.generator, {});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "[train] the model has no trainable parameter: everything is frozen");
  }
}

class WithSpares : public nn::Llama {
 public:
  WithSpares() : nn::Llama(tiny(), {cpu, DType::f32}) {
    Module::add("spare", spare);
    Module::add("other", other);
    name_parameters();
  }
  Parameter spare{"spare", Tensor::zeros(Shape{2}, DType::f32)};
  Parameter other{"other", Tensor::zeros(Shape{3}, DType::f32)};
};

TEST(Trainer, WarnsOnceOfParametersThatTheLossDoesNotReach) {
  Small small;
  const auto warnings = [&](nn::Model& model) {
    model.initialize(small.generator);
    ::testing::internal::CaptureStderr();
    Trainer trainer(model, small.generator, {});
    trainer.step(small.batch, 1e-3);
    trainer.step(small.batch, 1e-3);
    return ::testing::internal::GetCapturedStderr();
  };
  WithSpares model;
  EXPECT_EQ(warnings(model),
            "reprise: warning: the loss does not reach 2 trainable parameters: spare, other\n");
  model.spare.set_trainable(false);
  EXPECT_EQ(warnings(model),
            "reprise: warning: the loss does not reach 1 trainable parameter: other\n");
  EXPECT_EQ(warnings(small.model), "");
}

TEST(Trainer, GoesOnAfterTheWeightIsRepaired) {
  Small run;
  Trainer trainer(run.model, run.generator, {});
  Parameter& weight = *run.model.find_parameter("model.norm.weight");
  run.spoil("model.norm.weight");
  EXPECT_THROW(trainer.step(run.batch, 1e-3), Diverged);
  weight.write().data<float>()[1] = 1;
  const double first = trainer.step(run.batch, 1e-2);
  for (int i = 0; i < 10; ++i) {
    trainer.step(run.batch, 1e-2);
  }
  EXPECT_LT(trainer.evaluate(run.batch), first);
}

}  // namespace
}  // namespace reprise::train

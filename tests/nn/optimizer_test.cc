// AdamW over parameters, schedules and clipping.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/reduce.h"
#include "autograd/tape.h"
#include "nn/optimizer/adamw.h"
#include "nn/optimizer/clip.h"
#include "nn/optimizer/schedule.h"
#include "tests/error_of.h"

namespace reprise::nn {
namespace {

using testing::error_of;

std::unique_ptr<Parameter> parameter(const std::string& name, const std::vector<float>& values,
                                     DType dtype = DType::f32) {
  const Shape shape{static_cast<std::int64_t>(values.size())};
  Tensor value = Tensor::empty(shape, dtype);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::f32) {
      value.data<float>()[i] = values[i];
    } else {
      value.data<bfloat16>()[i] = to_bfloat16(values[i]);
    }
  }
  return std::make_unique<Parameter>(name, value);
}

// The gradient of mean_square: 2 p / n.
void square_backward(Parameter& p) {
  Tape tape;
  Tape::Scope scope(tape);
  backward(mean_square(p));
}

// A gradient of these values.
void set_gradient(Parameter& p, const std::vector<float>& values) {
  p.zero_gradient();
  Tape tape;
  Tape::Scope scope(tape);
  backward(sum(p));
  p.write_gradient().copy_from(Tensor::from(values, p.shape()));
}

// The same, left stale by a sweep that fails.
void make_stale(Parameter& p) {
  Tape tape;
  Tape::Scope scope(tape);
  BackwardOptions options;
  options.on_ready = [](Parameter&) { throw Error("stop"); };
  EXPECT_THROW(backward(sum(p), options), Error);
  ASSERT_TRUE(p.stale());
}

// Values of PyTorch 2.15: torch.optim.AdamW, lr 0.01, weight decay 0.01, four steps.
TEST(AdamWOptimizer, AgreesWithPyTorch) {
  const auto p = parameter("p", {0.5f, -1.25f, 2.0f, 0.0f, -0.003f});
  AdamW optimizer({p.get()}, {.weight_decay = 0.01});
  for (int k = 0; k < 4; ++k) {
    const auto s = static_cast<float>(k);
    set_gradient(*p, {0.1f * (s + 1), -2.0f, 1e-6f, 0.3f - 0.1f * s, 5.0f});
    optimizer.step(0.01);
  }
  const std::vector<double> expected = {0.4609699845314026, -1.2095060348510742, 1.959601640701294,
                                        -0.035953886806964874, -0.04299279674887657};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(p->value().data<float>()[i] / expected[i], 1, 1e-6);
  }
  EXPECT_EQ(optimizer.state()[2].second.item<std::int64_t>(), 4);
}

TEST(AdamWOptimizer, WithoutAGradientNothingMoves) {
  const auto p = parameter("p", {1, 2}), q = parameter("q", {3});
  AdamW optimizer({p.get(), q.get()}, {.weight_decay = 0.5});
  square_backward(*p);
  optimizer.step(0.1);
  EXPECT_EQ(q->value().to_vector<float>(), std::vector<float>{3});
  EXPECT_EQ(q->version(), 0u);
  EXPECT_NE(p->value().to_vector<float>()[0], 1.0f);
  EXPECT_EQ(p->version(), 1u);
  EXPECT_EQ(optimizer.state().size(), 3u);  // m, v and step of p only
  // Its first step is step 1, whenever it comes.
  square_backward(*q);
  optimizer.step(0.1);
  EXPECT_EQ(optimizer.state()[2].second.item<std::int64_t>(), 2);
  EXPECT_EQ(optimizer.state()[5].second.item<std::int64_t>(), 1);
  optimizer.zero_gradients();
  EXPECT_FALSE(p->has_gradient() || q->has_gradient());
}

// As gradients arrive: some of the parameters, then the others, in another order.
TEST(AdamWOptimizer, StepsInPartsHaveTheBitsOfOne) {
  std::vector<std::vector<float>> results[2];
  for (const bool parts : {false, true}) {
    const auto p = parameter("p", {1, 2}), q = parameter("q.bias", {3}), r = parameter("r", {0.5});
    AdamW optimizer({p.get(), q.get(), r.get()}, {.weight_decay = 0.5});
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_gradients();
      square_backward(*p);
      square_backward(*q);
      if (parts) {
        Parameter* last[] = {r.get(), q.get()};  // r has no gradient
        optimizer.step_some(last, 0.1, 0.5);
        Parameter* first[] = {p.get()};
        optimizer.step_some(first, 0.1, 0.5);
      } else {
        optimizer.step(0.1, 0.5);
      }
    }
    for (const Parameter* each : {p.get(), q.get(), r.get()}) {
      results[parts ? 1 : 0].push_back(each->value().to_vector<float>());
    }
    const auto other = parameter("other", {1});
    Parameter* stranger[] = {other.get()};
    try {
      optimizer.step_some(stranger, 0.1);
      FAIL();
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), "[adamw] parameter other is not the optimizer's");
    }
  }
  EXPECT_EQ(results[0], results[1]);
}

// As in a captured step: numbers in memory, counted afterwards. The second parameter has no
// gradient at first.
TEST(AdamWOptimizer, StepsFromMemoryHaveTheBitsOfSteps) {
  std::vector<std::pair<std::string, Tensor>> states[2];
  std::vector<float> values[2];
  for (const bool memory : {false, true}) {
    const auto a = parameter("a", {0.5f, -1.25f}), b = parameter("b", {2.0f});
    const auto c = parameter("c", {0.25f, 3.0f, -0.75f}, DType::bf16);
    AdamW optimizer({a.get(), b.get(), c.get()}, {.weight_decay = 0.1, .master_weights = true});
    const Tensor scalars = Tensor::zeros({3, 8}, DType::f32);
    for (int k = 0; k < 4; ++k) {
      square_backward(*a);
      square_backward(*c);
      if (k > 1) {
        square_backward(*b);
      }
      const double rate = 0.1 / (k + 1), scale = 0.5 + 0.1 * k;
      if (memory) {
        EXPECT_EQ(optimizer.state().size(), k == 0 ? 0 : k < 3 ? 7 : 10);
        scalars.copy_from(optimizer.next_scalars(rate, scale));
        optimizer.step_from(scalars);
        EXPECT_EQ(optimizer.state().size(), k == 0 ? 0 : k < 3 ? 7 : 10) << "before it is counted";
        optimizer.advance();
      } else {
        optimizer.step(rate, scale);
      }
      optimizer.zero_gradients();
    }
    states[memory] = optimizer.state();
    for (const Parameter* p : {a.get(), b.get()}) {
      for (const float x : p->value().to_vector<float>()) {
        values[memory].push_back(x);
      }
    }
    for (const bfloat16 x : c->value().to_vector<bfloat16>()) {
      values[memory].push_back(to_float(x));
    }
    (void)c->write();
    EXPECT_TRUE(error_of([&] {
                  (void)optimizer.next_scalars(0.1);
                }).starts_with("[adamw] c was written after its f32 master was made"));
    EXPECT_EQ(error_of([&] {
                optimizer.step_from(Tensor::zeros({2, 8}, DType::f32));
              }),
              "[adamw] scalars must be f32 [3, 8], got f32 [2, 8]");
  }
  EXPECT_EQ(values[1], values[0]);
  ASSERT_EQ(states[1].size(), states[0].size());
  for (std::size_t i = 0; i < states[0].size(); ++i) {
    EXPECT_EQ(states[1][i].first, states[0][i].first);
    EXPECT_EQ(std::memcmp(states[1][i].second.raw(), states[0][i].second.raw(),
                          static_cast<std::size_t>(states[0][i].second.bytes())),
              0)
        << states[0][i].first;
  }
}

TEST(AdamWOptimizer, GroupsDecayOnTheirOwn) {
  const auto p = parameter("a.weight", {1}), q = parameter("a.bias", {1});
  const std::vector<Parameter*> both = {p.get(), q.get()};
  AdamW optimizer(decay_groups(both, 0.5));
  set_gradient(*p, {0});
  set_gradient(*q, {0});
  optimizer.step(0.1);
  EXPECT_NEAR(p->value().item<float>(), 0.95, 1e-7);
  EXPECT_EQ(q->value().item<float>(), 1.0f);
}

TEST(AdamWOptimizer, NamesThatDoNotDecay) {
  for (const char* name :
       {"h.0.attn.c_attn.bias", "model.norm.weight", "norm", "layers.0.input_layernorm.weight",
        "a.RMSNorm.weight", "layers.1.q_norm.weight", "post_attention_layernorm.weight"}) {
    EXPECT_TRUE(is_decay_excluded(name)) << name;
  }
  for (const char* name : {"wte.weight", "ln_1.weight", "normal.weight", "h.0.abnorm.weight", ""}) {
    EXPECT_FALSE(is_decay_excluded(name)) << name;
  }
}

TEST(AdamWOptimizer, GradientScaleIsThatOfScaledGradients) {
  const auto p = parameter("p", {1, -2}), q = parameter("p", {1, -2});
  AdamW a({p.get()}), b({q.get()});
  set_gradient(*p, {0.75f, 8});
  set_gradient(*q, {0.375f, 4});
  a.step(0.1, 0.5);
  b.step(0.1);
  EXPECT_EQ(p->value().to_vector<float>(), q->value().to_vector<float>());
}

DType dtype_of_state(const AdamW& optimizer, const std::string& name) {
  for (const auto& [key, tensor] : optimizer.state()) {
    if (key == name) {
      return tensor.dtype();
    }
  }
  ADD_FAILURE() << "no " << name;
  return DType::i32;
}

TEST(AdamWOptimizer, MastersAndStateDTypes) {
  const auto p = parameter("p", {1, 1}, DType::bf16);
  AdamW plain({p.get()}), with({p.get()}, {.state_dtype = DType::f32, .master_weights = true});
  square_backward(*p);
  plain.step(0);
  EXPECT_EQ(dtype_of_state(plain, "p.m"), DType::bf16);
  EXPECT_EQ(plain.state().size(), 3u);
  // Steps far below the last bit of a bf16 add up in the master.
  for (int k = 0; k < 100; ++k) {
    with.step(1e-4);
  }
  EXPECT_EQ(dtype_of_state(with, "p.v"), DType::f32);
  EXPECT_EQ(dtype_of_state(with, "p.master"), DType::f32);
  EXPECT_NEAR(to_float(p->value().data<bfloat16>()[0]), 0.99, 2e-3);
  // f32 parameters are their own masters.
  const auto q = parameter("q", {1});
  AdamW own({q.get()}, {.master_weights = true});
  square_backward(*q);
  own.step(0.1);
  EXPECT_EQ(own.state().size(), 3u);
}

TEST(AdamWOptimizer, AValueWrittenBesideItsMasterIsAnError) {
  const auto p = parameter("p", {1, 1}, DType::bf16);
  AdamW optimizer({p.get()}, {.master_weights = true});
  square_backward(*p);
  optimizer.step(0.1);
  p->write().copy_from(Tensor::full({2}, DType::bf16, 4));
  EXPECT_EQ(error_of([&] { optimizer.step(0.1); }),
            "[adamw] p was written after its f32 master was made: call reload_masters(), or load "
            "the optimizer's state after the parameters");
  optimizer.reload_masters();
  optimizer.step(0);
  EXPECT_EQ(to_float(p->value().data<bfloat16>()[0]), 4.0f);
}

// Interrupted after two of four steps, saved, and taken up by another optimizer.
TEST(AdamWOptimizer, GoesOnFromItsStateBitwise) {
  const auto run = [](bool interrupted) {
    const AdamWOptions options{.weight_decay = 0.1, .master_weights = true};
    const auto p = parameter("p", {1, -2, 0.5f}, DType::bf16), q = parameter("q", {3});
    const std::vector<Parameter*> both = {p.get(), q.get()};
    auto optimizer = std::make_unique<AdamW>(both, options);
    for (int k = 0; k < 4; ++k) {
      if (interrupted && k == 2) {
        std::vector<std::pair<std::string, Tensor>> saved;
        for (const auto& [name, tensor] : optimizer->state()) {
          saved.emplace_back(name, tensor.clone());
        }
        optimizer = std::make_unique<AdamW>(both, options);
        optimizer->load_state(saved);
      }
      optimizer->zero_gradients();
      square_backward(*p);
      if (k % 2 == 1) {
        square_backward(*q);
      }
      optimizer->step(0.03);
    }
    std::vector<float> values = q->value().to_vector<float>();
    for (const auto& [name, tensor] : optimizer->state()) {
      if (name == "p.master") {
        const std::vector<float> master = tensor.to_vector<float>();
        values.insert(values.end(), master.begin(), master.end());
      }
    }
    return values;
  };
  EXPECT_EQ(run(true), run(false));
  EXPECT_EQ(run(true).size(), 4u);
}

TEST(AdamWOptimizer, BadStatesChangeNothing) {
  const auto p = parameter("p", {1, 2}), q = parameter("q", {1});
  AdamW optimizer({p.get(), q.get()});
  square_backward(*p);
  optimizer.step(0.1);
  const auto good = optimizer.state();
  const auto message = [&](std::vector<std::pair<std::string, Tensor>> state) {
    const std::string text = error_of([&] { optimizer.load_state(state); });
    EXPECT_TRUE(optimizer.state()[0].second.shares_storage(good[0].second));
    return text;
  };
  auto state = good;
  state.push_back(good[0]);
  EXPECT_EQ(message(state), "[adamw] state p.m is there twice");
  EXPECT_EQ(message({good[0], good[1]}), "[adamw] state lacks p.step");
  EXPECT_EQ(message({good[0], good[2]}), "[adamw] state lacks p.v");
  state = good;
  state.emplace_back("r.m", good[0].second);
  EXPECT_EQ(message(state), "[adamw] state r.m belongs to no parameter of the optimizer");
  state = good;
  state[1].second = Tensor::zeros({3}, DType::f32);
  EXPECT_EQ(message(state), "[adamw] state p.v must be f32 [2], got f32 [3]");
  state = good;
  state[0].second = Tensor::zeros({2}, DType::bf16);
  EXPECT_EQ(message(state), "[adamw] state p.m must be f32 [2], got bf16 [2]");
  state = good;
  state[2].second = Tensor::zeros({}, DType::i64);
  EXPECT_EQ(message(state), "[adamw] state p.step must be 1 or more, got 0");
  state = good;
  state.emplace_back("p.master", good[0].second);
  EXPECT_EQ(message(state), "[adamw] state p.master is for an optimizer with master weights");
  optimizer.load_state(good);
  EXPECT_FALSE(optimizer.state()[0].second.shares_storage(good[0].second));
}

TEST(AdamWOptimizer, Errors) {
  const auto p = parameter("p", {1, 2}), q = parameter("q", {1}), twin = parameter("p", {1}),
             unnamed = parameter("", {1});
  const auto message = [](std::vector<Parameter*> parameters, const AdamWOptions& options = {}) {
    return error_of([&] { AdamW optimizer(std::move(parameters), options); });
  };
  Parameter undefined;
  EXPECT_EQ(message({nullptr}), "[adamw] parameter 0 is not defined");
  EXPECT_EQ(message({p.get(), &undefined}), "[adamw] parameter 1 is not defined");
  EXPECT_EQ(message({p.get(), unnamed.get()}), "[adamw] parameter 1 of shape [1] has no name");
  EXPECT_EQ(message({p.get(), twin.get()}), "[adamw] parameter p is given twice");
  EXPECT_EQ(message({p.get()}, {.state_dtype = DType::f64}),
            "[adamw] state_dtype must be f32 or bf16, got f64");

  AdamW optimizer({p.get(), q.get()});
  square_backward(*p);
  EXPECT_EQ(error_of([&] { optimizer.step(-1); }),
            "[adamw] learning_rate must be 0 or more, got -1");
  EXPECT_EQ(error_of([&] { optimizer.step(0.1, std::nan("")); }),
            "[adamw] gradient_scale must be a number, got nan");
  make_stale(*q);
  const std::string stale =
      "[gradient] the gradient of q is stale after a failed backward: zero it first";
  EXPECT_EQ(error_of([&] { optimizer.step(0.1); }), stale);
  EXPECT_EQ(p->value().to_vector<float>(), (std::vector<float>{1, 2}));
  EXPECT_TRUE(optimizer.state().empty());
  EXPECT_EQ(error_of([&] { (void)global_norm(optimizer.parameters()); }), stale);
  EXPECT_EQ(error_of([&] { clip_global_norm(optimizer.parameters(), 1); }), stale);
  optimizer.zero_gradients();
  optimizer.step(0.1);
}

// Values of PyTorch 2.15: torch.nn.utils.clip_grad_norm_.
TEST(Clip, AgreesWithPyTorch) {
  const auto p = parameter("p", {0, 0, 0}), q = parameter("q", {0, 0}), none = parameter("n", {0});
  const std::vector<Parameter*> all = {p.get(), none.get(), q.get()};
  const auto reset = [&] {
    set_gradient(*p, {3, 4, 12});
    set_gradient(*q, {-8, 6});
  };
  reset();
  EXPECT_NEAR(global_norm(all), 16.401219466856727, 1e-12);
  EXPECT_NEAR(clip_global_norm(all, 2), 16.401219466856727, 1e-12);
  const std::vector<double> expected = {0.36582639813423157, 0.4877685308456421,
                                        1.4633055925369263};
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(p->gradient().data<float>()[i], expected[i], 3e-7);
  }
  EXPECT_NEAR(q->gradient().data<float>()[0], -0.9755370616912842, 3e-7);
  reset();
  EXPECT_NEAR(clip_global_norm(all, 100), 16.401219466856727, 1e-12);
  EXPECT_EQ(p->gradient().to_vector<float>(), (std::vector<float>{3, 4, 12}));
  q->write_gradient().data<float>()[0] = std::nanf("");
  EXPECT_TRUE(std::isnan(clip_global_norm(all, 1)));
  EXPECT_TRUE(std::isnan(p->gradient().data<float>()[0]));
  EXPECT_EQ(clip_global_norm({}, 1), 0.0);
  EXPECT_EQ(error_of([&] { clip_global_norm(all, 0); }),
            "[clip_global_norm] max_norm must be positive, got 0");
}

TEST(Schedule, RatesAsHuggingFaceHasThem) {
  const Schedule linear(ScheduleKind::linear, 2, 10, 4);
  EXPECT_EQ(linear.at(0), 0);
  EXPECT_EQ(linear.at(1), 0.5);
  EXPECT_EQ(linear.at(4), 2);
  EXPECT_EQ(linear.at(7), 1);
  EXPECT_EQ(linear.at(10), 0);
  EXPECT_EQ(linear.at(99), 0);
  const Schedule cosine(ScheduleKind::cosine, 2, 10, 4);
  EXPECT_EQ(cosine.at(2), 1);
  EXPECT_EQ(cosine.at(4), 2);
  EXPECT_NEAR(cosine.at(6), 1.5, 1e-12);
  EXPECT_NEAR(cosine.at(7), 1, 1e-12);
  EXPECT_EQ(cosine.at(10), 0);
  EXPECT_EQ(cosine.at(12), 0);
  const Schedule constant(ScheduleKind::constant, 2, 0, 4);
  EXPECT_EQ(constant.at(3), 1.5);
  EXPECT_EQ(constant.at(1000), 2);
  EXPECT_EQ(Schedule(ScheduleKind::linear, 1, 4).at(0), 1);
  EXPECT_EQ(warmup_steps_of(10, 0.03), 1);
  EXPECT_EQ(warmup_steps_of(10, 0), 0);
}

TEST(Schedule, Names) {
  for (const std::string& name : schedule_names()) {
    EXPECT_EQ(schedule_names()[static_cast<std::size_t>(schedule_named(name))], name);
  }
  EXPECT_EQ(schedule_named("cosine"), ScheduleKind::cosine);
}

TEST(Schedule, Errors) {
  EXPECT_EQ(error_of([] { schedule_named("cosinus"); }),
            "[schedule] kind must be constant, linear or cosine, got \"cosinus\"");
  EXPECT_EQ(error_of([] { warmup_steps_of(10, 1.5); }),
            "[schedule] warmup ratio must be in [0, 1], got 1.5");
  EXPECT_EQ(error_of([] { Schedule(ScheduleKind::linear, -1, 5); }),
            "[schedule] peak must be 0 or more, got -1");
  EXPECT_EQ(error_of([] { Schedule(ScheduleKind::linear, 1, 5, -1); }),
            "[schedule] steps must be 0 or more, got 5 in total and -1 of warmup");
  EXPECT_EQ(error_of([] { (void)Schedule(ScheduleKind::linear, 1, 5).at(-1); }),
            "[schedule] step must be 0 or more, got -1");
}

TEST(AdamWOptimizer, TheDryRunCountsTheSameBytes) {
  const auto bytes = [](Device device) {
    const auto kind = static_cast<std::size_t>(MemoryKind::optimizer);
    const std::int64_t before = allocator(device).report().live[kind];
    Parameter p("p", Tensor::zeros({100}, DType::bf16, device));
    AdamW optimizer({&p}, {.state_dtype = DType::f32, .master_weights = true});
    square_backward(p);
    clip_global_norm(optimizer.parameters(), 1);
    optimizer.step(0.1);
    return allocator(device).report().live[kind] - before;
  };
  EXPECT_EQ(bytes(cpu), 100 * (4 + 4 + 4));
  EXPECT_EQ(bytes(meta), bytes(cpu));
}

}  // namespace
}  // namespace reprise::nn

// Rows of docs/conformance.md on segments in one process, which the tape's own tests do not name.
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "autograd/matmul.h"
#include "core/allocator.h"
#include "tests/autograd/tape_fixture.h"
#include "tests/distributed/conformance/net.h"

namespace reprise::testing {
namespace {

// Loss, gradients of the input and of the parameters.
struct Pass {
  std::vector<float> output, input_gradient;
  Values gradients;
  bool operator==(const Pass&) const = default;
};

template <class F>
Pass pass(const Policies& policies, F&& forward) {
  Net net;
  Tape tape;
  const Tape::Scope scope(tape, policies);
  const Variable x = Variable::leaf(rows_of(0, 0));
  Pass result;
  const Variable out = forward(net, x);
  result.output = out.tensor().template to_vector<float>();
  const Variable loss = mean_square(out);
  const std::vector<Tensor> gradients = grad({&loss, 1}, {&x, 1});
  result.input_gradient = gradients[0].to_vector<float>();
  result.gradients = net.gradients();
  return result;
}

template <class F>
Pass pass(const char* policy, F&& forward) {
  return pass(Policies::named(policy), std::forward<F>(forward));
}

template <class F>
void expect_equal_under_policies(F&& forward) {
  const Pass plain = pass("keep-all", forward);
  EXPECT_TRUE(pass("inputs-only", forward) == plain);
  EXPECT_TRUE(pass("keep-products", forward) == plain);
}

TEST(Checkpoint, SequentialAndModuleList) {
  expect_equal_under_policies([](Net& net, Variable x) {
    for (const nn::Linear* layer : {&net.l1, &net.l2, &net.l3}) {
      x = checkpoint("layer", Net::block, *layer, std::move(x));
    }
    return x;
  });
}

// The peer's sequences raise on a wrong call; here it does not compile.
TEST(Checkpoint, AWrongCallDoesNotCompile) {
  const auto block = [](const nn::Linear& layer, Variable x) { return layer(std::move(x)); };
  static_assert(std::is_invocable_v<decltype(block), const nn::Linear&, Variable>);
  static_assert(!std::is_invocable_v<decltype(block), const nn::Linear&>);
  static_assert(!std::is_invocable_v<decltype(block), Variable, Variable, Variable>);
}

// The peer's two tests: saved values on the host around a segment and what is before and after it,
// and in a part of a segment.
TEST(Checkpoint, SavedValuesInHostMemoryAroundAndInside) {
  Allocator& host = allocator(host_of(cpu));
  const auto around = [&](Net& net, Variable x) {
    x = Net::block(net.l1, std::move(x));
    x = checkpoint("s", [&] { return Net::block(net.l2, Net::block(net.l2, std::move(x))); });
    x = Net::block(net.l3, std::move(x));
    EXPECT_GT(host.report().peak_bytes, 0);
    return x;
  };
  const auto inside = [&](Net& net, const Variable& x) {
    return checkpoint("s", [&] {
      Variable h = Net::block(net.l1, x);
      h = checkpoint("part", [&] { return Net::block(net.l2, Net::block(net.l2, std::move(h))); });
      return Net::block(net.l3, Net::block(net.l1, std::move(h)));
    });
  };
  host.reset_peak();
  Policies policies = Policies().offload("s").offload_outside().offload_distance(0);
  EXPECT_TRUE(pass(policies, around) == pass("inputs-only", [&](Net& net, Variable x) {
                host.reset_peak();
                x = Net::block(net.l1, std::move(x));
                x = checkpoint("s", [&] { return Net::block(net.l2, Net::block(net.l2, x)); });
                return Net::block(net.l3, std::move(x));
              }));
  host.reset_peak();
  const Pass plain = pass("inputs-only", inside);
  EXPECT_EQ(host.report().peak_bytes, 0);
  EXPECT_TRUE(pass(Policies().offload("part").offload_distance(0), inside) == plain);
  EXPECT_GT(host.report().peak_bytes, 0);
  EXPECT_EQ(host.report().live_bytes, 0);
}

TEST(Checkpoint, ASegmentsValuesInHostMemory) {
  const auto forward = [](Net& net, Variable x) {
    for (const nn::Linear* layer : {&net.l1, &net.l2, &net.l3}) {
      x = checkpoint("layer", Net::block, *layer, std::move(x));
    }
    return x;
  };
  const Pass plain = pass("keep-all", forward);
  allocator(host_of(cpu)).reset_peak();
  for (const Policy& policy : {keep_all(), keep_products(), keep_inputs()}) {
    const Policies policies = Policies().set("*", policy).offload("layer").offload_distance(0);
    EXPECT_TRUE(pass(policies, forward) == plain);
    EXPECT_GT(allocator(host_of(cpu)).report().peak_bytes, 0);
    allocator(host_of(cpu)).reset_peak();
  }
}

TEST(Checkpoint, AnOutputWithoutAGradient) {
  expect_equal_under_policies([](Net& net, const Variable& x) {
    const auto [with, without] = checkpoint(
        "s", [&] { return std::pair(Net::block(net.l1, x), detach(Net::block(net.l2, x))); });
    EXPECT_TRUE(with.needs_gradient());
    EXPECT_FALSE(without.needs_gradient());
    return mul(with, without);
  });
}

TEST(Checkpoint, NestedContainersAndNoTensors) {
  struct Options {
    std::optional<float> factor;
    std::map<std::string, std::vector<Variable>> inputs;
  };
  expect_equal_under_policies([](Net& net, const Variable& x) {
    Options options{0.5f, {{"x", {x, x}}}};
    const auto result = checkpoint(
        "s",
        [&](const Options& o, const char* name) {
          const std::vector<Variable>& in = o.inputs.at(name);
          return std::map<std::string, Variable>{
              {"out", scale(Net::block(net.l1, add(in[0], in[1])), o.factor.value_or(1))}};
        },
        options, "x");
    EXPECT_EQ(checkpoint(
                  "s", [](int a, const std::string& b) { return b + std::to_string(a); }, 3, "n"),
              "n3");
    return result.at("out");
  });
}

TEST(Checkpoint, TwoThousandSmallSegments) {
  expect_equal_under_policies([](Net& net, Variable x) {
    for (int i = 0; i < 2000; ++i) {
      x = checkpoint("s", [&] { return scale(silu(std::move(x)), 1.3); });
    }
    return net.l1(std::move(x));
  });
}

// Other work between forward and backward, on another device, does not move a replay.
TEST(Checkpoint, AReplayRunsOnTheDeviceOfItsTensors) {
  Net net;
  Tape tape;
  const Tape::Scope scope(tape, Policies::named("inputs-only"));
  const Variable loss = mean_square(checkpoint("s", Net::block, net.l1, rows_of(0, 0)));
  {
    const Variable elsewhere = Tensor::zeros({4, Net::kWidth}, DType::f32, meta);
    EXPECT_TRUE(no_grad([&] { return silu(elsewhere); }).tensor().is_meta());
  }
  backward(loss);
  EXPECT_EQ(net.l1.weight.gradient().device(), cpu);
}

TEST(Checkpoint, ThereIsOneVariantAndNothingToWarnOf) {
  ::testing::internal::CaptureStderr();
  (void)pass("inputs-only", [](Net& net, Variable x) {
    return checkpoint("s", Net::block, net.l1, std::move(x));
  });
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

// A callable that would do something else the second time: there is no second time.
TEST(Checkpoint, ACallableThatIsNotDeterministicRunsOnce) {
  for (const int change : {-1, 1}) {
    int ops = 3, calls = 0;
    const auto forward = [&](Net& net, Variable x) {
      ops = 3;
      return checkpoint("s", [&] {
        ++calls;
        x = net.l1(std::move(x));
        for (int i = 0; i < ops; ++i) {
          x = silu(std::move(x));
        }
        ops += change;  // fewer, or more, if it ran again
        return x;
      });
    };
    expect_equal_under_policies(forward);
    EXPECT_EQ(calls, 3);
  }
}

// Inputs that need no gradient, and arguments by name.
TEST(Checkpoint, ParametersHaveGradientsWhenNoInputNeedsOne) {
  Values results[2];
  for (const char* policy : {"keep-all", "inputs-only"}) {
    Net net;
    Tape tape;
    const Tape::Scope scope(tape, Policies::named(policy));
    struct Arguments {
      Variable x;
      double factor = 1;
    };
    const Variable out = checkpoint(
        "s", [&](const Arguments& in) { return scale(Net::block(net.l1, in.x), in.factor); },
        Arguments{.x = rows_of(0, 0), .factor = 2});
    backward(mean_square(out));
    EXPECT_TRUE(net.l1.weight.has_gradient());
    results[std::string(policy) == "keep-all" ? 0 : 1] = net.gradients();
  }
  EXPECT_EQ(results[0], results[1]);
}

// Bytes and FLOPs of chains of products, exactly, and the policy that a budget of bytes leaves.
TEST(Checkpoint, BytesAndFlopsOfChainsPerPolicyAreExact) {
  constexpr std::int64_t kN = 64, kLayers = 4, kTensor = kN * kN * 4;
  const std::vector<std::string> best_first{"keep-all", "keep-products", "inputs-only"};
  std::map<std::string, std::int64_t> transient, replayed;
  for (const std::string& policy : best_first) {
    std::vector<std::unique_ptr<Parameter>> weights;
    for (int i = 0; i < kLayers; ++i) {
      weights.push_back(std::make_unique<Parameter>("w" + std::to_string(i),
                                                    Tensor::zeros({kN, kN}, DType::f32, meta)));
    }
    Tape tape;
    const Tape::Scope scope(tape, Policies::named(policy));
    allocator(meta).reset_peak();
    Variable x = Tensor::zeros({kN, kN}, DType::f32, meta);
    const std::int64_t before = allocator(meta).report().live_bytes;
    x = checkpoint("chain", [&] {
      for (auto& w : weights) {
        x = silu(linear(std::move(x), *w));
      }
      return x;
    });
    const std::int64_t held = allocator(meta).report().live_bytes - before;
    // Of each layer the product and the activation are saved; the output is there anyway.
    const std::int64_t expected = policy == "keep-all"        ? 2 * kLayers * kTensor
                                  : policy == "keep-products" ? (kLayers + 1) * kTensor
                                                              : kTensor;
    EXPECT_EQ(held, expected) << policy;
    backward(mean_square(x));
    replayed[policy] = tape.report().replay_flops;
    transient[policy] = held;
  }
  const std::int64_t product = 2 * kN * kN * kN;
  EXPECT_EQ(replayed["keep-all"], 0);
  EXPECT_LT(replayed["keep-products"], product);
  EXPECT_EQ(replayed["inputs-only"] / product, kLayers);
  auto within = [&](std::int64_t budget) {
    for (const std::string& policy : best_first) {
      if (transient[policy] <= budget) {
        return policy;
      }
    }
    return std::string("none");
  };
  EXPECT_EQ(within(8 * kTensor), "keep-all");
  EXPECT_EQ(within(7 * kTensor), "keep-products");
  EXPECT_EQ(within(4 * kTensor), "inputs-only");
  EXPECT_EQ(within(0), "none");
}

// Names and values of parameters do not know of segments.
TEST(Checkpoint, NamesOfParametersAreThoseWithoutSegments) {
  struct Wrapped : nn::Module {
    nn::Linear inner{4, 4, {.bias = true}, {}};
    Wrapped() { add("inner", inner); }
  } module;
  module.inner.weight.write().zero();
  module.inner.bias.write().zero();
  auto names = [&] {
    std::vector<std::string> all;
    for (const nn::NamedParameter& entry : module.named_parameters()) {
      all.push_back(entry.path);
    }
    return all;
  };
  const auto before = names();
  Tape tape;
  const Tape::Scope scope(tape, Policies::named("inputs-only"));
  backward(mean_square(
      checkpoint("s", std::ref(module.inner), Variable(Tensor::zeros({2, 4}, DType::f32)))));
  EXPECT_EQ(names(), before);
  EXPECT_EQ(before, (std::vector<std::string>{"inner.weight", "inner.bias"}));
}

}  // namespace
}  // namespace reprise::testing

#include "nn/module.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/parallel.h"
#include "nn/initialize.h"
#include "nn/linear.h"
#include "nn/norm.h"

namespace reprise::nn {
namespace {

using ::testing::ElementsAre;

class Pair : public Module {
 public:
  explicit Pair(Place place) : first(4, 3, {.bias = true}, place), second(3, 4, {}, place) {
    add("first", first);
    add("second", second);
  }
  Linear first, second;
};

class Tree : public Module {
 public:
  explicit Tree(Place place = {})
      : token("token", parameter_tensor(Shape{5}, place)), norm(4, 1e-5, place) {
    add("token", token);
    add("h", h);
    add("norm", norm);
    h.append(place);
    h.append(place);
    name_parameters();
  }
  Parameter token;
  ModuleList<Pair> h;
  LayerNorm norm;
};

std::vector<std::string> paths(Module& module) {
  std::vector<std::string> result;
  for (const NamedParameter& entry : module.named_parameters()) {
    result.push_back(entry.path);
  }
  return result;
}

TEST(Module, PathsFollowTheTreeAndLeaveAbsentParametersOut) {
  Tree tree;
  EXPECT_THAT(paths(tree), ElementsAre("token", "h.0.first.weight", "h.0.first.bias",
                                       "h.0.second.weight", "h.1.first.weight", "h.1.first.bias",
                                       "h.1.second.weight", "norm.weight", "norm.bias"));
  for (const NamedParameter& entry : tree.named_parameters()) {
    EXPECT_EQ(entry.parameter->name(), entry.path);
    EXPECT_EQ(tree.find_parameter(entry.path), entry.parameter);
  }
  EXPECT_EQ(tree.find_parameter("h.0.second.bias"), nullptr);
  EXPECT_EQ(tree.find_module("h.1.second"), &tree.h[1].second);
  EXPECT_EQ(tree.find_module("h.2"), nullptr);
  EXPECT_EQ(tree.parameters().size(), 9u);
}

TEST(Module, FreezesByPattern) {
  Tree tree;
  EXPECT_EQ(tree.trainable_parameters().size(), 9u);
  EXPECT_EQ(tree.freeze("h.*.weight"), 4);
  EXPECT_EQ(tree.trainable_parameters().size(), 5u);
  EXPECT_FALSE(tree.h[1].second.weight.trainable());
  EXPECT_TRUE(tree.h[1].first.bias.trainable());
  EXPECT_EQ(tree.set_trainable("h.1.*", true), 3);
  EXPECT_TRUE(tree.h[1].second.weight.trainable());
  EXPECT_EQ(tree.freeze("nothing"), 0);
  EXPECT_EQ(tree.freeze(), 9);
  EXPECT_TRUE(tree.trainable_parameters().empty());
}

TEST(Module, TrainingReachesEveryModuleAlsoLaterOnes) {
  Tree tree;
  Generator generator;
  EXPECT_FALSE(tree.training());
  tree.train(generator);
  tree.h.append(Place{});
  for (const NamedModule& entry : tree.named_modules()) {
    EXPECT_TRUE(entry.module->training()) << entry.path;
  }
  tree.evaluate();
  for (const NamedModule& entry : tree.named_modules()) {
    EXPECT_FALSE(entry.module->training()) << entry.path;
  }
}

TEST(Module, OnMetaParametersAreCountedButHaveNoMemory) {
  const auto kind = static_cast<std::size_t>(MemoryKind::parameters);
  const std::int64_t before = allocator(meta).report().live[kind];
  Tree tree({meta, DType::bf16});
  // token 5, two of (12 + 3 + 12), norm 8.
  EXPECT_EQ(allocator(meta).report().live[kind] - before, 2 * (5 + 2 * 27 + 8));
  EXPECT_TRUE(tree.token.value().is_meta());
  EXPECT_THROW((void)tree.token.value().data<bfloat16>(), Error);
}

TEST(Initialize, NormalHasItsMomentsAndIsAFunctionOfTheStream) {
  const Shape shape{100, 1003};
  const Tensor x = Tensor::empty(shape, DType::f32), y = Tensor::empty(shape, DType::f32);
  Generator generator{7, 0};
  fill_normal(x, 0.02, generator);
  EXPECT_EQ(generator.next_offset, 25075u);
  double sum = 0, squares = 0, fourth = 0;
  const std::vector<float> values = x.to_vector<float>();
  for (const float value : values) {
    const double v = value / 0.02;
    sum += v;
    squares += v * v;
    fourth += v * v * v * v;
  }
  const auto count = static_cast<double>(values.size());
  EXPECT_NEAR(sum / count, 0, 0.01);
  EXPECT_NEAR(squares / count, 1, 0.02);
  EXPECT_NEAR(fourth / count, 3, 0.15);

  const int before = threads();
  set_threads(1);
  Generator again{7, 0};
  fill_normal(y, 0.02, again);
  set_threads(before);
  EXPECT_EQ(values, y.to_vector<float>());
  fill_normal(y, 0.02, again);
  EXPECT_NE(values, y.to_vector<float>());
}

TEST(Initialize, Bfloat16RoundsTheSameDrawsAndMetaReservesThem) {
  const Tensor x = Tensor::empty(Shape{33}, DType::f32), y = Tensor::empty(Shape{33}, DType::bf16);
  Generator a{1, 5}, b{1, 5}, c{1, 5};
  fill_uniform(x, -2, 3, a);
  fill_uniform(y, -2, 3, b);
  fill_uniform(Tensor::empty(Shape{33}, DType::f32, meta), -2, 3, c);
  EXPECT_EQ(a.next_offset, 14u);
  EXPECT_EQ(b.next_offset, 14u);
  EXPECT_EQ(c.next_offset, 14u);
  const auto wide = x.to_vector<float>();
  const auto brief = y.to_vector<bfloat16>();
  for (std::size_t i = 0; i < wide.size(); ++i) {
    EXPECT_GE(wide[i], -2);
    EXPECT_LT(wide[i], 3);
    EXPECT_EQ(brief[i].bits, to_bfloat16(wide[i]).bits);
  }
}

}  // namespace
}  // namespace reprise::nn

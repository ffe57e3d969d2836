#include "nn/blocks.h"

#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/dry_run.h"
#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/tape.h"

namespace reprise::nn {
namespace {

constexpr std::int64_t kWidth = 1024;

// Blocks that hold several values each, so that what is kept of a block's interior would show.
Variable block(Variable x) {
  Variable y = gelu(silu(gelu(x)));
  return add(std::move(y), std::move(x));
}

struct Blocks {
  std::size_t count;
  std::vector<std::size_t>* order = nullptr;
  std::size_t size() const { return count; }
  std::size_t operator[](std::size_t i) const { return i; }
};

Variable stack(std::size_t count, Variable x, std::vector<std::size_t>* order = nullptr) {
  const Blocks blocks{count, order};
  x = run_blocks("h", blocks, std::move(x), [&](std::size_t i, Variable in) {
    if (order != nullptr) {
      order->push_back(i);
    }
    return block(std::move(in));
  });
  return sum(std::move(x));
}

StepReport step(std::size_t count, const Policies& policies) {
  return dry_run(
      [&] { return stack(count, Variable::leaf(Tensor::empty(Shape{kWidth}, DType::f32, meta))); },
      policies);
}

TEST(Blocks, RunOnceEachInOrderAlsoWithoutATape) {
  for (const bool nested : {false, true}) {
    std::vector<std::size_t> order;
    Tape tape;
    Tape::Scope scope(tape, Policies().nest(nested));
    const Variable loss = stack(7, Variable::leaf(Tensor::full(Shape{4}, DType::f32, 0.5)), &order);
    backward(loss);
    EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 2, 3, 4, 5, 6}));
  }
  std::vector<std::size_t> order;
  stack(3, Tensor::full(Shape{4}, DType::f32, 0.5), &order);
  EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 2}));
  order.clear();
  Tape tape;
  Tape::Scope scope(tape, Policies().nest());
  stack(0, Variable::leaf(Tensor::full(Shape{4}, DType::f32, 0.5)), &order);
  EXPECT_TRUE(order.empty());
}

TEST(Blocks, OpenASegmentABlockOrNestedHalves) {
  EXPECT_EQ(step(8, Policies()).tape.segments, 8);
  // 8 of one block, 4 of two, 2 of four; the whole has none.
  EXPECT_EQ(step(8, Policies().nest()).tape.segments, 14);
  EXPECT_EQ(step(5, Policies().nest()).tape.segments, 5 + 3);
  EXPECT_EQ(step(1, Policies().nest()).tape.segments, 1);
}

TEST(Blocks, SegmentsAreFoundByName) {
  const auto kept = [](Policies policies) { return step(8, policies).tape.replayed_records; };
  const std::int64_t all = kept(Policies());
  ASSERT_GT(all, 0);
  EXPECT_EQ(kept(Policies().set("h.*", keep_all())), 0);
  // One block of eight is not replayed.
  EXPECT_EQ(kept(Policies().set("h.3", keep_all())), all - all / 8);
  EXPECT_EQ(kept(Policies().set("g.*", keep_all())), all);
}

TEST(Blocks, NestedHoldsLogarithmicallyManyInputs) {
  const auto peak = [](std::size_t count, const Policies& policies) {
    return static_cast<double>(step(count, policies).peak_bytes) / (kWidth * 4);
  };
  for (const std::size_t count : {std::size_t{8}, std::size_t{64}, std::size_t{512}}) {
    const double flat = peak(count, Policies());
    EXPECT_GE(flat, static_cast<double>(count));
    EXPECT_LE(flat, static_cast<double>(count) + 12);
    const double depth = std::log2(static_cast<double>(count));
    EXPECT_LE(peak(count, Policies().nest()), depth + 12) << count;
  }
  EXPECT_LE(peak(512, Policies().nest()) - peak(64, Policies().nest()), 3.01);
}

TEST(Blocks, GradientsAreBitwiseEqual) {
  const auto gradient = [](const Policies& policies) {
    Tape tape;
    Tape::Scope scope(tape, policies);
    const Variable x = Variable::leaf(Tensor::full(Shape{33}, DType::f32, 0.3));
    const Variable loss = stack(6, x);
    const Variable losses[] = {loss}, wrt[] = {x};
    return grad(losses, wrt).front().to_vector<float>();
  };
  const auto expected = gradient(Policies::named("keep-all"));
  for (const std::string& name : Policies::names()) {
    EXPECT_EQ(gradient(Policies::named(name)), expected) << name;
  }
}

}  // namespace
}  // namespace reprise::nn

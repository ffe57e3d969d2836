// Rows chosen by number where the op table cannot tell: no rows at all, and buffers.
#include "autograd/rows.h"

#include <cstdint>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/matmul.h"
#include "autograd/parameter.h"
#include "autograd/reduce.h"
#include "autograd/tape.h"

namespace reprise {
namespace {

Tensor numbers(const std::vector<std::int64_t>& rows) {
  return Tensor::from(rows, {static_cast<std::int64_t>(rows.size())});
}

// What a text without an image is to weights that only images meet.
TEST(Rows, WithoutARowGradientsAreZeroNotAbsent) {
  Parameter a("a", Tensor::full({4, 8}, DType::f32, 2.0));
  Parameter x("x", Tensor::full({3, 8}, DType::f32, 1.0));
  Parameter y("y", Tensor::full({3, 4}, DType::f32, 1.0));
  Tape tape;
  Tape::Scope scope(tape);
  const Tensor none = numbers({});
  const Variable out = add_rows(y, none, linear(take_rows(x, none), a));
  const Variable loss = sum(put_rows(out, none, Tensor::zeros({0, 4}, DType::f32)));
  backward({&loss, 1});
  for (const Parameter* p : {&a, &x}) {
    ASSERT_TRUE(p->has_gradient()) << p->name();
    for (const float g : p->gradient().to_vector<float>()) {
      EXPECT_EQ(g, 0.0f) << p->name();
    }
  }
  for (const float g : y.gradient().to_vector<float>()) {
    EXPECT_EQ(g, 1.0f);
  }
}

TEST(Rows, AnIntermediateThatIsMovedInIsWrittenInPlace) {
  Tape tape;
  Tape::Scope scope(tape);
  const Variable x = Variable::leaf(Tensor::full({3, 8}, DType::f32, 1.0));
  Variable h = take_rows(x, numbers({0, 1, 2}));
  const void* at = h.tensor().raw();
  Variable sum_of_both = add_rows(std::move(h), numbers({1}), Tensor::zeros({1, 8}, DType::f32));
  EXPECT_EQ(sum_of_both.tensor().raw(), at);
  const Variable replaced =
      put_rows(std::move(sum_of_both), numbers({2}), Tensor::zeros({1, 8}, DType::f32));
  EXPECT_EQ(replaced.tensor().raw(), at);
}

}  // namespace
}  // namespace reprise

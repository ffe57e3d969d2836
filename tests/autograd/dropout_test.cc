#include "autograd/dropout.h"

#include <gtest/gtest.h>

#include "autograd/tape.h"

namespace reprise {
namespace {

TEST(Dropout, EachCallTakesItsOwnRange) {
  Generator generator{5, 7};
  const Tensor x = Tensor::full({3, 7}, DType::f32, 1.0);  // 21 words: 6 blocks
  const auto first = dropout(x, 0.5, generator).tensor().to_vector<float>();
  EXPECT_EQ(generator.next_offset, 13u);
  const auto second = dropout(x, 0.5, generator).tensor().to_vector<float>();
  EXPECT_NE(first, second);
  Generator again{5, 7};
  EXPECT_EQ(dropout(x, 0.5, again).tensor().to_vector<float>(), first);
}

TEST(Dropout, AtZeroItIsTheInputAndDrawsNothing) {
  Generator generator{5, 7};
  const Variable x(Tensor::full({4}, DType::f32, 1.0));
  EXPECT_EQ(dropout(x, 0, generator).value(), x.value());
  EXPECT_EQ(generator.next_offset, 7u);
}

}  // namespace
}  // namespace reprise

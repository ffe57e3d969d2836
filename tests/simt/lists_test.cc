// The kernels over lists of tensors, which are no ops: on the device as on the CPU.
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/adamw.h"
#include "kernels/reduce.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

constexpr Device kDevice{DeviceKind::cuda, 0};

void expect_near(const Tensor& actual, const Tensor& expected, double tolerance) {
  const Array a = to_array(actual), e = to_array(expected);
  ASSERT_EQ(a.shape, e.shape);
  for (std::int64_t i = 0; i < e.shape.numel(); ++i) {
    ASSERT_NEAR(a[i], e[i], tolerance * (1 + std::abs(e[i]))) << "element " << i;
  }
}

std::vector<Tensor> drawn(DType dtype, Device device) {
  std::vector<Tensor> tensors;
  for (const std::int64_t count : {7, 0, 2048, 40001}) {
    tensors.push_back(draw_normal(static_cast<std::uint64_t>(count), {count}, dtype, device));
  }
  return tensors;
}

// One dtype for values, gradients and moments each, with masters or without.
struct Dtypes {
  DType value, gradient, state;
  bool master;
};

std::vector<kernels::AdamWTensor> list(const Dtypes& dtypes, Device device) {
  std::vector<kernels::AdamWTensor> result;
  std::uint64_t seed = 0;
  for (const std::int64_t count : {5, 0, 1030, 17}) {
    kernels::AdamWTensor t;
    t.value = draw_normal(++seed, {count}, dtypes.value, device);
    t.gradient = draw_normal(++seed, {count}, dtypes.gradient, device);
    t.m = draw_normal(++seed, {count}, dtypes.state, device);
    t.v = Tensor::full({count}, dtypes.state, 0.5, device);
    if (dtypes.master) {
      t.master = draw_normal(++seed, {count}, DType::f32, device);
    }
    t.decay = 0.01 * static_cast<double>(count % 2);
    t.step = 1 + count % 3;
    result.push_back(t);
  }
  return result;
}

TEST(Lists, AdamWIsThatOfTheCpu_cuda) {
  for (const Dtypes& dtypes : {Dtypes{DType::f32, DType::f32, DType::f32, false},
                               Dtypes{DType::bf16, DType::f32, DType::bf16, false},
                               Dtypes{DType::bf16, DType::bf16, DType::f32, true}}) {
    for (const double beta1 : {0.9, 0.3}) {
      const kernels::AdamWSettings settings{
          .learning_rate = 0.1, .beta1 = beta1, .gradient_scale = 0.5};
      const auto expected = list(dtypes, cpu), actual = list(dtypes, kDevice);
      kernels::adamw(expected, settings);
      kernels::adamw(actual, settings);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const double rounding = dtypes.value == DType::bf16 ? 8e-3 : 1e-6;
        expect_near(actual[i].value, expected[i].value, rounding);
        expect_near(actual[i].m, expected[i].m, dtypes.state == DType::bf16 ? 8e-3 : 1e-6);
        expect_near(actual[i].v, expected[i].v, dtypes.state == DType::bf16 ? 8e-3 : 1e-6);
        if (dtypes.master) {
          expect_near(actual[i].master, expected[i].master, 1e-6);
        }
      }
    }
  }
}

TEST(Lists, NormsAndScalesAreThoseOfTheCpu_cuda) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const auto expected = drawn(dtype, cpu), actual = drawn(dtype, kDevice);
    const auto count = static_cast<std::int64_t>(expected.size());
    for (const DType result : {DType::f32, DType::f64}) {
      const Tensor norms = Tensor::empty({count}, result);
      const Tensor on_device = Tensor::empty({count}, result, kDevice);
      kernels::squared_norms(expected, norms);
      kernels::squared_norms(actual, on_device);
      expect_near(on_device, norms, 1e-5);
    }
    kernels::scale_all(expected, 0.3);
    kernels::scale_all(actual, 0.3);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      expect_near(actual[i], expected[i], 0);
    }
  }
}

}  // namespace
}  // namespace reprise::testing

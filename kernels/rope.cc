#include "kernels/rope.h"

#include <string_view>

#include "kernels/matrix.h"
#include "kernels/rope_sides.h"

namespace reprise::kernels {
namespace {

cpu::Heads heads(std::string_view argument, const Tensor& x) {
  if (x.strides()[3] != 1 && x.size(3) > 1 && x.numel() > 0) {
    fail("rope",
         "{} must have unit stride within a head, got shape {} with other strides: call "
         "contiguous()",
         argument, to_string(x.shape()));
  }
  const bool elements = !x.is_meta() && x.numel() > 0;
  return {elements ? x.raw() : nullptr, x.dtype(), x.strides()[0], x.strides()[1], x.strides()[2]};
}

void check(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, const Tensor& y) {
  expect_trainable("rope", "x", x);
  if (x.rank() != 4) {
    fail("rope", "x must be [B, T, H, D], got {}", to_string(x.shape()));
  }
  expect_dtype("rope", "positions", positions, DType::i64);
  expect_device("rope", "positions", positions, x.device());
  expect_contiguous("rope", "positions", positions);
  if (positions.shape() != Shape{x.size(1)} && positions.shape() != Shape{x.size(0), x.size(1)}) {
    fail("rope", "positions must be [B, T] = [{}, {}] or [T], got {}", x.size(0), x.size(1),
         to_string(positions.shape()));
  }
  expect_dtype("rope", "inv_freq", inv_freq, DType::f32);
  expect_device("rope", "inv_freq", inv_freq, x.device());
  expect_contiguous("rope", "inv_freq", inv_freq);
  if (inv_freq.rank() != 1 || 2 * inv_freq.size(0) > x.size(3)) {
    fail("rope", "inv_freq must be [D_rot / 2] with D_rot at most D = {}, got {}", x.size(3),
         to_string(inv_freq.shape()));
  }
  expect_trainable("rope", "y", y);
  expect_like("rope", "y", y, x, "x");
}

}  // namespace

void rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, RopeOptions options,
          const Tensor& y, bool inverse, bool accumulate) {
  check(x, positions, inv_freq, y);
  const cpu::Heads from = heads("x", x), to = heads("y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("rope", cuda::rope(x, positions, inv_freq, options, y, inverse, accumulate));
  }
  const auto factor = static_cast<float>(options.attention_factor);
  cpu::rope({.x = from,
             .y = to,
             .batch = x.size(0),
             .tokens = x.size(1),
             .heads = x.size(2),
             .size = x.size(3),
             .pairs = inv_freq.size(0),
             .positions = positions.data<std::int64_t>(),
             .positions_batch_stride = positions.rank() == 2 ? x.size(1) : 0,
             .inv_freq = inv_freq.data<float>(),
             .style = options.style,
             .cos_factor = factor,
             .sin_factor = inverse ? -factor : factor,
             .accumulate = accumulate});
}

}  // namespace reprise::kernels

#include "kernels/rope.h"

#include <string_view>

#include "core/cuda_device.h"
#include "kernels/matrix.h"
#include "kernels/rope_sides.h"

namespace reprise::kernels {
namespace {

Heads heads(std::string_view argument, const Tensor& x) {
  if (x.strides()[3] != 1 && x.size(3) > 1 && x.numel() > 0) {
    fail("rope",
         "{} must have unit stride within a head, got shape {} with other strides: call "
         "contiguous()",
         argument, to_string(x.shape()));
  }
  const bool elements = !x.is_meta() && x.numel() > 0;
  return {elements ? x.raw() : nullptr, x.dtype(), x.strides()[0], x.strides()[1], x.strides()[2]};
}

// Without sections there is one, of all pairs.
RopeSections sections_of(const Tensor& positions, const Tensor& inv_freq,
                         const std::vector<std::int64_t>& sizes) {
  RopeSections sections{1, {inv_freq.size(0)}, 0};
  if (sizes.empty()) {
    return sections;
  }
  sections.count = static_cast<int>(sizes.size());
  std::int64_t end = 0;
  for (std::size_t r = 0; r < sizes.size(); ++r) {
    if (sizes[r] < 0) {
      fail("rope", "section {} must not be negative, got {}", r, sizes[r]);
    }
    end += sizes[r];
    sections.ends[r] = end;
  }
  if (end != inv_freq.size(0)) {
    fail("rope", "sections must add up to D_rot / 2 = {}, got {}", inv_freq.size(0), end);
  }
  sections.stride = positions.size(0) == 0 ? 0 : positions.numel() / positions.size(0);
  return sections;
}

void check_positions(const Tensor& x, const Tensor& positions, std::size_t sections) {
  const std::int64_t B = x.size(0), T = x.size(1);
  if (sections == 0) {
    if (positions.shape() != Shape{T} && positions.shape() != Shape{B, T}) {
      fail("rope", "positions must be [B, T] = [{}, {}] or [T], got {}", B, T,
           to_string(positions.shape()));
    }
    return;
  }
  if (sections > kMaxRopeSections) {
    fail("rope", "sections must be at most {}, got {}", kMaxRopeSections, sections);
  }
  const auto R = static_cast<std::int64_t>(sections);
  if (positions.shape() != Shape{R, T} && positions.shape() != Shape{R, B, T}) {
    fail("rope", "positions must be [R, B, T] = [{}, {}, {}] or [R, T], got {}", R, B, T,
         to_string(positions.shape()));
  }
}

void check(const Tensor& x, const Tensor& positions, const Tensor& inv_freq,
           const RopeOptions& options, const Tensor& y) {
  expect_trainable("rope", "x", x);
  if (x.rank() != 4) {
    fail("rope", "x must be [B, T, H, D], got {}", to_string(x.shape()));
  }
  expect_dtype("rope", "positions", positions, DType::i64);
  expect_device("rope", "positions", positions, x.device());
  expect_contiguous("rope", "positions", positions);
  check_positions(x, positions, options.sections.size());
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

void rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq,
          const RopeOptions& options, const Tensor& y, bool inverse, bool accumulate) {
  check(x, positions, inv_freq, options, y);
  const RopeSections sections = sections_of(positions, inv_freq, options.sections);
  const Heads from = heads("x", x), to = heads("y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  const auto factor = static_cast<float>(options.attention_factor);
  const bool per_text = positions.rank() == (options.sections.empty() ? 2 : 3);
  const RopeCall call{.x = from,
                      .y = to,
                      .batch = x.size(0),
                      .tokens = x.size(1),
                      .heads = x.size(2),
                      .size = x.size(3),
                      .pairs = inv_freq.size(0),
                      .positions = positions.data<std::int64_t>(),
                      .positions_batch_stride = per_text ? x.size(1) : 0,
                      .sections = sections,
                      .inv_freq = inv_freq.numel() == 0 ? nullptr : inv_freq.data<float>(),
                      .interleaved = options.style == RopeStyle::interleaved,
                      .cos_factor = factor,
                      .sin_factor = inverse ? -factor : factor,
                      .round_to_bf16 = x.dtype() == DType::bf16 && !options.f32_tables,
                      .accumulate = accumulate};
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("rope", cuda::rope(call, cuda_stream(x.device())));
    return;
  }
  cpu::rope(call);
}

}  // namespace reprise::kernels

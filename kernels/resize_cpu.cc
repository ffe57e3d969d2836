#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/resize_cpu.cc"
#include "hwy/foreach_target.h"
#include "kernels/pieces.h"
#include "kernels/resize_sides.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

struct AddScaled {
  float weight;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector sum) const {
    return hn::MulAdd(x, hn::Set(FloatTag(), weight), sum);
  }
};

// sum += weight * the channels [begin, begin + count) of a pixel.
void add_pixel(const Matrix& x, std::int64_t pixel, std::int64_t begin, std::int64_t count,
               float weight, float* sum) {
  HWY_ALIGN float block[kBlock];
  const float* from = staged(x.element(pixel, begin), x.dtype, count, block);
  map(AddScaled{weight}, from, static_cast<const float*>(sum), sum, count);
}

void resize_run(const Matrix& x, const Matrix& y, const ResizeCall& call, std::int64_t pixel,
                std::int64_t begin, std::int64_t count) {
  const Taps rows = taps_of(call.height, pixel / call.width.to);
  const Taps columns = taps_of(call.width, pixel % call.width.to);
  HWY_ALIGN float sum[kBlock] = {};
  for (int a = 0; a < 4; ++a) {
    const std::int64_t row = element_of(call.height, rows, a) * call.width.from;
    for (int b = 0; b < 4; ++b) {
      add_pixel(x, row + element_of(call.width, columns, b), begin, count,
                rows.weight[a] * columns.weight[b], sum);
    }
  }
  write_block(sum, y.element(pixel, begin), y.dtype, false, count);
}

void gradient_run(const Matrix& dy, const Matrix& dx, bool accumulate, const ResizeCall& call,
                  std::int64_t pixel, std::int64_t begin, std::int64_t count) {
  const std::int64_t p = pixel / call.width.from, q = pixel % call.width.from;
  const Readers rows = readers_of(call.height, p), columns = readers_of(call.width, q);
  HWY_ALIGN float sum[kBlock] = {};
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const float row = weight_of(call.height, taps_of(call.height, i), p);
    for (std::int64_t j = columns.begin; j < columns.end; ++j) {
      const float weight = row * weight_of(call.width, taps_of(call.width, j), q);
      add_pixel(dy, i * call.width.to + j, begin, count, weight, sum);
    }
  }
  write_block(sum, dx.element(pixel, begin), dx.dtype, accumulate, count);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(resize_run);
HWY_EXPORT(gradient_run);

constexpr std::int64_t kChannels = 512;  // at most a block

// Calls f(pixel, first channel, number of channels).
template <class F>
void for_channels(std::int64_t pixels, std::int64_t channels, F f) {
  const std::int64_t per_pixel = (channels + kChannels - 1) / kChannels;
  parallel_for(pixels * per_pixel, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t first = i % per_pixel * kChannels;
      f(i / per_pixel, first, std::min(kChannels, channels - first));
    }
  });
}

}  // namespace

void resize_bicubic(const Matrix& x, const Matrix& y, const ResizeCall& call) {
  for_channels(call.height.to * call.width.to, call.channels,
               [&](std::int64_t pixel, std::int64_t begin, std::int64_t count) {
                 HWY_DYNAMIC_DISPATCH(resize_run)(x, y, call, pixel, begin, count);
               });
}

void resize_bicubic_gradient(const Matrix& dy, const Matrix& dx, bool accumulate,
                             const ResizeCall& call) {
  for_channels(call.height.from * call.width.from, call.channels,
               [&](std::int64_t pixel, std::int64_t begin, std::int64_t count) {
                 HWY_DYNAMIC_DISPATCH(gradient_run)
                 (dy, dx, accumulate, call, pixel, begin, count);
               });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

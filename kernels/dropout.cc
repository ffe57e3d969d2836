#include "kernels/dropout.h"

#include "core/cuda_device.h"
#include "kernels/dropout_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {

void dropout(const Tensor& x, double p, std::uint64_t seed, std::uint64_t offset, const Tensor& y,
             bool accumulate) {
  if (!(p >= 0 && p < 1)) {
    fail("dropout", "p must be in [0, 1), got {}", p);
  }
  expect_trainable("dropout", "x", x);
  expect_trainable("dropout", "y", y);
  expect_like("dropout", "y", y, x, "x");
  const Matrix from = matrix("dropout", "x", x), to = matrix("dropout", "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  const DropoutMask mask = dropout_mask(p, seed, offset);
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("dropout", cuda::dropout(from, mask, to, accumulate, merged_size({&x, &y}),
                                               cuda_stream(x.device())));
    return;
  }
  cpu::dropout(from, mask, to, accumulate, merged_size({&x, &y}));
}

}  // namespace reprise::kernels

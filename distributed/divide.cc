#include "distributed/divide.h"

#include <algorithm>

#include "core/parallel.h"
#include "kernels/reduce.h"

namespace reprise::distributed {

void divide(const Tensor& data, double divisor) {
  if (divisor == 1.0 || data.is_meta()) {
    return;
  }
  if (data.device().kind == DeviceKind::cuda) {
    return kernels::scale_all({&data, 1}, 1 / divisor);
  }
  const auto by = static_cast<float>(divisor);
  auto each = [&](auto* x, auto&& f) {
    parallel_for(data.numel(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        x[i] = f(x[i]);
      }
    });
  };
  if (data.dtype() == DType::f32) {
    each(data.data<float>(), [by](float x) { return x / by; });
  } else {
    each(data.data<bfloat16>(), [by](bfloat16 x) { return to_bfloat16(to_float(x) / by); });
  }
}

double divisor_of(const ReducerOptions& options, std::int64_t tokens, int live, int ranks) {
  if (options.divisor != 0) {
    return options.divisor;
  }
  if (options.mean == Mean::tokens) {
    return static_cast<double>(std::max<std::int64_t>(1, tokens));
  }
  if (options.shards > 0) {
    return options.shards;
  }
  return options.divide_by_live ? live : ranks;
}

void expect_compatible(const ReducerOptions& options, int ranks) {
  if (options.shards < 0 || options.shards % ranks != 0) {
    fail("reducer", "shards must be a multiple of the {} ranks, got {}", ranks, options.shards);
  }
  if (options.shards > 0 && options.compress) {
    fail("reducer", "with shards gradients cannot be compressed: bits would depend on the ranks");
  }
}

}  // namespace reprise::distributed

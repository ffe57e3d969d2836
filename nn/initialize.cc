#include "nn/initialize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "core/parallel.h"

namespace reprise::nn {
namespace {

// Writes draw(words)[0..3] for each block of four words.
template <class Draw>
void fill(const Tensor& x, Generator& generator, Draw draw) {
  const std::int64_t count = x.numel();
  const std::uint64_t offset = generator.reserve(static_cast<std::uint64_t>(count));
  if (x.is_meta()) {
    return;
  }
  const Tensor host = x.device().kind == DeviceKind::cpu && x.is_contiguous()
                          ? x
                          : Tensor::empty(x.shape(), x.dtype());
  const auto write = [&](auto* to) {
    parallel_for((count + 3) / 4, 4096, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::array<float, 4> values =
            draw(philox(generator.seed, offset + static_cast<std::uint64_t>(block)));
        for (std::int64_t i = 4 * block; i < std::min(count, 4 * block + 4); ++i) {
          const float value = values[static_cast<std::size_t>(i % 4)];
          if constexpr (std::is_same_v<decltype(to), bfloat16*>) {
            to[i] = to_bfloat16(value);
          } else {
            to[i] = value;
          }
        }
      }
    });
  };
  if (x.dtype() == DType::bf16) {
    write(host.data<bfloat16>());
  } else {
    write(host.data<float>());
  }
  if (!host.shares_storage(x)) {
    x.copy_from(host);
  }
}

}  // namespace

void fill_normal(const Tensor& x, double deviation, Generator& generator) {
  fill(x, generator, [deviation](const PhiloxBlock& words) {
    std::array<float, 4> values;
    for (std::size_t pair = 0; pair < 4; pair += 2) {
      // In (0, 1]: the logarithm stays finite.
      const double u = (static_cast<double>(words[pair]) + 1) * 0x1p-32;
      const double radius = deviation * std::sqrt(-2 * std::log(u));
      const double angle = 2 * std::numbers::pi * static_cast<double>(words[pair + 1]) * 0x1p-32;
      values[pair] = static_cast<float>(radius * std::cos(angle));
      values[pair + 1] = static_cast<float>(radius * std::sin(angle));
    }
    return values;
  });
}

void fill_uniform(const Tensor& x, double low, double high, Generator& generator) {
  fill(x, generator, [low, high](const PhiloxBlock& words) {
    std::array<float, 4> values;
    for (std::size_t i = 0; i < 4; ++i) {
      values[i] = static_cast<float>(low + (high - low) * uniform(words[i]));
    }
    return values;
  });
}

}  // namespace reprise::nn

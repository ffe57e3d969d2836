#include "bench/peak.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/peak.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace reprise::bench {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 12 independent chains: enough to fill two units of latency 4 to 5. Returns FLOPs done.
double multiply_adds(std::int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  const auto a = hn::Set(d, 0.999f);
  const auto b = hn::Set(d, 0.001f);
  auto x0 = hn::Iota(d, 0), x1 = hn::Iota(d, 1), x2 = hn::Iota(d, 2), x3 = hn::Iota(d, 3);
  auto x4 = hn::Iota(d, 4), x5 = hn::Iota(d, 5), x6 = hn::Iota(d, 6), x7 = hn::Iota(d, 7);
  auto x8 = hn::Iota(d, 8), x9 = hn::Iota(d, 9), x10 = hn::Iota(d, 10), x11 = hn::Iota(d, 11);
  for (std::int64_t i = 0; i < rounds; ++i) {
    x0 = hn::MulAdd(x0, a, b), x1 = hn::MulAdd(x1, a, b), x2 = hn::MulAdd(x2, a, b);
    x3 = hn::MulAdd(x3, a, b), x4 = hn::MulAdd(x4, a, b), x5 = hn::MulAdd(x5, a, b);
    x6 = hn::MulAdd(x6, a, b), x7 = hn::MulAdd(x7, a, b), x8 = hn::MulAdd(x8, a, b);
    x9 = hn::MulAdd(x9, a, b), x10 = hn::MulAdd(x10, a, b), x11 = hn::MulAdd(x11, a, b);
  }
  const auto sum = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9 + x10 + x11;
  *sink = hn::GetLane(hn::SumOfLanes(d, sum));
  return static_cast<double>(rounds) * 12.0 * 2.0 * static_cast<double>(hn::Lanes(d));
}

const char* target() {
  return hwy::TargetName(HWY_TARGET);
}

}  // namespace HWY_NAMESPACE
}  // namespace reprise::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include <omp.h>

namespace reprise::bench {
namespace {

HWY_EXPORT(multiply_adds);
HWY_EXPORT(target);

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double fma_f32(std::int64_t rounds) {
  float sink = 0;
  const double flops = HWY_DYNAMIC_DISPATCH(multiply_adds)(rounds, &sink);
  volatile float keep = sink;
  (void)keep;
  return flops;
}

}  // namespace

std::string fma_target() {
  return HWY_DYNAMIC_DISPATCH(target)();
}

double best_gflops(int threads, double (*work)(std::int64_t rounds), std::int64_t rounds) {
  double best = 0;
  for (int run = 0; run < 7; ++run) {
    double flops = 0;
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : flops)
    flops += work(rounds);
    best = std::max(best, flops / seconds_since(start) / 1e9);
  }
  return best;
}

double fma_f32_gflops(int threads) {
  return best_gflops(threads, fma_f32, 20'000'000);
}

double copy_gb_per_s(int threads) {
  constexpr std::size_t kBytes = std::size_t{512} << 20;
  std::vector<char> from(kBytes, 1), to(kBytes, 2);
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
    {
      const auto part = kBytes / static_cast<std::size_t>(omp_get_num_threads());
      const auto at = part * static_cast<std::size_t>(omp_get_thread_num());
      std::memcpy(to.data() + at, from.data() + at, part);
    }
    best = std::max(best, 2.0 * static_cast<double>(kBytes) / seconds_since(start) / 1e9);
  }
  return best;
}

Peaks measure_peaks(int threads) {
  return {fma_f32_gflops(threads), bf16_peak(threads), copy_gb_per_s(threads)};
}

}  // namespace reprise::bench
#endif

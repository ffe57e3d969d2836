#include "bench/peak.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cstring>

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace reprise::bench {
namespace {

// 12 independent chains, as for f32. An instruction is 32 products and as many sums.
__attribute__((target("avx512f,avx512bf16"))) double vector_products(std::int64_t rounds) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  __m512bh a, b;
  std::memcpy(&a, &ones, sizeof a);
  std::memcpy(&b, &ones, sizeof b);
  __m512 x0 = _mm512_setzero_ps(), x1 = x0, x2 = x0, x3 = x0, x4 = x0, x5 = x0, x6 = x0, x7 = x0,
         x8 = x0, x9 = x0, x10 = x0, x11 = x0;
  for (std::int64_t i = 0; i < rounds; ++i) {
    x0 = _mm512_dpbf16_ps(x0, a, b), x1 = _mm512_dpbf16_ps(x1, a, b);
    x2 = _mm512_dpbf16_ps(x2, a, b), x3 = _mm512_dpbf16_ps(x3, a, b);
    x4 = _mm512_dpbf16_ps(x4, a, b), x5 = _mm512_dpbf16_ps(x5, a, b);
    x6 = _mm512_dpbf16_ps(x6, a, b), x7 = _mm512_dpbf16_ps(x7, a, b);
    x8 = _mm512_dpbf16_ps(x8, a, b), x9 = _mm512_dpbf16_ps(x9, a, b);
    x10 = _mm512_dpbf16_ps(x10, a, b), x11 = _mm512_dpbf16_ps(x11, a, b);
    // Else the compiler may see that the twelve are one.
    __asm__ volatile("" : "+v"(x0), "+v"(x1), "+v"(x2), "+v"(x3), "+v"(x4), "+v"(x5));
    __asm__ volatile("" : "+v"(x6), "+v"(x7), "+v"(x8), "+v"(x9), "+v"(x10), "+v"(x11));
  }
  return static_cast<double>(rounds) * 12 * 32 * 2;
}

// What ldtilecfg reads.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 6 independent sums of [16, 32] x [32, 16], more than the latency of one product needs.
__attribute__((target("amx-tile,amx-bf16"))) double tile_products(std::int64_t rounds) {
  const TileShapes shapes;
  alignas(64) std::uint16_t ones[16 * 32];
  for (std::uint16_t& one : ones) {
    one = 0x3f80;
  }
  // GCC's intrinsics do not say how much they read: else the stores above would be dropped.
  __asm__ volatile("" ::"r"(&shapes), "r"(ones) : "memory");
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (std::int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 6 * 16 * 16 * 32 * 2;
}

// The processor has it, the system saves its registers, and this process may use them.
bool tiles_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool vector_products_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  return __builtin_cpu_supports("avx512f") != 0 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 &&
         (a & kAvx512Bf16) != 0;
}

}  // namespace

Bf16Peak bf16_peak(int threads) {
  if (tiles_allowed()) {
    return {"tdpbf16ps", best_gflops(threads, tile_products, 1'000'000)};
  }
  if (vector_products_allowed()) {
    return {"vdpbf16ps", best_gflops(threads, vector_products, 20'000'000)};
  }
  return {};
}

}  // namespace reprise::bench
#else
namespace reprise::bench {

Bf16Peak bf16_peak(int) {
  return {};
}

}  // namespace reprise::bench
#endif

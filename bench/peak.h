// What the machine can do, measured, for figures to be seen as a share of it. Each is the best of
// several runs: others on the machine only ever slow one down.
#pragma once

#include <cstdint>
#include <string>

namespace reprise::bench {

// Register-only fused multiply-adds in f32, and the vector instructions they were made of: "AVX3".
double fma_f32_gflops(int threads);
std::string fma_target();

// 512 MiB to 512 MiB; bytes read and bytes written both count.
double copy_gb_per_s(int threads);

// Register-only products of bf16 added up in f32, by the fastest instruction that the processor has
// and the system allows: "tdpbf16ps" (AMX) or "vdpbf16ps" (AVX-512). None: an empty name and 0.
struct Bf16Peak {
  std::string instruction;
  double gflops = 0;
};
Bf16Peak bf16_peak(int threads);

struct Peaks {
  double fma_f32_gflops = 0;
  Bf16Peak bf16;
  double copy_gb_per_s = 0;
};
Peaks measure_peaks(int threads);

// The rate of `work` on so many threads at once; it returns the FLOPs it did.
double best_gflops(int threads, double (*work)(std::int64_t rounds), std::int64_t rounds);

}  // namespace reprise::bench

// Kernels with one planted fault each, and some without: what the shim must say of them.
#pragma once

#include <ostream>
#include <vector>

namespace simt {

// Elements of `in` (all defined) and of `out` (none is). Allocations of exactly this size.
inline constexpr int kElements = 256;

struct Planted {
  const char* name;
  const char* kind;  // of the Fault; empty: it is correct
  void (*start)(float* out, const float* in);
};
inline void PrintTo(const Planted& planted, std::ostream* out) {
  *out << planted.name;
}
std::vector<Planted> planted_faults();

// Blocks of 64 threads, of which each writes its element of `out`, by an index that has 32 bits.
void start_wide(float* out, const float* in, unsigned blocks);

}  // namespace simt

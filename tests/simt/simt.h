// The SIMT shim: CUDA kernels as host C++, run and checked without a device.
//
// A .cu file is compiled by g++ with this header included first and with
// -fsanitize=thread,bounds,alignment: the compiler then calls us at every memory access
// (memory.cc defines those calls; no sanitizer library is linked). The threads of a block are
// fibers, blocks run one after another on the calling thread. What is found ends the launch, and
// run() throws Fault:
//
//   race               two threads, one location, one of them writing, and nothing between them
//                      that orders memory: no barrier, or __syncwarp in a warp; or two blocks
//   out of bounds      beyond a tensor or a shared array, by the byte; an index beyond an array
//   misaligned         a packet at an address that is not a multiple of its size
//   uninitialised      a read of memory that nobody has written (shared: in this block)
//   divergent barrier  a barrier that part of the block does not reach, or reaches elsewhere
//   mask               a collective whose mask leaves out the caller, names lanes that are gone or
//                      elsewhere, or a shuffle from a lane outside of it
//   deadlock           threads that wait for each other in other ways
//
// Not found: a missing volatile or fence between blocks, bank conflicts, use of registers, faults
// in code that the sizes tried do not reach. Values differ from a device's by roundings (fma,
// device math). Races are tracked by two bytes: do not share arrays of single bytes.
#pragma once

#define REPRISE_SIMT 1

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __constant__ static constexpr
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = struct SimtStream*;

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {0x7fff};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

namespace simt {

// ---- for tests ---------------------------------------------------------------------------------

// In which order blocks run, and threads until they wait.
enum class Order { ascending, descending, shuffled };

struct Options {
  Order order = Order::ascending;
  unsigned seed = 1;  // of the shuffle
  bool check = true;  // false: only run, twice to four times as fast
  // For sizes that a host cannot compute: of each launch only the blocks at the corners of the grid
  // and in its middle run, and of device memory that is added meanwhile only bounds and alignment
  // are checked. What kernels compute then means nothing.
  bool corners = false;
  std::size_t max_shared_bytes = std::size_t{163} << 10;  // of compute capability 8.0, the least
  void (*gate)(bool open) = nullptr;                      // called before and after each launch
};
Options& options();

// A device whose work can be put into a graph: while capturing() says so, what would be launched is
// given to keep() and not run.
struct Capture {
  bool (*capturing)() = nullptr;
  void (*keep)(const char* kernel, std::function<void()> run) = nullptr;
};
void set_capture(const Capture& capture);

struct Fault : std::runtime_error {
  Fault(std::string kind_, const std::string& report)
      : std::runtime_error(report), kind(std::move(kind_)) {}
  std::string kind;  // as listed above
};

// Device memory. Kernels may touch what was added, and nothing else but shared memory and their
// locals. `defined`: it may be read before a kernel writes it.
void add_memory(void* at, std::size_t bytes, std::string name, bool defined);
void define_memory(const void* at, std::size_t bytes);  // the host has written here
void remove_memory(void* at);
// Throws Fault unless all of it lies in one piece of device memory.
void expect_memory(const void* at, std::size_t bytes, const char* name);

using Body = void (*)(const void* call);
// One launch, done when it returns. Throws Fault.
void run(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
         const void* call);
bool capturing();
// The same launch, later. `call` is destroyed with what was kept.
void capture(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
             const void* call, Body destroy);
// Launches that were run, since the start; those that a graph did are not among them.
std::int64_t launches();

// ---- for device code ---------------------------------------------------------------------------

struct Identity {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern thread_local Identity identity;

void* dynamic_shared_memory();

using Place = std::source_location;

enum class Barrier { plain, count, all, any };
int barrier(Barrier kind, int predicate, Place at);

enum class Collective { sync, shuffle, up, down, exclusive_or, ballot };
// The 8 bytes that this lane gets; `lane`: source lane, distance or mask of the shuffle.
std::uint64_t collective(Collective kind, unsigned mask, std::uint64_t value, int lane, int width,
                         Place at);

template <class T>
T shuffle(Collective kind, unsigned mask, T value, int lane, int width, Place at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  const std::uint64_t got = collective(kind, mask, std::bit_cast<Bits>(value), lane, width, at);
  return std::bit_cast<T>(static_cast<Bits>(got));
}

// Reads, applies f and writes, as one access. Not inlined: it is not instrumented, and its return
// address is the place that reports name.
void atomic_access(void* at, std::size_t bytes, void* caller);
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* at, F f) {
  atomic_access(at, sizeof(T), __builtin_return_address(0));
  const T before = *at;
  *at = f(before);
  return before;
}

}  // namespace simt

#define threadIdx (::simt::identity.thread)
#define blockIdx (::simt::identity.block)
#define blockDim (::simt::identity.block_size)
#define gridDim (::simt::identity.grid_size)
inline constexpr int warpSize = 32;

inline void __syncthreads(simt::Place at = simt::Place::current()) {
  simt::barrier(simt::Barrier::plain, 0, at);
}
inline int __syncthreads_count(int predicate, simt::Place at = simt::Place::current()) {
  return simt::barrier(simt::Barrier::count, predicate, at);
}
inline int __syncthreads_and(int predicate, simt::Place at = simt::Place::current()) {
  return simt::barrier(simt::Barrier::all, predicate, at);
}
inline int __syncthreads_or(int predicate, simt::Place at = simt::Place::current()) {
  return simt::barrier(simt::Barrier::any, predicate, at);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Place at = simt::Place::current()) {
  simt::collective(simt::Collective::sync, mask, 0, 0, 32, at);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              simt::Place at = simt::Place::current()) {
  return simt::shuffle(simt::Collective::shuffle, mask, value, lane, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 simt::Place at = simt::Place::current()) {
  return simt::shuffle(simt::Collective::up, mask, value, static_cast<int>(distance), width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   simt::Place at = simt::Place::current()) {
  return simt::shuffle(simt::Collective::down, mask, value, static_cast<int>(distance), width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  simt::Place at = simt::Place::current()) {
  return simt::shuffle(simt::Collective::exclusive_or, mask, value, lanes, width, at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Place at = simt::Place::current()) {
  return static_cast<unsigned>(
      simt::collective(simt::Collective::ballot, mask, predicate != 0, 0, 32, at));
}
inline int __any_sync(unsigned mask, int predicate, simt::Place at = simt::Place::current()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place at = simt::Place::current()) {
  return __ballot_sync(mask, predicate, at) == mask;
}

template <class T>
__attribute__((always_inline)) inline T atomicAdd(T* at, T value) {
  return simt::atomic(at, [=](T x) { return x + value; });
}
template <class T>
__attribute__((always_inline)) inline T atomicMax(T* at, T value) {
  return simt::atomic(at, [=](T x) { return x < value ? value : x; });
}
template <class T>
__attribute__((always_inline)) inline T atomicMin(T* at, T value) {
  return simt::atomic(at, [=](T x) { return value < x ? value : x; });
}
template <class T>
__attribute__((always_inline)) inline T atomicOr(T* at, T value) {
  return simt::atomic(at, [=](T x) { return x | value; });
}
template <class T>
__attribute__((always_inline)) inline T atomicExch(T* at, T value) {
  return simt::atomic(at, [=](T) { return value; });
}
template <class T>
__attribute__((always_inline)) inline T atomicCAS(T* at, T expected, T value) {
  return simt::atomic(at, [=](T x) { return x == expected ? value : x; });
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((std::uint64_t{a} * b) >> 32);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

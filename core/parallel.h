// One thread pool (OpenMP's, shared with oneDNN), and loops whose result does not depend on the
// number of threads: work is cut into chunks of a fixed size, whoever runs them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace reprise {

// Threads that parallel_for uses when this thread calls it (each thread has its own number);
// set_threads(n) with n >= 1. Default: OMP_NUM_THREADS or the cores.
int threads();
void set_threads(int count);

namespace internal {
void parallel_chunks(std::int64_t chunks, void (*body)(void*, std::int64_t), void* context);
}

// Calls f(begin, end) for [0, grain), [grain, 2 grain), ... of [0, count). What f writes must not
// depend on the other calls. When f throws, calls that have not begun are left out and the first
// exception is thrown again to the caller. Runs inline when there is one chunk.
template <class F>
void parallel_for(std::int64_t count, std::int64_t grain, F&& f) {
  if (count <= 0) {
    return;
  }
  const std::int64_t chunks = (count + grain - 1) / grain;
  struct Context {
    F& f;
    std::int64_t count, grain;
  } context{f, count, grain};
  internal::parallel_chunks(
      chunks,
      [](void* at, std::int64_t chunk) {
        auto& c = *static_cast<Context*>(at);
        c.f(chunk * c.grain, std::min(c.count, (chunk + 1) * c.grain));
      },
      &context);
}

}  // namespace reprise

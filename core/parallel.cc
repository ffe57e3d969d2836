#include "core/parallel.h"

#include <atomic>
#include <exception>

#include <omp.h>

#include "core/progress.h"

// GCC's OpenMP runtime is not instrumented: the thread sanitizer learns of fork and join from here.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define REPRISE_HAPPENS_BEFORE(at) __tsan_release(at)
#define REPRISE_HAPPENS_AFTER(at) __tsan_acquire(at)
#else
#define REPRISE_HAPPENS_BEFORE(at)
#define REPRISE_HAPPENS_AFTER(at)
#endif

namespace reprise {

int threads() {
  return omp_get_max_threads();
}

void set_threads(int count) {
  omp_set_num_threads(std::max(1, count));
}

namespace internal {

namespace {

// The first exception of a loop. An exception that leaves an OpenMP region ends the process.
class FirstException {
 public:
  bool caught() const { return caught_.load(std::memory_order_relaxed); }
  void take() noexcept {
    if (!caught_.exchange(true)) {
      exception_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (exception_) {
      std::rethrow_exception(exception_);
    }
  }

 private:
  std::atomic<bool> caught_ = false;
  std::exception_ptr exception_;
};

}  // namespace

void parallel_chunks(std::int64_t chunks, void (*body)(void*, std::int64_t), void* context) {
  if (chunks == 1 || omp_in_parallel()) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      body(context, chunk);
    }
    return;
  }
  FirstException exception;
  REPRISE_HAPPENS_BEFORE(context);
#pragma omp parallel
  {
    REPRISE_HAPPENS_AFTER(context);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (exception.caught()) {
        continue;
      }
      if (omp_get_thread_num() == 0) {  // one: the counter's line must not travel
        progress().tick();
      }
      try {
        body(context, chunk);
      } catch (...) {
        exception.take();
      }
    }
    REPRISE_HAPPENS_BEFORE(&chunks);
  }
  REPRISE_HAPPENS_AFTER(&chunks);
  exception.rethrow();
}

}  // namespace internal
}  // namespace reprise

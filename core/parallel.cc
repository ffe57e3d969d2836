#include "core/parallel.h"

#include <omp.h>

namespace reprise {

int threads() {
  return omp_get_max_threads();
}

void set_threads(int count) {
  omp_set_num_threads(std::max(1, count));
}

namespace internal {

void parallel_chunks(std::int64_t chunks, void (*body)(void*, std::int64_t), void* context) {
  if (chunks == 1 || omp_in_parallel()) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      body(context, chunk);
    }
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    body(context, chunk);
  }
}

}  // namespace internal
}  // namespace reprise

// Prints what the machine can do, with one thread and with all, as one JSON object.
#include <fmt/format.h>
#include <omp.h>

#include "bench/peak.h"

int main() {
  using namespace reprise::bench;
  const int all = omp_get_num_procs();
  fmt::print(
      "{{\"target\": \"{}\", \"fma_f32_gflops_1\": {:.1f}, \"fma_f32_gflops_all\": {:.1f}, "
      "\"copy_gb_per_s_1\": {:.2f}, \"copy_gb_per_s_all\": {:.2f}, \"threads_all\": {}}}\n",
      fma_target(), fma_f32_gflops(1), fma_f32_gflops(all), copy_gb_per_s(1), copy_gb_per_s(all),
      all);
}

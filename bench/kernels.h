// The rows of bench_kernels: kernels.cc is the program and its manual.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "bench/peak.h"
#include "core/tensor.h"

namespace reprise::bench {

// What one run of a row does.
struct Work {
  std::int64_t flops = 0;
  std::int64_t bytes = 0;
  bool products = false;  // its FLOPs are those of matrix products
};

// The peak that a row's FLOPs are measured against; 0 where the machine has none.
double peak_gflops(const Work& work, DType dtype, const Peaks& peaks);

// Sets the counters of a row that took `seconds` for all its iterations.
void set_counters(benchmark::State& state, const Work& work, DType dtype, double seconds,
                  const Peaks& peaks);

template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// `numbers`, its elements over and over, in the shape given: to draw millions anew would take
// longer than to time them.
Tensor repeated(const Tensor& numbers, const Shape& shape, Device device = cpu);
// Of how many elements: a prime, so that the rows of a matrix differ.
inline constexpr std::int64_t kDrawn = 65521;

// The peaks are filled in before the first row runs.
void register_op_rows(const Peaks& peaks);

// A matrix product of the training step.
struct StepRow {
  std::string name;
  std::int64_t tokens = 0;
  DType dtype = DType::f32;
  Work work;
  std::int64_t per_step = 0;  // how often the product occurs in a step
};
std::vector<StepRow> register_step_products(const Peaks& peaks);

}  // namespace reprise::bench

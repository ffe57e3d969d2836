// The kernels by themselves, with Google Benchmark (its flags work: --benchmark_filter=REGEX,
// --benchmark_list_tests, --benchmark_repetitions=N, --benchmark_min_time=S).
//
//   bench_kernels [--threads N] [--out FILE.json] [--benchmark_...]
//
// Rows:
//   op/<row>/forward|backward/<dtype>   rows of the op table (tests/op_cases/) with `benchmark`, as
//       the tape runs them: the op's function, and the sweep over what it recorded, with an
//       upstream gradient that the op may overwrite. Inputs are the same at every iteration, so
//       what fits the last cache comes from there; weights are of the size of initialised ones
//       (0.02 N(0, 1)). No backward where it does nothing.
//   step/gpt2/tokens:<B T>/<layer>/<kind>/<dtype>   the matrix products of a training step of
//       GPT-2 124M, with the layouts, bias and sums of autograd/matmul.cc and
//       kernels/linear_cross_entropy.cc (products inside attention are in op/attention). Operands
//       go in turn through those of the 12 layers, as in a step: none is in a cache because it was
//       just used. `per_step`: how often a step runs the product.
//
// Time is that of the call alone, after one that is not timed; memory that a call needs was in use
// before, so no row pays for new pages.
// Counters:
//   GFLOP/s     FLOPs as the op's Cost states them (a product 2 m n k)
//   GB/s        bytes of tensors read and written, each tensor once however often the kernel
//               reads it. Forward: inputs and outputs, but never more than the op's Cost states
//               (an embedding reads few rows of its table). Backward: the saved values, the
//               gradients of outputs and of inputs, likewise. A result that is added to counts
//               twice. No workspace.
//   peak_share  GFLOP/s as a share of the measured register-only peak: f32 multiply-adds, but for
//               matrix products in bf16 the fastest bf16 instruction (absent where the machine has
//               none: such products widen)
//   copy_share  GB/s as a share of the measured copy bandwidth; above 1 when caches serve
//
// Shares are of the peaks measured before the first row. They are measured again after the last: if
// the two differ, something else ran on the machine and the figures are worth little. The end says,
// for each number of tokens and dtype, what the step's products come to together (see
// Report::summary). --out writes it all as JSON.
#include "bench/kernels.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <fstream>

#include <fmt/format.h>

#include "bench/kernels_report.h"
#include "core/error.h"
#include "core/parallel.h"

namespace reprise::bench {

double peak_gflops(const Work& work, DType dtype, const Peaks& peaks) {
  return work.products && dtype == DType::bf16 ? peaks.bf16.gflops : peaks.fma_f32_gflops;
}

void set_counters(benchmark::State& state, const Work& work, DType dtype, double seconds,
                  const Peaks& peaks) {
  const double runs = static_cast<double>(state.iterations());
  const double gflops = static_cast<double>(work.flops) * runs / seconds / 1e9;
  const double gb_per_s = static_cast<double>(work.bytes) * runs / seconds / 1e9;
  state.counters["GFLOP/s"] = gflops;
  state.counters["GB/s"] = gb_per_s;
  if (const double peak = peak_gflops(work, dtype, peaks); peak > 0) {
    state.counters["peak_share"] = gflops / peak;
  }
  state.counters["copy_share"] = gb_per_s / peaks.copy_gb_per_s;
}

Tensor repeated(const Tensor& numbers, const Shape& shape, Device device) {
  const Tensor result = Tensor::empty(shape, numbers.dtype(), device);
  if (result.is_meta() || result.numel() == 0) {
    return result;
  }
  const auto* const from = static_cast<const char*>(numbers.raw());
  auto* const to = static_cast<char*>(result.raw());
  for (std::int64_t at = 0; at < result.bytes(); at += numbers.bytes()) {
    std::memcpy(to + at, from,
                static_cast<std::size_t>(std::min(numbers.bytes(), result.bytes() - at)));
  }
  return result;
}

namespace {

struct Options {
  int threads = reprise::threads();
  std::string out;
};

void print_summary(const nlohmann::json& summary) {
  for (const nlohmann::json& step : summary) {
    const nlohmann::json& worst = step["worst"];
    const auto share = [](const nlohmann::json& of) {
      return of.contains("share") ? fmt::format(" ({:.2f} of the peak)", of["share"].get<double>())
                                  : std::string();
    };
    fmt::print(stderr,
               "{} tokens, {}: {} of {} products, {:.1f} GFLOP in {:.1f} ms: {:.1f} GFLOP/s{};",
               step["tokens"].get<std::int64_t>(), step["dtype"].get<std::string>(),
               step["products_that_ran"].get<int>(), step["products"].get<int>(),
               step["gflop_per_step"].get<double>(), step["ms_per_step"].get<double>(),
               step["gflops"].get<double>(), share(step));
    fmt::print(stderr, " worst {}: {:.1f} GFLOP/s{}\n", worst["name"].get<std::string>(),
               worst["gflops"].get<double>(), share(worst));
  }
}

int run(const Options& options) {
  // Hours may pass before it is written.
  if (!options.out.empty() && !std::ofstream(options.out, std::ios::app)) {
    fail("bench_kernels", "cannot write {}", options.out);
  }
  set_threads(options.threads);
  Peaks peaks;
  register_op_rows(peaks);
  Report report(options.threads, peaks, register_step_products(peaks));
  if (benchmark::RunSpecifiedBenchmarks(&report) == 0) {
    return 1;
  }
  if (!report.ran()) {
    return 0;
  }
  print_summary(report.summary());
  if (!options.out.empty()) {
    std::ofstream file(options.out, std::ios::trunc);
    file << report.json().dump(1) << '\n';
    if (!file.flush()) {
      fail("bench_kernels", "cannot write {}", options.out);
    }
  }
  return 0;
}

void print_help() {
  fmt::print(
      "bench_kernels [--threads N] [--out FILE.json] and the flags of Google Benchmark:\n\n");
  std::fflush(stdout);
  benchmark::PrintDefaultHelp();
}

}  // namespace
}  // namespace reprise::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv, reprise::bench::print_help);
  reprise::bench::Options options;
  CLI::App app("The kernels by themselves.", "bench_kernels");
  app.add_option("--threads", options.threads)->check(CLI::PositiveNumber);
  app.add_option("--out", options.out, "JSON of rows, machine and summary");
  CLI11_PARSE(app, argc, argv);
  try {
    return reprise::bench::run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}

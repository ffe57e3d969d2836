#include "bench/kernels_report.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <utility>

#include <fmt/format.h>
#include <hwy/base.h>
#include <hwy/highway.h>
#if defined(REPRISE_HAS_ONEDNN)
#include <oneapi/dnnl/dnnl.h>
#endif

namespace reprise::bench {
namespace {

// "-dirty" follows when files differ from it.
std::string commit() {
  constexpr const char* kCommand = "git -C '" REPRISE_SOURCE_DIR
                                   "' describe --always --dirty --abbrev=40 --exclude='*' "
                                   "2>/dev/null";
  std::string text;
  if (FILE* const pipe = popen(kCommand, "r"); pipe != nullptr) {
    std::array<char, 128> part{};
    while (std::fgets(part.data(), part.size(), pipe) != nullptr) {
      text += part.data();
    }
    pclose(pipe);
  }
  const std::string line = text.substr(0, text.find('\n'));
  return line.empty() ? "unknown" : line;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) {
      return line.substr(std::min(line.size(), line.find(": ") + 2));
    }
  }
  return "unknown";
}

nlohmann::json versions() {
  nlohmann::json json = {{"compiler", __VERSION__},
                         {"google_benchmark", REPRISE_BENCHMARK_VERSION},
                         {"highway", fmt::format("{}.{}.{}", HWY_MAJOR, HWY_MINOR, HWY_PATCH)}};
#if defined(REPRISE_HAS_ONEDNN)
  const dnnl_version_t* const dnnl = dnnl_version();
  json["onednn"] = fmt::format("{}.{}.{}", dnnl->major, dnnl->minor, dnnl->patch);
#endif
  return json;
}

nlohmann::json to_json(const Peaks& peaks) {
  nlohmann::json json = {{"fma_f32_gflops", peaks.fma_f32_gflops},
                         {"fma_f32_target", fma_target()},
                         {"copy_gb_per_s", peaks.copy_gb_per_s}};
  if (peaks.bf16.gflops > 0) {
    json["bf16_gflops"] = peaks.bf16.gflops;
    json["bf16_instruction"] = peaks.bf16.instruction;
  }
  return json;
}

std::string to_text(const Peaks& peaks) {
  const std::string bf16 =
      peaks.bf16.gflops > 0
          ? fmt::format(", {} {:.0f} GFLOP/s", peaks.bf16.instruction, peaks.bf16.gflops)
          : "";
  return fmt::format("f32 multiply-add ({}) {:.0f} GFLOP/s{}, copy {:.1f} GB/s", fma_target(),
                     peaks.fma_f32_gflops, bf16, peaks.copy_gb_per_s);
}

// Of two measurements: others on the machine only ever slow one down.
Peaks better(const Peaks& a, const Peaks& b) {
  return {std::max(a.fma_f32_gflops, b.fma_f32_gflops),
          a.bf16.gflops > b.bf16.gflops ? a.bf16 : b.bf16,
          std::max(a.copy_gb_per_s, b.copy_gb_per_s)};
}

// A share is off by as much.
bool differ(const Peaks& a, const Peaks& b) {
  const auto far = [](double x, double y) { return std::min(x, y) < 0.95 * std::max(x, y); };
  return far(a.fma_f32_gflops, b.fma_f32_gflops) || far(a.bf16.gflops, b.bf16.gflops) ||
         far(a.copy_gb_per_s, b.copy_gb_per_s);
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// The products of one number of tokens and dtype.
struct Step {
  std::int64_t tokens;
  DType dtype;
  std::size_t rows = 0, ran = 0;
  double flops = 0, seconds = 0, peak = 0;
  std::string worst;
  double worst_gflops = 0;
};

}  // namespace

Report::Report(int threads, Peaks& peaks, std::vector<StepRow> step)
    : display_(benchmark::CreateDefaultDisplayReporter()),
      threads_(threads),
      peaks_(peaks),
      step_(std::move(step)) {
  json_.SetOutputStream(&json_text_);
}

bool Report::ReportContext(const Context& context) {
  peaks_ = measure_peaks(threads_);
  fmt::print(stderr, "{} threads: {}\n", threads_, to_text(peaks_));
  return display_->ReportContext(context) && json_.ReportContext(context);
}

void Report::ReportRuns(const std::vector<Run>& runs) {
  display_->ReportRuns(runs);
  json_.ReportRuns(runs);
  for (const Run& run : runs) {
    if (run.run_type == Run::RT_Iteration && !run.error_occurred) {
      seconds_[run.run_name.function_name].push_back(
          run.real_accumulated_time /
          static_cast<double>(std::max<std::int64_t>(1, run.iterations)));
    }
  }
}

void Report::Finalize() {
  display_->Finalize();
  json_.Finalize();
  peaks_after_ = measure_peaks(threads_);
  fmt::print(
      stderr, "afterwards: {}{}\n", to_text(peaks_after_),
      differ(peaks_, peaks_after_) ? "; NOT the same as before: something else ran here" : "");
}

nlohmann::json Report::summary() const {
  const Peaks peaks = better(peaks_, peaks_after_);
  std::vector<Step> steps;
  for (const StepRow& row : step_) {
    auto at = std::ranges::find_if(
        steps, [&](const Step& s) { return s.tokens == row.tokens && s.dtype == row.dtype; });
    if (at == steps.end()) {
      at = steps.insert(at, {.tokens = row.tokens, .dtype = row.dtype});
      at->peak = peak_gflops(row.work, row.dtype, peaks);
    }
    ++at->rows;
    const auto measured = seconds_.find(row.name);
    if (measured == seconds_.end()) {
      continue;
    }
    ++at->ran;
    const double seconds = median(measured->second);
    const double flops = static_cast<double>(row.work.flops);
    at->flops += static_cast<double>(row.per_step) * flops;
    at->seconds += static_cast<double>(row.per_step) * seconds;
    const double gflops = flops / seconds / 1e9;
    if (at->ran == 1 || gflops < at->worst_gflops) {
      at->worst = row.name;
      at->worst_gflops = gflops;
    }
  }
  nlohmann::json json = nlohmann::json::array();
  for (const Step& s : steps) {
    if (s.ran == 0) {
      continue;
    }
    const double gflops = s.flops / s.seconds / 1e9;
    nlohmann::json entry = {{"tokens", s.tokens},
                            {"dtype", name(s.dtype)},
                            {"products", s.rows},
                            {"products_that_ran", s.ran},
                            {"gflop_per_step", s.flops / 1e9},
                            {"ms_per_step", s.seconds * 1e3},
                            {"gflops", gflops},
                            {"worst", {{"name", s.worst}, {"gflops", s.worst_gflops}}}};
    if (s.peak > 0) {
      entry["share"] = gflops / s.peak;
      entry["worst"]["share"] = s.worst_gflops / s.peak;
    }
    json.push_back(std::move(entry));
  }
  return json;
}

nlohmann::json Report::json() const {
  nlohmann::json json = nlohmann::json::parse(json_text_.str());
  nlohmann::json& context = json["context"];
  context["commit"] = commit();
  context["cpu"] = cpu_model();
  context["threads"] = threads_;
  context["versions"] = versions();
  context["peaks"] = to_json(peaks_);
  context["peaks_after"] = to_json(peaks_after_);
  json["summary"] = summary();
  return json;
}

}  // namespace reprise::bench

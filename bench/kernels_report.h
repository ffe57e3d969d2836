// What bench_kernels says: Google Benchmark's own report, the machine's peaks before it, and after
// it what the products of a step come to together.
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "bench/kernels.h"

namespace reprise::bench {

class Report final : public benchmark::BenchmarkReporter {
 public:
  // Measures `peaks` when the first row is about to run.
  Report(int threads, Peaks& peaks, std::vector<StepRow> step);

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;
  void Finalize() override;

  // Whether any row did; false when the rows were only listed.
  bool ran() const { return !seconds_.empty(); }
  // After the last row. One object for each number of tokens and dtype of which a product ran:
  // "share" is the FLOPs of the products that ran over the time that they take together, each as
  // often as it occurs in a step, as a share of the peak; "worst" the product with the least share
  // of its own. The peak is the better of those before and after; of several repetitions of a row
  // the median counts.
  nlohmann::json summary() const;
  // Google Benchmark's JSON, with commit, versions and peaks in "context", and the summary.
  nlohmann::json json() const;

 private:
  std::unique_ptr<benchmark::BenchmarkReporter> display_;
  benchmark::JSONReporter json_;
  std::ostringstream json_text_;
  int threads_;
  Peaks& peaks_;
  Peaks peaks_after_;
  std::vector<StepRow> step_;
  std::map<std::string, std::vector<double>> seconds_;  // of one iteration, by row
};

}  // namespace reprise::bench

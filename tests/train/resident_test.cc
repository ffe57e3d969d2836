// What the operating system says: resident memory of GPT-2 124M grows by at most the predicted peak
// and 64 MiB, under each policy.
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/policy.h"

namespace reprise::train {
namespace {

nlohmann::json step(const std::string& arguments) {
  const std::string command = std::string(REPRISE_BENCH_STEP) +
                              " --batch 1 --tokens 256 --warmup 1 --steps 1 " + arguments + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  std::string text;
  char buffer[4096];
  for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) {
    text.append(buffer, n);
  }
  EXPECT_EQ(pclose(pipe), 0) << text;
  return nlohmann::json::parse(text, nullptr, false);
}

class Resident : public ::testing::TestWithParam<std::string> {};

TEST_P(Resident, GrowsByAtMostThePredictedPeakAnd64MiB) {
  const auto predicted = step("--dry-run --policy " + GetParam());
  const auto measured = step("--policy " + GetParam());
  ASSERT_TRUE(predicted.is_object() && measured.is_object());
  EXPECT_EQ(predicted["peak_bytes"], measured["peak_bytes"]);
  EXPECT_EQ(predicted["peak_by_kind"], measured["peak_by_kind"]);
  const double predicted_mib = predicted["peak_bytes"].get<double>() / (1 << 20);
  const double grown_mib =
      measured["peak_resident_mib"].get<double>() - measured["resident_before_mib"].get<double>();
  EXPECT_LE(grown_mib, predicted_mib + 64);
  EXPECT_GE(grown_mib, 0.8 * predicted_mib);
}

// What is in host memory here is resident too.
std::vector<std::string> on_the_device_only() {
  std::vector<std::string> names = Policies::names();
  std::erase_if(names, [](const std::string& name) { return name.find('+') != name.npos; });
  return names;
}

INSTANTIATE_TEST_SUITE_P(Policies, Resident, ::testing::ValuesIn(on_the_device_only()),
                         [](const auto& at) {
                           std::string name = at.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace reprise::train

#include <algorithm>
#include <nlohmann/json.hpp>

#include <fmt/format.h>

#include "train/parity.h"

namespace reprise::train {

bool ParityReport::passed() const {
  return std::all_of(rows.begin(), rows.end(), [](const ParityRow& row) { return row.within; }) &&
         std::all_of(policies.begin(), policies.end(),
                     [](const ParityPolicy& policy) { return policy.equal; });
}

std::string to_text(const ParityReport& report) {
  std::string text =
      fmt::format("{} against {}, in {}{}\n", report.name.empty() ? report.folder : report.name,
                  report.reference.empty() ? "its reference" : report.reference, name(report.dtype),
                  report.device == cpu ? "" : " on " + to_string(report.device));
  if (report.dtype != DType::f32 && !report.rows.empty()) {
    text += "the reference is in f32\n";
  }
  if (!report.rows.empty()) {
    text += fmt::format("{:>9} {:>9} {:>9}\n", "relative", "absolute", "allowed");
  }
  for (const ParityRow& row : report.rows) {
    text += fmt::format("{:9.2e} {:9.2e} {:9.2g}{} {}{}\n", row.relative, row.absolute,
                        row.tolerance, row.within ? "     " : " MISS", row.key,
                        row.zero ? " (reference is zero: absolute)" : "");
  }
  for (const ParityPolicy& policy : report.policies) {
    text += fmt::format("policy {:<14} digest {}{}\n", policy.name, policy.digest,
                        policy.equal ? "" : " DIFFERS, first at " + policy.first_difference);
  }
  const auto missed = std::count_if(report.rows.begin(), report.rows.end(),
                                    [](const ParityRow& row) { return !row.within; });
  const auto unequal = std::count_if(report.policies.begin(), report.policies.end(),
                                     [](const ParityPolicy& policy) { return !policy.equal; });
  text += fmt::format("{}: {} of {} tensors within tolerance", report.passed() ? "pass" : "FAIL",
                      report.rows.size() - static_cast<std::size_t>(missed), report.rows.size());
  if (report.policies.size() > 1) {
    text += fmt::format(", {} of {} policies bitwise equal",
                        report.policies.size() - static_cast<std::size_t>(unequal),
                        report.policies.size());
  }
  return text + "\n";
}

std::string to_json(const ParityReport& report) {
  nlohmann::ordered_json json = {{"case", report.name},
                                 {"folder", report.folder},
                                 {"reference", report.reference},
                                 {"device", to_string(report.device)},
                                 {"dtype", name(report.dtype)},
                                 {"passed", report.passed()},
                                 {"tensors", nlohmann::ordered_json::array()},
                                 {"policies", nlohmann::ordered_json::array()}};
  for (const ParityRow& row : report.rows) {
    // JSON has no infinity; a tensor that was not computed has null errors.
    json["tensors"].push_back({{"key", row.key},
                               {"relative", row.relative},
                               {"absolute", row.absolute},
                               {"tolerance", row.tolerance},
                               {"reference_is_zero", row.zero},
                               {"within", row.within}});
  }
  for (const ParityPolicy& policy : report.policies) {
    json["policies"].push_back({{"name", policy.name},
                                {"digest", policy.digest},
                                {"equal", policy.equal},
                                {"first_difference", policy.first_difference}});
  }
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

int exit_code(const absl::StatusOr<ParityReport>& report) {
  return !report.ok() ? 2 : report->passed() ? 0 : 1;
}

}  // namespace reprise::train

// The op table: one line a family.
#include <iterator>
#include <utility>

#include "tests/op_case.h"

namespace reprise::testing {

std::vector<OpCase> losses_cases();
std::vector<OpCase> norm_cases();

std::vector<OpCase> all_op_cases() {
  std::vector<OpCase> all;
  for (const auto family : {losses_cases, norm_cases}) {
    std::vector<OpCase> cases = family();
    std::ranges::move(cases, std::back_inserter(all));
  }
  return all;
}

}  // namespace reprise::testing

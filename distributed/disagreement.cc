#include "distributed/disagreement.h"

#include <algorithm>
#include <cstddef>

#include <fmt/format.h>

namespace reprise::distributed {

std::string disagreement(std::span<const std::string> values) {
  if (values.empty() || std::ranges::count(values, values[0]) == std::ssize(values)) {
    return {};
  }
  const std::string* common = nullptr;
  for (const std::string& value : values) {
    if (2 * std::ranges::count(values, value) > std::ssize(values)) {
      common = &value;
    }
  }
  std::string text;
  for (std::size_t r = 0; r < values.size(); ++r) {
    if (common == nullptr || values[r] != *common) {
      text += fmt::format("{}rank {} has {}", text.empty() ? "" : ", ", r, values[r]);
    }
  }
  if (common != nullptr) {
    text += fmt::format(", the other {} have {}", std::ranges::count(values, *common), *common);
  }
  return text;
}

}  // namespace reprise::distributed

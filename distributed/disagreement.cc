#include "distributed/disagreement.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <vector>

#include <fmt/format.h>

#include "distributed/header.h"

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

void require_same(Communicator& communicator, std::span<const Setting> settings,
                  const std::string& when) {
  constexpr std::size_t kWords = 20;
  Hash hash;
  for (const Setting& setting : settings) {
    hash.add(setting.name).add(setting.value);
  }
  auto words = [](std::int64_t count) {
    return Tensor::zeros({count}, DType::i64, cpu, MemoryKind::communication);
  };
  const Tensor sum = words(2);
  sum.data<std::int64_t>()[0] = std::bit_cast<std::int64_t>(hash.value());
  sum.data<std::int64_t>()[1] = std::bit_cast<std::int64_t>(~hash.value());
  communicator.agree(sum, {"settings"}).wait();
  if (sum.data<std::int64_t>()[0] == ~sum.data<std::int64_t>()[1]) {
    return;
  }
  auto stop = [&](const std::string& text) {
    const std::string why = fmt::format("ranks disagree at {}: {}", when, text);
    communicator.disagree(why);
    throw CommunicatorError(why);
  };
  const auto count = static_cast<double>(settings.size());
  const auto most = all_reduce_value(communicator, count, Reduce::max, "number of settings");
  for (std::size_t i = 0; i < static_cast<std::size_t>(most); ++i) {
    const std::string mine =
        i < settings.size() ? settings[i].name + " " + settings[i].value : "nothing more";
    const Tensor in = words(kWords), out = words(std::int64_t{kWords} * communicator.size());
    std::memcpy(in.raw(), mine.data(), std::min(mine.size(), kWords * 8 - 1));
    communicator.all_gather(in, out, {"explain a setting"}).wait();
    std::vector<std::string> values;
    for (int r = 0; r < communicator.size(); ++r) {
      values.emplace_back(static_cast<const char*>(out.raw()) +
                          static_cast<std::size_t>(r) * kWords * 8);
    }
    if (const std::string text = disagreement(values); !text.empty()) {
      stop(text);
    }
  }
  stop("a setting of more than 159 bytes");
}

}  // namespace reprise::distributed

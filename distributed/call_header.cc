#include "distributed/call_header.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "distributed/disagreement.h"

namespace reprise::distributed {

CallHeader header_of(const Collective& collective, std::uint64_t sequence, int rank) {
  CallHeader header;
  header.sequence = sequence;
  header.count = collective.count();
  header.kind = static_cast<std::int32_t>(collective.kind);
  header.reduce = static_cast<std::int32_t>(collective.reduce);
  header.dtype =
      static_cast<std::int32_t>(collective.in.defined() ? collective.in.dtype() : DType::f32);
  header.root = collective.root;
  header.bucket = collective.tag.bucket;
  header.rank = rank;
  const std::string& what = collective.tag.what;
  std::memcpy(header.what, what.data(), std::min(what.size(), sizeof header.what - 1));
  return header;
}

std::string difference(std::span<const CallHeader> headers) {
  std::string found;
  auto expect_equal = [&](const char* field, auto&& value_of) {
    if (!found.empty()) {
      return;
    }
    std::vector<std::string> values;
    for (const CallHeader& header : headers) {
      values.push_back(value_of(header));
    }
    if (const std::string text = disagreement(values); !text.empty()) {
      found = std::string(field) + ": " + text;
    }
  };
  auto number = [](auto x) { return std::to_string(x); };
  expect_equal("purpose", [](const CallHeader& h) { return "\"" + std::string(h.what) + "\""; });
  expect_equal("operation", [](const CallHeader& h) {
    return std::string(name(static_cast<Collective::Kind>(h.kind)));
  });
  expect_equal("bucket", [&](const CallHeader& h) { return number(h.bucket); });
  expect_equal("dtype", [](const CallHeader& h) {
    return std::string(reprise::name(static_cast<DType>(h.dtype)));
  });
  expect_equal("count", [&](const CallHeader& h) { return number(h.count); });
  expect_equal("reduction", [](const CallHeader& h) {
    return std::string(h.reduce == 0 ? "sum" : h.reduce == 1 ? "max" : "min");
  });
  expect_equal("root", [&](const CallHeader& h) { return number(h.root); });
  expect_equal("sequence", [&](const CallHeader& h) { return number(h.sequence); });
  return found;
}

}  // namespace reprise::distributed

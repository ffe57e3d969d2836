#include "distributed/header.h"

#include <algorithm>
#include <vector>

#include "distributed/disagreement.h"

namespace reprise::distributed {

Header header_of(const Collective& collective, std::uint64_t sequence, int rank) {
  Header header;
  header.sequence = sequence;
  header.count = collective.count();
  header.kind = static_cast<std::int32_t>(collective.kind);
  header.reduce = static_cast<std::int32_t>(collective.reduce);
  header.dtype =
      static_cast<std::int32_t>(collective.in.defined() ? collective.in.dtype() : DType::f32);
  header.root = collective.root;
  header.bucket = collective.tag.bucket;
  header.rank = rank;
  collective.tag.what.copy(header.what, sizeof header.what - 1);
  return header;
}

std::uint64_t hash_of(const Header& header) {
  Hash hash;
  hash.add(header.sequence).add(static_cast<std::uint64_t>(header.count));
  for (const std::int32_t field :
       {header.kind, header.reduce, header.dtype, header.root, header.bucket}) {
    hash.add(static_cast<std::uint64_t>(field));
  }
  return hash.add(header.what).value();
}

std::string explain(std::span<const Header> headers) {
  std::string result;
  auto compare = [&](const char* field, auto&& value_of) {
    if (!result.empty()) {
      return;
    }
    std::vector<std::string> values;
    for (const Header& header : headers) {
      values.push_back(value_of(header));
    }
    if (const std::string text = disagreement(values); !text.empty()) {
      result = fmt::format("{}: {}", field, text);
    }
  };
  auto number = [](auto x) { return std::to_string(x); };
  compare("purpose", [](const Header& h) { return "\"" + std::string(h.what) + "\""; });
  compare("operation",
          [](const Header& h) { return std::string(name(static_cast<Collective::Kind>(h.kind))); });
  compare("bucket", [&](const Header& h) { return number(h.bucket); });
  compare("dtype",
          [](const Header& h) { return std::string(reprise::name(static_cast<DType>(h.dtype))); });
  compare("count", [&](const Header& h) { return number(h.count); });
  compare("reduction", [](const Header& h) {
    return std::string(h.reduce == 0 ? "sum" : h.reduce == 1 ? "max" : "min");
  });
  compare("root", [&](const Header& h) { return number(h.root); });
  compare("sequence", [&](const Header& h) { return number(h.sequence); });
  return result;
}

}  // namespace reprise::distributed

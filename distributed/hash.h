// A hash that is the same on every machine, for what ranks must agree on.
#pragma once

#include <cstdint>
#include <string_view>

namespace reprise::distributed {

class Hash {
 public:
  Hash& add(std::string_view text) {  // FNV-1a
    std::uint64_t h = 0xcbf29ce484222325u;
    for (const char c : text) {
      h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }
    return add(h).add(text.size());
  }
  Hash& add(std::uint64_t x) {  // SplitMix64's finaliser
    x = (value_ + 0x9e3779b97f4a7c15u) ^ x;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    value_ = x ^ (x >> 31);
    return *this;
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0;
};

}  // namespace reprise::distributed

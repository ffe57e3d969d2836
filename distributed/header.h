// What ranks must agree on before a collective's payload moves: a message into a receive that is
// too small writes past its end in some MPIs, and NCCL does not look at all.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "distributed/communicator.h"

namespace reprise::distributed {

// FNV-1a: the same on every machine.
class Hash {
 public:
  Hash& add(std::string_view text) {
    for (const char c : text) {
      byte(static_cast<unsigned char>(c));
    }
    return add(text.size());
  }
  Hash& add(std::uint64_t x) {
    for (int i = 0; i < 8; ++i) {
      byte(static_cast<unsigned char>(x >> (8 * i)));
    }
    return *this;
  }
  std::uint64_t value() const { return value_; }

 private:
  void byte(unsigned char b) { value_ = (value_ ^ b) * 0x100000001b3u; }
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

// Of one size, sent as it lies in memory.
struct Header {
  std::uint64_t sequence = 0;
  std::int64_t count = 0;
  std::int32_t kind = 0, reduce = 0, dtype = 0, root = 0, bucket = 0, rank = 0;
  char what[40] = {};
};

Header header_of(const Collective& collective, std::uint64_t sequence, int rank);
// Of all but the rank.
std::uint64_t hash_of(const Header& header);
// headers[r] is rank r's: the first field in which they differ and who has what, as disagreement()
// says it; empty when they are equal.
std::string explain(std::span<const Header> headers);

}  // namespace reprise::distributed

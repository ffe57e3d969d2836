// What ranks must agree on before a collective's payload moves: a message into a receive that is
// too small writes past its end in some MPIs, and NCCL does not look at all.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "distributed/communicator.h"
#include "distributed/hash.h"

namespace reprise::distributed {

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

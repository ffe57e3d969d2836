// What ranks must agree on before a collective: each sends its header, all compare.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "distributed/communicator.h"

namespace reprise::distributed {

// Of a fixed size, so that it can be exchanged by ranks that disagree.
struct CallHeader {
  std::uint64_t sequence = 0;
  std::int64_t count = 0;
  std::int32_t kind = 0, reduce = 0, dtype = 0, root = 0, bucket = 0, rank = 0;
  char what[40] = {};
};

CallHeader header_of(const Collective& collective, std::uint64_t sequence, int rank);

// headers[r] is rank r's. "count: rank 1 has 12, rank 0 has 8" for the first field that differs;
// empty when all are equal.
std::string difference(std::span<const CallHeader> headers);

}  // namespace reprise::distributed

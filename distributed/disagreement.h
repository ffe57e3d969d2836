// Words for what differs between ranks.
#pragma once

#include <span>
#include <string>

namespace reprise::distributed {

// values[r] is what rank r has: "rank 1 has 12, the other 2 have 8" when more than half of the
// ranks agree, else "rank 0 has 8, rank 1 has 12". Empty when all are equal.
std::string disagreement(std::span<const std::string> values);

}  // namespace reprise::distributed

// What must be equal on all ranks, and words for what is not.
#pragma once

#include <span>
#include <string>

#include "distributed/communicator.h"

namespace reprise::distributed {

// values[r] is what rank r has: "rank 1 has 12, the other 2 have 8" when more than half of the
// ranks agree, else "rank 0 has 8, rank 1 has 12". Empty when all are equal.
std::string disagreement(std::span<const std::string> values);

struct Setting {
  std::string name, value;  // together up to 159 bytes count in the words, all of them in the check
};
// A collective: the job ends (Communicator::disagree) when a setting differs between ranks, and the
// text names the first, the ranks and what they have. `when`: "the start of the run".
void require_same(Communicator& communicator, std::span<const Setting> settings,
                  const std::string& when);

}  // namespace reprise::distributed

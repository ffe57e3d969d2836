// What a run needs to go on as if it had never stopped, written from shards and read into shards.
//
//   DIR/training.safetensors
//     NAME.value                      what is trained, whole, under the parameter's name
//     NAME.m, NAME.v, NAME.step       the optimizer's state of it, once it was stepped
//     NAME.master                     with master weights
//     metadata: steps, random_offset
//
//   auto position = load_state("run", optimizer, &sharding, ranks);      // on all ranks
//   ...
//   absl::Status saved = save_state("run", optimizer, &sharding, ranks, {steps, offset});
//
// The file does not say how the run was cut: it is the same, byte by byte, for every stage and
// number of ranks, and fits any other. No rank has more than its shards and one tensor. Another
// file takes the place of an old one in one moment, when it is complete.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "distributed/sharding.h"
#include "nn/optimizer/adamw.h"

namespace reprise::distributed {

struct RunPosition {
  std::int64_t steps = 0;
  std::uint64_t random_offset = 0;  // Generator::next_offset
};

// `optimizer`: of sharding->shards(), or without sharding (null) of whole parameters, the same on
// all ranks. A collective: when one rank cannot, all get an error. Ranks at other positions throw
// CommunicatorError.
absl::Status save_state(const std::string& folder, const nn::AdamW& optimizer, Sharding* sharding,
                        Communicator& ranks, const RunPosition& position);

// Values into the parameters, state into the optimizer, whose options are to be the same. Refused,
// before anything is changed: a parameter that is not there or has another shape or type, and what
// belongs to no parameter of the optimizer. A collective, with errors as above.
absl::StatusOr<RunPosition> load_state(const std::string& folder, nn::AdamW& optimizer,
                                       Sharding* sharding, Communicator& ranks);

}  // namespace reprise::distributed

// Model folders read and written in shards: no rank has more of the model than its shards and one
// parameter.
//
//   auto model = nn::load_model(folder, {.place = place, .values = false});   // on all ranks
//   Sharding sharding(ranks, (*model)->parameters(), reads, {.stage = 3});
//   absl::Status loaded = load_sharded(folder, **model, sharding, ranks);
//   ...
//   absl::Status saved = save_sharded(**model, "out", sharding, ranks);
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "distributed/sharding.h"
#include "nn/models/model.h"

namespace reprise::distributed {

// Each rank reads its parts of the folder's parameters. A collective: when one rank cannot, all get
// an error, which names the first such rank.
absl::Status load_sharded(const std::string& folder, nn::Model& model, Sharding& sharding,
                          Communicator& ranks);

// Rank 0 writes what nn::save_model writes of a whole model, byte by byte, parameter by parameter
// as the ranks send them. A collective, with errors as above. Adapters are not written.
absl::Status save_sharded(nn::Model& model, const std::string& folder, Sharding& sharding,
                          Communicator& ranks, std::int64_t max_shard_bytes = 5'000'000'000);

// A collective: the own error, or when this rank has none one that names the first that has.
absl::Status shared_status(Communicator& ranks, const absl::Status& own, const char* what);

}  // namespace reprise::distributed

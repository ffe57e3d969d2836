// Rank 0 hands bytes to the other ranks through files in a folder that all of them see: where there
// is no MPI to carry them.
//
// A rank leaves `join.<rank>` with a number of its own; when all have, rank 0 leaves `answer` with
// those numbers beside the bytes. A rank takes an answer that has its number, and no other, so that
// what an earlier job left in the folder is never taken; then it removes its file, and rank 0, once
// all are gone, the answer. A folder serves one job at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include <absl/status/status.h>

namespace reprise::distributed {

struct RendezvousOptions {
  std::string folder;  // made if it is not there
  int rank = 0, size = 1;
  std::chrono::milliseconds limit = std::chrono::seconds(120);
};

// `bytes` of rank 0 arrive at all ranks; all give the same number of them. Returns on rank 0 when
// every rank has them. DeadlineExceeded names the ranks that did not come, or came as part of a job
// of another size; Unavailable: a file cannot be written.
absl::Status rendezvous(const RendezvousOptions& options, std::span<std::byte> bytes);
// The same with bytes of each rank, as many everywhere: `all` = those of rank 0, of rank 1, ... on
// every rank. For a second meeting of one job take another folder.
absl::Status rendezvous_of_all(const RendezvousOptions& options, std::string_view mine,
                               std::string& all);

}  // namespace reprise::distributed

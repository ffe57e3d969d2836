// Ranks on cuda devices, by NCCL.
//
//   NcclOptions options{.rank = 1, .size = 4, .device = {DeviceKind::cuda, 1}};
//   auto share = nccl_share(options, mpi.get());      // or a folder: REPRISE_RENDEZVOUS
//   auto communicator = connect_nccl(options, *share);
//
// Tensors lie on the communicator's device, or in host memory (small ones: they go over buffers of
// the communicator). A collective starts when what the compute stream had been given at its call
// is done, on a stream of its own; the words of agree() are always in host memory.
//
// Differences to what communicator.h says: NCCL has its own order of addition, which depends on the
// number of elements and on how the devices are connected; bf16 is rounded after each addition; of
// max and min with NaN it promises nothing.
//
// With `gather` the ranks have the control plane and the watchdog of those on MPI (watchdog.h):
// what a rank does wrong is named, abort() ends the job. Without it abort() does not carry its
// text: the other ranks see that a collective fails or does not end within the limit.
#pragma once

#include <csignal>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "distributed/communicator.h"
#include "distributed/nccl_calls.h"
#include "distributed/watchdog.h"

namespace reprise::distributed {

struct NcclOptions {
  int rank = 0, size = 1;
  Device device{DeviceKind::cuda, 0};
  std::chrono::milliseconds limit = std::chrono::seconds(120);
  std::chrono::milliseconds start_limit = std::chrono::seconds(120);
  // Ranks compare a header before each collective, which NCCL itself does not: without it, ranks
  // that differ in a count hang until the limit or read past an end.
  bool checked = true;
  // Everybody's bytes to everybody, once, at the start: then there is a watchdog, `limit` is its,
  // and collectives have none of their own.
  GatherBytes gather;
  // The rest of what it is told; limits.limit and on_verdict are filled in.
  WatchdogOptions watchdog;
  // Of signals, to be restored at the end; empty: as it is when it is connected.
  std::optional<sigset_t> mask;
};

// Over a folder that all ranks see; by a communicator that lives until then.
GatherBytes gather_over_folder(std::string folder, int rank, int size,
                               std::chrono::milliseconds limit);
GatherBytes gather_over(Communicator& carrier);

// Rank 0's bytes arrive at all ranks. A collective.
using NcclShare = std::function<absl::Status(NcclId& id)>;

// Over files in a folder that all ranks see (distributed/rendezvous.h).
NcclShare share_over_folder(std::string folder, int rank, int size,
                            std::chrono::milliseconds limit);
// By a communicator of the same ranks, which must live on until the identifier is shared.
NcclShare share_over(Communicator& carrier);
// The folder named by REPRISE_RENDEZVOUS, else `carrier`, else nothing for one rank.
// InvalidArgument when there are several ranks and neither.
absl::StatusOr<NcclShare> nccl_share(const NcclOptions& options, Communicator* carrier);

// A collective of all ranks. FailedPrecondition without NCCL or the device; Internal when NCCL does
// not start; DeadlineExceeded after start_limit.
absl::StatusOr<std::unique_ptr<Communicator>> connect_nccl(const NcclOptions& options,
                                                           const NcclShare& share);
// With these calls instead of the library's.
absl::StatusOr<std::unique_ptr<Communicator>> connect_nccl(const NcclOptions& options,
                                                           const NcclShare& share,
                                                           std::unique_ptr<NcclCalls> calls);

}  // namespace reprise::distributed

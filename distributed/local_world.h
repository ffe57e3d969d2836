// The ranks of a job as threads of one process: the collectives, sums and errors of a real job, for
// tests of many ranks on one machine and for trying a program out without a launcher.
//
//   run_ranks(4, [&](Communicator& ranks) {
//     ...                                      // what each rank of a job would do
//   });
//
// Tapes, the current tape and gradient modes belong to a thread, so every rank has its own. What
// the ranks share otherwise (allocators, files, standard output) they share here too.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "distributed/communicator.h"

namespace reprise::distributed {

struct LocalOptions {
  // A collective that is not complete after so long is an error, which names the ranks that miss.
  std::chrono::milliseconds limit = std::chrono::seconds(30);
  int threads = 1;  // of each rank's parallel loops
};

// Communicators of `size` ranks: element r is rank r's, for use by one thread. close() waits for
// all ranks, so a thread must not close two of them. Sums have the bits of connect_mpi's.
std::vector<std::unique_ptr<Communicator>> local_world(int size, const LocalOptions& options = {});

// Calls body(communicator of rank r) on `size` threads and waits for them all. When one throws, the
// others' collectives end with an error; the exception that was first is thrown again here.
void run_ranks(int size, const std::function<void(Communicator&)>& body,
               const LocalOptions& options = {});

}  // namespace reprise::distributed

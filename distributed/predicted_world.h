// One rank of a job that does not exist: for dry runs of what a rank of N needs.
#pragma once

#include <memory>

#include "distributed/communicator.h"

namespace reprise::distributed {

// Every collective is done at once. Gathers and broadcasts take the other ranks to have what this
// one has; reductions leave the elements as they are. Floating tensors on meta have none; for them
// the memory is counted, on meta, that connect_mpi's engine keeps for its sums.
std::unique_ptr<Communicator> predicted_world(int rank, int size);

}  // namespace reprise::distributed

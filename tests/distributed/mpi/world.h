// The communicator that all tests of one rank share: MPI starts once in a process.
#pragma once

#include "distributed/communicator.h"

namespace reprise::testing {

distributed::Communicator& world();

}  // namespace reprise::testing

#include "distributed/local_world.h"
#include "tests/distributed/conformance/net.h"

namespace reprise::testing {

void on_ranks(const std::function<void(distributed::Communicator&)>& body) {
  distributed::run_ranks(2, body);
}

}  // namespace reprise::testing

// Work of the shim's device that is no kernel: stand-ins of libraries, copies.
#pragma once

#include <functional>

namespace reprise::testing {

// Done when it returns, with the device's memory open; or part of the graph, when a step is being
// captured: then it is done at each launch, and must hold what it needs.
void on_device(const char* name, const std::function<void()>& work);

}  // namespace reprise::testing

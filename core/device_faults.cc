#include "core/device_faults.h"

#include <deque>
#include <mutex>
#include <utility>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#include "core/error.h"
#include "core/step_graph.h"

namespace reprise {
namespace {

struct Site {
  std::string operation;
  FaultText text;
};
struct Sites {
  std::mutex mutex;
  std::deque<Site> all;
};
// Never destroyed: a captured step has their numbers.
Sites& sites() {
  static Sites& instance = *new Sites;
  return instance;
}

}  // namespace

std::int64_t fault_site(std::string_view operation, FaultText text) {
  Sites& known = sites();
  const std::lock_guard lock(known.mutex);
  std::int64_t number = 1;
  for (const Site& site : known.all) {
    if (site.text == text && site.operation == operation) {
      return number;
    }
    ++number;
  }
  known.all.push_back({std::string(operation), text});
  return number;
}

void throw_fault(DeviceFault& fault) {
  if (fault.site == 0) {
    return;
  }
  const DeviceFault found = std::exchange(fault, DeviceFault{});
  const Site site = [&] {
    const std::lock_guard lock(sites().mutex);
    ensure(found.site > 0 && found.site <= static_cast<std::int64_t>(sites().all.size()),
           "a fault word of no site: {}", found.site);
    return sites().all[static_cast<std::size_t>(found.site - 1)];
  }();
  fail(site.operation, "{}", site.text(found));
}

void settle_faults(Device device) {
  if (cuda_checked() && !capturing()) {
    cuda_synchronize(device);
  }
}

void check_indices(const IndexCheck& check, Device device) {
  if (check.count > 0 || check.valid != nullptr) {
    launch_index_check(check, cuda_fault_word(device), cuda_stream(device));
    settle_faults(device);
  }
}

}  // namespace reprise

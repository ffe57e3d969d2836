#include "tests/distributed/nccl_processes.h"

#include <cstring>
#include <new>
#include <vector>

#include <sys/mman.h>

#include "distributed/rank_tree.h"

namespace reprise::testing {

NcclMeetingPlace* NcclMeetingPlace::map() {
  void* at = mmap(nullptr, sizeof(NcclMeetingPlace), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return at == MAP_FAILED ? nullptr : new (at) NcclMeetingPlace;
}

NcclResult NcclForProcesses::make_id(NcclId& id) {
  id.fill('n');
  return NcclResult::success;
}

NcclResult NcclForProcesses::init(Comm& comm, int size, const NcclId& id, int rank) {
  if (size > NcclMeetingPlace::kRanks || id[0] != 'n') {
    return NcclResult{1};
  }
  rank_ = rank;
  size_ = size;
  comm = this;
  return NcclResult::success;
}

NcclResult NcclForProcesses::abort(Comm) {
  line_.clear();
  return NcclResult::success;
}

void NcclForProcesses::give(std::function<bool()> work) {
  line_.push_back(std::move(work));
  ++queued_;
}

bool NcclForProcesses::passed(const Event& event) {
  while (!line_.empty() && line_.front()()) {
    line_.pop_front();
    ++done_;
  }
  return done_ >= *static_cast<const std::uint64_t*>(event.get());
}

void NcclForProcesses::copy(void* to, const void* from, std::size_t bytes, Stream) {
  give([=] {
    std::memcpy(to, from, bytes);
    return true;
  });
}

NcclResult NcclForProcesses::enqueue(const NcclOperation& operation, Comm, Stream) {
  const int number = operations_++;
  const std::size_t bytes = operation.count * size_bytes(operation.dtype);
  const bool known = operation.kind == distributed::Collective::Kind::all_reduce ||
                     operation.kind == distributed::Collective::Kind::all_gather;
  if (number >= NcclMeetingPlace::kOperations || bytes > NcclMeetingPlace::kBytes || !known) {
    return NcclResult{5};
  }
  give([=, this] {
    std::byte* mine =
        place_.given[static_cast<std::size_t>(number % 4)][static_cast<std::size_t>(rank_)].data();
    std::memcpy(mine, operation.in, bytes);
    place_.arrived[static_cast<std::size_t>(number)].fetch_add(1, std::memory_order_release);
    return true;
  });
  give([=, this] { return meet(operation, number); });
  return NcclResult::success;
}

bool NcclForProcesses::meet(const NcclOperation& operation, int number) {
  if (place_.arrived[static_cast<std::size_t>(number)].load(std::memory_order_acquire) < size_) {
    return false;
  }
  const auto& given = place_.given[static_cast<std::size_t>(number % 4)];
  const std::size_t bytes = operation.count * size_bytes(operation.dtype);
  std::vector<const void*> parts;
  for (int r = 0; r < size_; ++r) {
    parts.push_back(given[static_cast<std::size_t>(r)].data());
  }
  if (operation.kind == distributed::Collective::Kind::all_reduce) {
    distributed::reduce_tree(parts, operation.out, static_cast<std::int64_t>(operation.count),
                             operation.dtype, operation.reduce);
    return true;
  }
  for (std::size_t r = 0; r < parts.size(); ++r) {
    std::memcpy(static_cast<std::byte*>(operation.out) + r * bytes, parts[r], bytes);
  }
  return true;
}

}  // namespace reprise::testing

// NCCL and CUDA without either, for ranks that are processes: they were forked from one that had
// mapped the memory in which their operations meet. Streams are lists of what is to be done, worked
// off when somebody asks how far they are. Nothing in it notices that a rank is gone.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include "distributed/nccl_calls.h"

namespace reprise::testing {

using distributed::NcclId;
using distributed::NcclOperation;
using distributed::NcclResult;

// What the ranks share. Of operation n, slot n % 4: a rank that is at n + 4 has seen all others at
// n + 3, and so behind n.
struct NcclMeetingPlace {
  static constexpr int kRanks = 8, kOperations = 4096;
  static constexpr std::size_t kBytes = 1 << 16;
  std::array<std::atomic<int>, kOperations> arrived;
  std::array<std::array<std::array<std::byte, kBytes>, kRanks>, 4> given;

  // Shared with what is forked later.
  static NcclMeetingPlace* map();
};

class NcclForProcesses final : public distributed::NcclCalls {
 public:
  explicit NcclForProcesses(NcclMeetingPlace& place) : place_(place) {}

  NcclResult make_id(NcclId& id) override;
  NcclResult init(Comm& comm, int size, const NcclId& id, int rank) override;
  NcclResult state(Comm) override { return NcclResult::success; }
  NcclResult enqueue(const NcclOperation& operation, Comm comm, Stream stream) override;
  NcclResult finalize(Comm) override { return NcclResult::success; }
  NcclResult destroy(Comm) override { return NcclResult::success; }
  NcclResult abort(Comm) override;
  std::string text(NcclResult, Comm) override { return "unhandled cuda error"; }
  void use_device() override {}
  bool on_device(const Tensor&) override { return true; }
  Stream make_stream() override { return this; }
  void destroy_stream(Stream) override {}
  Event mark_compute() override { return std::make_shared<std::uint64_t>(0); }
  Event mark(Stream) override { return std::make_shared<std::uint64_t>(queued_); }
  void wait_for(Stream, const Event&) override {}
  bool passed(const Event& event) override;
  void* allocate(std::size_t bytes, Stream) override { return new std::byte[bytes]; }
  void free(void* at, Stream) override { delete[] static_cast<std::byte*>(at); }
  void* allocate_pinned(std::size_t bytes) override { return new std::byte[bytes]; }
  void free_pinned(void* at) override { delete[] static_cast<std::byte*>(at); }
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override;

 private:
  void give(std::function<bool()> work);
  bool meet(const NcclOperation& operation, int number);

  NcclMeetingPlace& place_;
  int rank_ = 0, size_ = 1, operations_ = 0;
  std::deque<std::function<bool()>> line_;  // each says whether it is done
  std::uint64_t queued_ = 0, done_ = 0;
};

}  // namespace reprise::testing

// What the NCCL communicator asks of NCCL and of the CUDA runtime, without their headers: the
// library itself (nccl_library.cc), or a stand-in in a test.
//
// The device is current on every thread that calls use_device() first. Calls of CUDA throw Error;
// calls of NCCL return its result. `in_progress` means: poll state() until it says something else
// before the next call on that communicator.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/tensor.h"
#include "distributed/communicator.h"

namespace reprise::distributed {

using NcclId = std::array<char, 128>;

// As nccl.h numbers them; any other value is an error too.
enum class NcclResult : int { success = 0, remote_error = 6, in_progress = 7 };

// all_reduce, reduce_scatter, all_gather or broadcast as NCCL counts it: elements that one rank
// gives, or, for reduce_scatter, gets.
struct NcclOperation {
  Collective::Kind kind = Collective::Kind::all_reduce;
  Reduce reduce = Reduce::sum;
  DType dtype = DType::f32;
  int root = 0;
  const void* in = nullptr;
  void* out = nullptr;
  std::size_t count = 0;
};

class NcclCalls {
 public:
  using Comm = void*;
  using Stream = void*;
  using Event = std::shared_ptr<void>;  // its last owner destroys it
  NcclCalls() = default;
  NcclCalls(const NcclCalls&) = delete;
  virtual ~NcclCalls() = default;

  // NCCL. No call may wait for another rank.
  virtual NcclResult make_id(NcclId& id) = 0;
  virtual NcclResult init(Comm& comm, int size, const NcclId& id, int rank) = 0;
  virtual NcclResult state(Comm comm) = 0;
  virtual NcclResult enqueue(const NcclOperation& operation, Comm comm, Stream stream) = 0;
  virtual NcclResult finalize(Comm comm) = 0;
  virtual NcclResult destroy(Comm comm) = 0;
  // Ends what is under way; the communicator is gone. Instead of finalize and destroy.
  virtual NcclResult abort(Comm comm) = 0;
  virtual std::string text(NcclResult result, Comm comm) = 0;

  // CUDA
  virtual void use_device() = 0;
  // Whether collectives can use this memory as it is.
  virtual bool on_device(const Tensor& data) = 0;
  virtual Stream make_stream() = 0;
  virtual void destroy_stream(Stream stream) = 0;
  // After what the compute stream, or `stream`, has been given so far.
  virtual Event mark_compute() = 0;
  virtual Event mark(Stream stream) = 0;
  virtual void wait_for(Stream stream, const Event& event) = 0;
  virtual bool passed(const Event& event) = 0;
  // Device memory in order of the stream, and host memory that a copy does not wait for.
  virtual void* allocate(std::size_t bytes, Stream stream) = 0;
  virtual void free(void* at, Stream stream) = 0;
  virtual void* allocate_pinned(std::size_t bytes) = 0;
  virtual void free_pinned(void* at) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, Stream stream) = 0;
};

// NCCL and CUDA as linked. FailedPrecondition when this build has no NCCL, or the device is not
// there.
absl::StatusOr<std::unique_ptr<NcclCalls>> nccl_library(Device device);
// "NCCL 2.28.9" as it runs; empty without.
std::string nccl_version();

}  // namespace reprise::distributed

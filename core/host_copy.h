// A tensor that is in host memory for a while, so that its own memory is free for others:
//
//   HostCopy copy(std::move(tensor));  // the copy to the host begins
//   copy.settle();                     // the device's memory goes (after the copy, in stream
//   order) copy.fetch(MemoryKind::saved);     // device memory is taken, the copy back begins
//   Tensor same = copy.take();         // may be used by all that compute is given from now on
//
// On a cuda device the copies run on its copy stream, from and to page-locked memory, and the host
// waits for none of them. On the cpu they are done at once, on meta bytes are counted only. The
// host memory is of the account host_of(device) and kind `saved`.
#pragma once

#include <cstdint>

#include "core/streams.h"
#include "core/tensor.h"

namespace reprise {

class HostCopy {
 public:
  // `source` is contiguous and all of its storage. Throws Error when there is no host memory; then
  // nothing has happened.
  explicit HostCopy(const Tensor& source);
  // Whatever is under way is waited for, in order of the compute stream.
  ~HostCopy();
  HostCopy(const HostCopy&) = delete;

  // Whether the tensor can leave: its memory is its own and would go.
  static bool can_leave(const Tensor& tensor);
  bool on_device() const { return device_.has_storage(); }
  std::int64_t bytes() const { return device_.bytes(); }
  // Nothing once it was fetched.
  void settle();
  // Nothing where device memory is there still. Throws Error when there is none; then the elements
  // are in host memory still.
  void fetch(MemoryKind kind);
  // The tensor with its elements (fetched if it was not); host memory goes. Once.
  Tensor take(MemoryKind kind);

 private:
  void copy(const Tensor& to, const Tensor& from);
  void wait_for_copy();

  Tensor device_, host_;
  Streams* streams_ = nullptr;  // null: copies are done at once
  Streams::Mark copied_;
  bool wanted_ = false;  // fetched, maybe before its memory went
};

// While it lives, on this thread, copies of cpu tensors go through these streams as those of a cuda
// device do: for tests of their order on a stand-in.
class CopiesThrough {
 public:
  explicit CopiesThrough(Streams& streams);
  ~CopiesThrough();
  CopiesThrough(const CopiesThrough&) = delete;

 private:
  Streams* before_;
};

}  // namespace reprise

#include "core/host_copy.h"

#include <utility>

#include "core/cuda_device.h"

namespace reprise {
namespace {

thread_local Streams* copies_through = nullptr;

Streams* streams_for(Device device) {
  return device.kind == DeviceKind::cuda  ? &cuda_streams(device)
         : device.kind == DeviceKind::cpu ? copies_through
                                          : nullptr;
}

}  // namespace

CopiesThrough::CopiesThrough(Streams& streams) : before_(std::exchange(copies_through, &streams)) {}
CopiesThrough::~CopiesThrough() {
  copies_through = before_;
}

bool HostCopy::can_leave(const Tensor& tensor) {
  return tensor.has_storage() && tensor.storage_references() == 1 && !tensor.is_external() &&
         is_floating(tensor.dtype()) && tensor.bytes() > 0 && tensor.is_contiguous() &&
         tensor.storage_bytes() == tensor.bytes();
}

HostCopy::HostCopy(const Tensor& source)
    : device_(source),
      host_(Tensor::empty(source.shape(), source.dtype(), host_of(source.device()),
                          MemoryKind::saved)),
      streams_(streams_for(source.device())) {
  if (source.is_meta()) {
    return;
  }
  if (streams_ == nullptr) {
    host_.copy_from(device_);
    return;
  }
  copy(host_, device_);
}

HostCopy::~HostCopy() {
  try {
    wait_for_copy();
  } catch (...) {
    // The device is lost, and the next call says so.
  }
}

// What is copied may be of work that compute has yet to do, and so may the memory that it goes to.
void HostCopy::copy(const Tensor& to, const Tensor& from) {
  streams_->follow(StreamKind::copy, StreamKind::compute);
  streams_->copy(StreamKind::copy, to.raw(), from.raw(), static_cast<std::size_t>(to.bytes()));
  try {
    copied_ = streams_->mark(StreamKind::copy);
  } catch (...) {
    streams_->synchronize(StreamKind::copy);  // the memory of both sides may go at once
    throw;
  }
}

// Device memory that the copy stream reads or writes may go, or be read, after this: compute waits.
// Host memory may go without a wait, since copies are all that touches it and they are in order.
void HostCopy::wait_for_copy() {
  if (copied_.defined()) {
    streams_->wait(StreamKind::compute, copied_);
    copied_ = {};
  }
}

void HostCopy::settle() {
  if (on_device() && !wanted_) {
    wait_for_copy();
    device_.drop_storage();
  }
}

void HostCopy::fetch(MemoryKind kind) {
  if (on_device()) {
    wanted_ = true;
    return;
  }
  device_.set_storage(Tensor::empty(device_.shape(), device_.dtype(), device_.device(), kind));
  wanted_ = true;
  if (device_.is_meta()) {
    return;
  }
  if (streams_ == nullptr) {
    device_.copy_from(host_);
    return;
  }
  try {
    copy(device_, host_);
  } catch (...) {
    device_.drop_storage();
    wanted_ = false;
    throw;
  }
}

Tensor HostCopy::take(MemoryKind kind) {
  fetch(kind);
  wait_for_copy();
  host_.drop_storage();
  return std::exchange(device_, Tensor());
}

}  // namespace reprise

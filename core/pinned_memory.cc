#include "core/pinned_memory.h"

#include <algorithm>
#include <bit>

#include "core/error.h"

namespace reprise {
namespace {

std::size_t rounded(std::size_t bytes) {
  const std::size_t step = std::max(std::bit_ceil(bytes) / 16, std::size_t{64});
  return (bytes + step - 1) / step * step;
}

}  // namespace

PinnedMemory::~PinnedMemory() {
  give_back();
}

void* PinnedMemory::allocate(std::size_t bytes) {
  const std::size_t size = rounded(bytes);
  std::vector<void*>& kept = kept_[size];
  if (!kept.empty()) {
    void* at = kept.back();
    kept.pop_back();
    return at;
  }
  kept.reserve(kept.capacity() + 1);  // for free(), which must not throw
  void* at = calls_->allocate_pinned(size);
  if (at == nullptr) {
    give_back();
    at = calls_->allocate_pinned(size);
  }
  if (at == nullptr) {
    fail("cuda", "no page-locked host memory for {} bytes; {} are held", bytes, reserved_bytes_);
  }
  reserved_bytes_ += size;
  return at;
}

void PinnedMemory::free(void* at, std::size_t bytes) noexcept {
  kept_.find(rounded(bytes))->second.push_back(at);
}

void PinnedMemory::give_back() {
  for (auto& [size, kept] : kept_) {
    for (void* at : kept) {
      calls_->free_pinned(at);
      reserved_bytes_ -= size;
    }
    kept.clear();
  }
}

}  // namespace reprise

// Page-locked host memory, which a device copies from and to while both go on. Blocks that are
// freed are kept for the next of their size: the system's own call takes milliseconds and waits
// for the device.
//
// Whoever frees a block has ordered the last copy that uses it before all that its next owner will
// do, as copies on one stream are.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "core/allocator.h"
#include "core/cuda_calls.h"

namespace reprise {

class PinnedMemory final : public MemorySource {
 public:
  explicit PinnedMemory(std::shared_ptr<CudaCalls> calls) : calls_(std::move(calls)) {}
  ~PinnedMemory() override;
  // Sizes are rounded up to 1/8 of a power of two. When the system has no more, what is kept is
  // given back first; throws Error when that does not help.
  void* allocate(std::size_t bytes) override;
  void free(void* at, std::size_t bytes) noexcept override;

  // Page-locked now: handed out or kept.
  std::size_t reserved_bytes() const { return reserved_bytes_; }

 private:
  void give_back();

  const std::shared_ptr<CudaCalls> calls_;
  std::map<std::size_t, std::vector<void*>> kept_;  // by rounded size
  std::size_t reserved_bytes_ = 0;
};

}  // namespace reprise

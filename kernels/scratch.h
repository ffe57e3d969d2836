// A workspace cut into slots, one for each thread that works at a time. Which thread has which slot
// changes from run to run, so nothing may be carried over in one.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "core/error.h"

namespace reprise::kernels {

constexpr std::int64_t aligned_bytes(std::int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

class ScratchSlots {
 public:
  // `slots` slots of slot_bytes each, a multiple of 64.
  ScratchSlots(void* workspace, std::int64_t slots, std::int64_t slot_bytes) {
    for (std::int64_t i = 0; i < slots; ++i) {
      free_.push_back(static_cast<char*>(workspace) + i * slot_bytes);
    }
  }

  class Use {
   public:
    explicit Use(ScratchSlots& slots) : slots_(slots) {
      const std::lock_guard lock(slots_.mutex_);
      ensure(!slots_.free_.empty(), "a thread beyond the {} announced", slots_.free_.capacity());
      at_ = slots_.free_.back();
      slots_.free_.pop_back();
    }
    ~Use() {
      const std::lock_guard lock(slots_.mutex_);
      slots_.free_.push_back(at_);
    }
    Use(const Use&) = delete;
    char* at() const { return at_; }

   private:
    ScratchSlots& slots_;
    char* at_;
  };

 private:
  std::mutex mutex_;
  std::vector<char*> free_;
};

}  // namespace reprise::kernels

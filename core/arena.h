// Host memory for the accounting allocator.
//
// Large blocks come from one reserved range of addresses, best fit, neighbours joined when freed,
// so that a step's blocks land where the last step's were. Pages that were touched stay resident
// for the next step, up to the most bytes that were ever live at once + a slack; beyond that, free
// pages are given back to the system. Residency is kept by huge pages (2 MiB), which the range asks
// for: fewer faults, and fewer misses where a product walks over rows that are far apart.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/allocator.h"

namespace reprise {

class Arena : public MemorySource {
 public:
  // `slack_bytes`: what may be resident beyond the most bytes that were live at once.
  explicit Arena(std::size_t slack_bytes = std::size_t{32} << 20);
  ~Arena() override;
  void* allocate(std::size_t bytes) override;
  void free(void* at, std::size_t bytes) noexcept override;

  // Of the reserved range: huge pages that a block has touched and that were not given back.
  std::size_t resident_bytes() const { return resident_bytes_; }

 private:
  using Free = std::map<char*, std::size_t>;  // bytes by address
  void insert(char* at, std::size_t bytes);
  Free::iterator remove(Free::iterator it);
  void touch(const char* at, std::size_t bytes);
  void trim(std::size_t to_bytes);
  // Gives back the whole huge pages of a free block until `to_bytes` are resident.
  void give_back(char* at, std::size_t bytes, std::size_t to_bytes);

  const std::size_t slack_bytes_;
  char* reserved_ = nullptr;
  std::size_t reserved_bytes_ = 0;
  char* base_ = nullptr;  // the first huge page of the range
  Free free_;
  std::set<std::pair<std::size_t, char*>> by_size_;  // the same, for best fit
  std::vector<bool> resident_;                       // by huge page, up to the last one touched
  std::size_t resident_bytes_ = 0;
  std::size_t live_bytes_ = 0, most_live_bytes_ = 0;
  std::size_t pinned_bytes_ = 0;  // no trim below: the last one left this much
};

}  // namespace reprise

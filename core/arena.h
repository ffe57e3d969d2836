// Host memory for the accounting allocator.
//
// Large blocks come from one reserved range of addresses, best fit, neighbours joined when freed,
// so that a step's blocks land where the last step's were. Free pages beyond a slack are given
// back to the system: resident memory stays below live bytes + slack.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <utility>

#include "core/allocator.h"

namespace reprise {

class Arena : public MemorySource {
 public:
  // `slack_bytes`: free memory that may stay resident.
  explicit Arena(std::size_t slack_bytes = default_slack_bytes);
  // Of arenas made from now on: a program that times kernels, not steps, sets it before its first
  // tensor, and no page is taken back between two runs.
  inline static std::size_t default_slack_bytes = std::size_t{32} << 20;
  ~Arena() override;
  void* allocate(std::size_t bytes) override;
  void free(void* at, std::size_t bytes) noexcept override;

 private:
  struct Span {
    std::size_t bytes;
    std::size_t dirty_bytes;  // at most this much of it may be resident
  };
  void insert(char* at, Span span);
  std::map<char*, Span>::iterator remove(std::map<char*, Span>::iterator it);
  void trim();

  const std::size_t slack_bytes_;
  char* base_ = nullptr;
  std::size_t reserved_bytes_ = 0;
  std::map<char*, Span> free_;                       // by address
  std::set<std::pair<std::size_t, char*>> by_size_;  // the same, for best fit
  std::size_t dirty_bytes_ = 0;                      // sum over free_
};

}  // namespace reprise

#include "core/arena.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include <sys/mman.h>

#include "core/error.h"

namespace reprise {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kSmall = 32 << 10;  // below: the C library's heap
constexpr std::size_t kReserved = std::size_t{1} << 42;

std::size_t page_rounded(std::size_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

}  // namespace

Arena::Arena(std::size_t slack_bytes) : slack_bytes_(slack_bytes) {
  for (std::size_t bytes = kReserved; bytes >= (std::size_t{1} << 32); bytes /= 4) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) {
      reserved_ = static_cast<char*>(at);
      reserved_bytes_ = bytes;
      const std::size_t over = reinterpret_cast<std::uintptr_t>(at) % kHugePage;
      base_ = reserved_ + (over == 0 ? 0 : kHugePage - over);
      const std::size_t usable =
          static_cast<std::size_t>(reserved_ + bytes - base_) / kHugePage * kHugePage;
      madvise(base_, usable, MADV_HUGEPAGE);  // where the system has none, small pages do
      insert(base_, usable);
      return;
    }
  }
  // Address space is limited here: everything comes from the C library.
}

Arena::~Arena() {
  if (reserved_ != nullptr) {
    munmap(reserved_, reserved_bytes_);
  }
}

void Arena::insert(char* at, std::size_t bytes) {
  free_.emplace(at, bytes);
  by_size_.emplace(bytes, at);
}

Arena::Free::iterator Arena::remove(Free::iterator it) {
  by_size_.erase({it->second, it->first});
  return free_.erase(it);
}

void* Arena::allocate(std::size_t bytes) {
  if (bytes < kSmall || base_ == nullptr) {
    void* at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (at == nullptr) {
      fail("allocate", "out of host memory: {} bytes", bytes);
    }
    return at;
  }
  const std::size_t wanted = page_rounded(bytes);
  const auto fit = by_size_.lower_bound({wanted, nullptr});
  if (fit == by_size_.end()) {
    fail("allocate", "out of host address space: {} bytes", bytes);
  }
  const auto [found, at] = *fit;
  remove(free_.find(at));
  if (found > wanted) {
    insert(at + wanted, found - wanted);
  }
  live_bytes_ += wanted;
  most_live_bytes_ = std::max(most_live_bytes_, live_bytes_);
  touch(at, wanted);
  if (resident_bytes_ > std::max(most_live_bytes_ + slack_bytes_, pinned_bytes_)) {
    trim(most_live_bytes_ + slack_bytes_ / 2);
    // Small blocks may hold on to every huge page: then only more of them are worth another look.
    pinned_bytes_ = resident_bytes_ + slack_bytes_ / 4;
  }
  return at;
}

void Arena::free(void* at, std::size_t bytes) noexcept {
  if (bytes < kSmall || base_ == nullptr) {
    std::free(at);
    return;
  }
  char* first = static_cast<char*>(at);
  std::size_t size = page_rounded(bytes);
  live_bytes_ -= size;
  auto next = free_.lower_bound(first);
  if (next != free_.end() && next->first == first + size) {
    size += next->second;
    next = remove(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == first) {
      first = before->first;
      size += before->second;
      remove(before);
    }
  }
  insert(first, size);
  if (size >= 2 * kHugePage) {
    pinned_bytes_ = 0;
  }
}

void Arena::touch(const char* at, std::size_t bytes) {
  const auto first = static_cast<std::size_t>(at - base_) / kHugePage;
  const auto last = (static_cast<std::size_t>(at - base_) + bytes - 1) / kHugePage;
  if (resident_.size() <= last) {
    resident_.resize(last + 1);
  }
  for (std::size_t page = first; page <= last; ++page) {
    if (!resident_[page]) {
      resident_[page] = true;
      resident_bytes_ += kHugePage;
    }
  }
}

void Arena::trim(std::size_t to_bytes) {
  // The largest go first: fewest calls, and small holes are soon used again.
  for (auto it = by_size_.rbegin(); it != by_size_.rend() && resident_bytes_ > to_bytes; ++it) {
    give_back(it->second, it->first, to_bytes);
  }
}

void Arena::give_back(char* at, std::size_t bytes, std::size_t to_bytes) {
  const auto offset = static_cast<std::size_t>(at - base_);
  const std::size_t first = (offset + kHugePage - 1) / kHugePage;
  const std::size_t end = std::min((offset + bytes) / kHugePage, resident_.size());
  // From the end: a block is taken from the front of what is free.
  for (std::size_t page = end; page > first && resident_bytes_ > to_bytes;) {
    --page;
    if (resident_[page]) {
      madvise(base_ + page * kHugePage, kHugePage, MADV_DONTNEED);
      resident_[page] = false;
      resident_bytes_ -= kHugePage;
    }
  }
}

}  // namespace reprise

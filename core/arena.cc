#include "core/arena.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <new>

#include <sys/mman.h>

#include "core/error.h"

namespace reprise {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kSmall = 32 << 10;  // below: the C library's heap
constexpr std::size_t kReserved = std::size_t{1} << 42;

std::size_t page_rounded(std::size_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

}  // namespace

Arena::Arena(std::size_t slack_bytes) : slack_bytes_(slack_bytes) {
  for (reserved_bytes_ = kReserved; reserved_bytes_ >= (std::size_t{1} << 32);
       reserved_bytes_ /= 4) {
    void* at = mmap(nullptr, reserved_bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) {
      base_ = static_cast<char*>(at);
      insert(base_, {reserved_bytes_, 0});
      return;
    }
  }
  reserved_bytes_ = 0;  // address space is limited here: everything comes from the C library
}

Arena::~Arena() {
  if (base_ != nullptr) {
    munmap(base_, reserved_bytes_);
  }
}

void Arena::insert(char* at, Span span) {
  free_.emplace(at, span);
  by_size_.emplace(span.bytes, at);
  dirty_bytes_ += span.dirty_bytes;
}

std::map<char*, Arena::Span>::iterator Arena::remove(std::map<char*, Span>::iterator it) {
  dirty_bytes_ -= it->second.dirty_bytes;
  by_size_.erase({it->second.bytes, it->first});
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
  const auto it = free_.find(fit->second);
  char* at = it->first;
  const Span span = it->second;
  remove(it);
  if (span.bytes > wanted) {
    const std::size_t dirty = span.dirty_bytes > wanted ? span.dirty_bytes - wanted : 0;
    insert(at + wanted, {span.bytes - wanted, dirty});
  }
  return at;
}

void Arena::free(void* at, std::size_t bytes) noexcept {
  if (bytes < kSmall || base_ == nullptr) {
    std::free(at);
    return;
  }
  char* first = static_cast<char*>(at);
  Span span{page_rounded(bytes), page_rounded(bytes)};
  auto next = free_.lower_bound(first);
  if (next != free_.end() && next->first == first + span.bytes) {
    span.bytes += next->second.bytes;
    span.dirty_bytes += next->second.dirty_bytes;
    next = remove(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes == first) {
      first = before->first;
      span.bytes += before->second.bytes;
      span.dirty_bytes += before->second.dirty_bytes;
      remove(before);
    }
  }
  insert(first, span);
  if (dirty_bytes_ > slack_bytes_) {
    trim();
  }
}

void Arena::trim() {
  // The largest go first: fewest calls, and small holes are soon used again.
  for (auto it = by_size_.rbegin(); it != by_size_.rend() && dirty_bytes_ > slack_bytes_ / 2;
       ++it) {
    Span& span = free_.at(it->second);
    if (span.dirty_bytes > 0) {
      // A span's dirty part cannot be told from its clean part, and giving back clean pages is free
      // of effect; only the huge tail beyond the last use is worth leaving out.
      madvise(it->second, span.bytes, MADV_DONTNEED);
      dirty_bytes_ -= span.dirty_bytes;
      span.dirty_bytes = 0;
    }
  }
}

}  // namespace reprise

#include "tests/simt/device_memory.h"

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string_view>

#include <sys/mman.h>
#include <unistd.h>

#include "core/error.h"
#include "tests/simt/simt.h"

namespace reprise::testing {
namespace {

constexpr std::size_t kReserved = std::size_t{4} << 40;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kApart = 256;  // between blocks, so that what leaves a tensor is in none

const char* reserved_begin = nullptr;

#if !defined(__SANITIZE_ADDRESS__)  // it explains signals itself
void explain(int signal, siginfo_t* info, void*) {
  const auto* const at = static_cast<const char*>(info->si_addr);
  if (at >= reserved_begin && at < reserved_begin + kReserved) {
    constexpr std::string_view kText = "the host touches memory of the device\n";
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, kText.data(), kText.size());
  }
  std::signal(signal, SIG_DFL);  // the access comes again, and ends the program
}
#endif

}  // namespace

DeviceMemory& DeviceMemory::instance() {
  static DeviceMemory& memory = *new DeviceMemory;  // outlives every tensor
  return memory;
}

DeviceMemory::DeviceMemory() {
  if (const char* const bytes = std::getenv("REPRISE_SHIM_BYTES")) {
    total_bytes = std::atoll(bytes);
  }
  void* const at =
      mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ensure(at != MAP_FAILED, "no range of addresses for the shim's device");
  base_ = static_cast<char*>(at);
  reserved_begin = base_;
#if !defined(__SANITIZE_ADDRESS__)
  struct sigaction action = {};
  action.sa_sigaction = &explain;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
#endif
}

void DeviceMemory::protect(int protection) {
  if (used_ > 0) {
    ensure(mprotect(base_, used_, protection) == 0, "mprotect of the shim's device failed");
  }
}

bool DeviceMemory::holds(const void* at) const {
  return at >= base_ && at < base_ + kReserved;
}

void* DeviceMemory::allocate(std::size_t bytes) {
  const std::size_t wanted = (bytes + 2 * kApart - 1) / kApart * kApart + kApart;
  const std::lock_guard lock(mutex_);
  const auto fit =
      std::ranges::find_if(free_, [&](const auto& block) { return block.second >= wanted; });
  char* first = nullptr;
  if (fit != free_.end()) {
    const auto [at, found] = *fit;
    first = at;
    free_.erase(fit);
    if (found > wanted) {
      free_.emplace(first + wanted, found - wanted);
    }
  } else {
    const std::size_t grown = (wanted + kPage - 1) / kPage * kPage;
    if (used_ + grown > kReserved) {
      fail("cuda", "no memory for {} bytes on cuda:0", bytes);
    }
    first = base_ + used_;
    used_ += grown;
    if (accesses_ > 0) {
      protect(PROT_READ | PROT_WRITE);
    }
    if (grown > wanted) {
      free_.emplace(first + wanted, grown - wanted);
    }
  }
  taken_.emplace(first, wanted);
  return first + kApart;
}

void DeviceMemory::free(void* at) noexcept {
  const std::lock_guard lock(mutex_);
  const auto block = taken_.extract(static_cast<char*>(at) - kApart);
  char* first = block.key();
  std::size_t bytes = block.mapped();
  if (simt::options().corners) {
    // Not used again: what is read there although nobody wrote it shall be 0.
    char* const page = first + (kPage - reinterpret_cast<std::uintptr_t>(first) % kPage) % kPage;
    if (first + bytes > page) {
      madvise(page, static_cast<std::size_t>(first + bytes - page) / kPage * kPage, MADV_DONTNEED);
    }
    return;
  }
  auto next = free_.lower_bound(first);
  if (next != free_.end() && next->first == first + bytes) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == first) {
    const auto before = std::prev(next);
    before->second += bytes;
    return;
  }
  free_.emplace(first, bytes);
}

DeviceMemory::Access::Access() {
  DeviceMemory& memory = instance();
  const std::lock_guard lock(memory.mutex_);
  if (memory.accesses_++ == 0) {
    memory.protect(PROT_READ | PROT_WRITE);
  }
}

DeviceMemory::Access::~Access() {
  DeviceMemory& memory = instance();
  const std::lock_guard lock(memory.mutex_);
  if (--memory.accesses_ == 0) {
    memory.protect(PROT_NONE);
  }
}

}  // namespace reprise::testing

#include "train/progress.h"

#include <cstdio>
#include <fstream>

#include <fmt/format.h>
#include <unistd.h>

#include "core/allocator.h"

namespace reprise::train {
namespace {

std::int64_t status_bytes(std::string_view key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key)) {
      return std::stoll(line.substr(key.size())) * 1024;
    }
  }
  return 0;
}

}  // namespace

std::string human_bytes(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes >= std::int64_t{1} << 30) {
    return fmt::format("{:.2f} GiB", value / (1 << 30));
  }
  if (bytes >= std::int64_t{1} << 20) {
    return fmt::format("{:.1f} MiB", value / (1 << 20));
  }
  if (bytes >= std::int64_t{1} << 10) {
    return fmt::format("{:.1f} KiB", value / (1 << 10));
  }
  return fmt::format("{} B", bytes);
}

std::string human_seconds(double seconds) {
  const auto whole = static_cast<std::int64_t>(seconds + 0.5);
  if (whole >= 3600) {
    return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

std::int64_t peak_resident_bytes() {
  return status_bytes("VmHWM:");
}
std::int64_t resident_bytes() {
  return status_bytes("VmRSS:");
}

Progress::Progress(bool quiet)
    : quiet_(quiet),
      terminal_(isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()) {}

void Progress::show(const State& state, bool last) {
  using Seconds = std::chrono::duration<double>;
  const auto now = std::chrono::steady_clock::now();
  const double interval = terminal_ ? 0.2 : 10.0;
  if (quiet_ || (!last && Seconds(now - shown_).count() < interval)) {
    return;
  }
  shown_ = now;
  const double elapsed = Seconds(now - start_).count();
  const double left = state.fraction > 0 ? elapsed * (1 - state.fraction) / state.fraction : 0;
  const MemoryReport memory = allocator(cpu).report();
  fmt::print(stderr, "{}step {:5}  loss {:.4f}  {:.0f} tokens/s  memory {} (peak {})  left {}{}",
             terminal_ ? "\r\x1b[K" : "", state.step, state.loss,
             static_cast<double>(state.tokens) / elapsed, human_bytes(memory.live_bytes),
             human_bytes(memory.peak_bytes), human_seconds(left), terminal_ && !last ? "" : "\n");
  std::fflush(stderr);
}

}  // namespace reprise::train

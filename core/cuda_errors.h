// What an error of the CUDA runtime means to whoever sees it, by its number: nothing here needs a
// CUDA header, a driver or a device.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace reprise {

// What to do about a status, to stand behind the runtime's own text; empty: nothing to add.
std::string cuda_advice(int status);

// Throws Error where the kernels of a build, for 8.0, 8.7 and 9.0, do not run on the card.
void expect_capability(std::string_view device, std::string_view card, int major, int minor);

// REPRISE_CUDA_CHECKED=1: every launch is waited for, so that a fault is found at the kernel that
// made it. Those of a captured step are not: there is nothing to wait for while they are captured.
bool cuda_checked();

struct LaunchSizes {
  std::uint32_t grid[3], block[3];
  std::uint64_t shared_bytes;
};
// Throws Error with the runtime's text, the kernel and its sizes. `finished`: the launch went well,
// the kernel did not.
[[noreturn]] void fail_launch(const char* kernel, const LaunchSizes& sizes, bool finished,
                              int status);

// In checked mode, after a call of a library was given to the stream (a cudaStream_t): waits for
// it, and throws Error with the runtime's text and what was asked for, `sizes()`, when it went
// wrong.
void settle_call(const char* operation, void* stream, const std::function<std::string()>& sizes);

}  // namespace reprise

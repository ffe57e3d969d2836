#include "core/cuda_errors.h"

#include <cstdlib>

#include "core/cuda_device.h"
#include "core/error.h"
#include "core/step_graph.h"

namespace reprise {

std::string cuda_advice(int status) {
  switch (status) {
    case 3:    // cudaErrorInitializationError
    case 35:   // cudaErrorInsufficientDriver
    case 803:  // cudaErrorSystemDriverMismatch
      return "there is no driver, or one older than this build's CUDA: install NVIDIA's driver "
             "(nvidia-smi must list the card)";
    case 100:  // cudaErrorNoDevice
    case 101:  // cudaErrorInvalidDevice
      return "nvidia-smi -L lists the cards, CUDA_VISIBLE_DEVICES may hide some";
    case 209:  // cudaErrorNoKernelImageForDevice
      return "the card is none of those that this build has kernels for: compute capability 8.0, "
             "8.7 and 9.0";
    case 700:  // cudaErrorIllegalAddress
    case 710:  // cudaErrorAssert
    case 714:  // cudaErrorHardwareStackError
    case 715:  // cudaErrorIllegalInstruction
    case 716:  // cudaErrorMisalignedAddress
    case 717:  // cudaErrorInvalidAddressSpace
    case 718:  // cudaErrorInvalidPc
    case 719:  // cudaErrorLaunchFailure
      return "a kernel that was started earlier made it, and the device can be used no more by "
             "this process: REPRISE_CUDA_CHECKED=1 names the kernel (in steps without a graph)";
    default:
      return "";
  }
}

void expect_capability(std::string_view device, std::string_view card, int major, int minor) {
  // Others of 8.x run the same code, but have less shared memory than attention's backward wants.
  const bool runs = major == 8 ? minor == 0 || minor == 7 : major == 9 && minor == 0;
  if (!runs) {
    fail("cuda",
         "{} ({}) has compute capability {}.{}, this build has kernels for 8.0, 8.7 and 9.0{}",
         device, card, major, minor,
         major < 8    ? ": the card is too old"
         : major == 8 ? ": the card has too little shared memory"
                      : ": add it to CMAKE_CUDA_ARCHITECTURES");
  }
}

bool cuda_checked() {
  static const bool checked = [] {
    const char* const value = std::getenv("REPRISE_CUDA_CHECKED");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return checked && !capturing();  // a step that is being captured is not done, and not waited for
}

namespace {

// What cuda_check says. `own`: it is this one, not an earlier one, which checked mode would name.
std::string text_of(const char* operation, bool own, int status) {
  std::string text;
  try {
    cuda_check(operation, status);
  } catch (const Error& error) {
    text = error.what();
  }
  if (const std::string advice = cuda_advice(status); own && !advice.empty()) {
    if (const std::size_t at = text.find(": " + advice); at != std::string::npos) {
      text.resize(at);
    }
  }
  return text;
}

}  // namespace

void fail_launch(const char* kernel, const LaunchSizes& sizes, bool finished, int status) {
  throw Error(fmt::format(
      "{}, launched as [{}, {}, {}] blocks of [{}, {}, {}] threads with {} bytes of shared memory",
      text_of(kernel, finished, status), sizes.grid[0], sizes.grid[1], sizes.grid[2],
      sizes.block[0], sizes.block[1], sizes.block[2], sizes.shared_bytes));
}

void settle_call(const char* operation, void* stream, const std::function<std::string()>& sizes) {
  if (cuda_checked()) {
    if (const int status = cuda_wait(stream); status != 0) {
      throw Error(fmt::format("{}, asked for {}", text_of(operation, true, status), sizes()));
    }
  }
}

}  // namespace reprise

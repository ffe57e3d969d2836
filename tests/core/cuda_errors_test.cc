#include "core/cuda_errors.h"

#include <memory>
#include <string>

#include <gtest/gtest.h>

#include "core/allocator.h"
#include "core/cuda_device.h"
#include "core/error.h"
#include "core/out_of_memory.h"
#include "tests/error_of.h"

namespace reprise {
namespace {

using testing::error_of;

TEST(CudaErrors, AdviceForWhatAUserCanMend) {
  EXPECT_NE(cuda_advice(35).find("install NVIDIA's driver"), std::string::npos);
  EXPECT_NE(cuda_advice(100).find("CUDA_VISIBLE_DEVICES"), std::string::npos);
  EXPECT_NE(cuda_advice(209).find("compute capability 8.0, 8.7 and 9.0"), std::string::npos);
  EXPECT_NE(cuda_advice(700).find("REPRISE_CUDA_CHECKED=1 names the kernel"), std::string::npos);
  EXPECT_EQ(cuda_advice(0), "");
  EXPECT_EQ(cuda_advice(2), "");
}

TEST(CudaErrors, CardsOfThisBuild) {
  const auto says = [](int major, int minor) {
    return error_of([&] { expect_capability("cuda:0", "NVIDIA T4", major, minor); });
  };
  EXPECT_EQ(says(8, 0), "no error");
  EXPECT_EQ(says(8, 7), "no error");
  EXPECT_EQ(says(8, 9),
            "[cuda] cuda:0 (NVIDIA T4) has compute capability 8.9, this build has kernels for 8.0, "
            "8.7 and 9.0: the card has too little shared memory");
  EXPECT_EQ(says(9, 0), "no error");
  EXPECT_EQ(says(7, 5),
            "[cuda] cuda:0 (NVIDIA T4) has compute capability 7.5, this build has kernels for 8.0, "
            "8.7 and 9.0: the card is too old");
  EXPECT_EQ(
      says(12, 0),
      "[cuda] cuda:0 (NVIDIA T4) has compute capability 12.0, this build has kernels for 8.0, "
      "8.7 and 9.0: add it to CMAKE_CUDA_ARCHITECTURES");
}

TEST(CudaErrors, WithoutCudaWhatToInstall) {
  if (cuda_device_count() > 0) {
    GTEST_SKIP() << "there is a device";
  }
  const std::string text = error_of([] { cuda_allocator({DeviceKind::cuda, 0}); });
  EXPECT_TRUE(text.find("install the CUDA toolkit") != std::string::npos ||
              text.find("install NVIDIA's driver") != std::string::npos ||
              text.find("nvidia-smi -L") != std::string::npos)
      << text;
}

class Little final : public MemorySource {
 public:
  void* allocate(std::size_t bytes) override {
    if (bytes > 1000) {
      throw OutOfMemory(fmt::format("[cuda] no memory for {} bytes on cuda:0", bytes),
                        {DeviceKind::cuda, 0}, 100);
    }
    return block_;
  }
  void free(void*, std::size_t) noexcept override {}

 private:
  alignas(64) char block_[1000];
};

TEST(CudaErrors, OutOfMemorySaysWhoHoldsWhat) {
  Allocator allocator({DeviceKind::cuda, 0}, std::make_unique<Little>());
  std::uint32_t segment = 0, unnamed = 0;
  std::uint64_t first = 0, second = 0;
  void* const weights = allocator.allocate(700, MemoryKind::parameters, true, unnamed, first);
  allocator.set_segment("block.3");
  void* const values = allocator.allocate(200, MemoryKind::saved, true, segment, second);
  EXPECT_EQ(error_of([&] {
              std::uint32_t none = 0;
              std::uint64_t number = 0;
              allocator.allocate(5000, MemoryKind::activations, true, none, number);
            }),
            "[cuda] no memory for 5000 bytes on cuda:0; wanted as activations in block.3; held are "
            "900 bytes: parameters 700, saved 200; segments: block.3 200; policies that keep less "
            "share 200 of them, `reprise memory` says which one fits");
  EXPECT_EQ(allocator.report().live_bytes, 900);
  try {
    std::uint32_t none = 0;
    std::uint64_t number = 0;
    allocator.allocate(5000, MemoryKind::activations, true, none, number);
    FAIL() << "no error";
  } catch (const OutOfMemory& error) {
    EXPECT_EQ(error.device(), (Device{DeviceKind::cuda, 0}));
    EXPECT_EQ(error.available_bytes(), 1000);  // what was free, and what is held
  }
  allocator.free(values, 200, MemoryKind::saved, segment, second);
  allocator.free(weights, 700, MemoryKind::parameters, unnamed, first);
}

}  // namespace
}  // namespace reprise

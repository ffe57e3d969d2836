// Guard bytes can only be switched while nothing is allocated: before the first test.
#include <gtest/gtest.h>

#include "core/allocator.h"

namespace reprise::testing {
namespace {

class GuardedMemory final : public ::testing::Environment {
  void SetUp() override { allocator(cpu).set_guard(true); }
};

[[maybe_unused]] const ::testing::Environment* const kGuardedMemory =
    ::testing::AddGlobalTestEnvironment(new GuardedMemory);

}  // namespace
}  // namespace reprise::testing

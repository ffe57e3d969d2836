#include "core/philox.h"

#include <gtest/gtest.h>

namespace reprise {
namespace {

// The known answers that the authors publish with the paper (Random123, kat_vectors).
TEST(Philox, PublishedVectors) {
  EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}),
            (PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(
      philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
      (PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      (PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, SeedAndOffsetAreKeyAndCounter) {
  EXPECT_EQ(philox(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull),
            philox4x32_10({0x243f6a88, 0x85a308d3, 0, 0}, {0xa4093822, 0x299f31d0}));
  EXPECT_NE(philox(1, 0), philox(0, 1));
}

TEST(Philox, UniformIsBelowOne) {
  EXPECT_EQ(uniform(0), 0.0f);
  EXPECT_LT(uniform(0xffffffff), 1.0f);
}

TEST(Generator, ReservesWholeBlocks) {
  Generator generator{3, 10};
  EXPECT_EQ(generator.reserve(5), 10u);
  EXPECT_EQ(generator.reserve(4), 12u);
  EXPECT_EQ(generator.reserve(0), 13u);
  EXPECT_EQ(generator.next_offset, 13u);
}

}  // namespace
}  // namespace reprise

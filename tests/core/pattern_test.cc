#include "core/pattern.h"

#include <string>

#include <gtest/gtest.h>

namespace reprise {
namespace {

TEST(Pattern, AStarStandsForAnyRunOfCharacters) {
  EXPECT_TRUE(matches("*", ""));
  EXPECT_TRUE(matches("", ""));
  EXPECT_FALSE(matches("", "a"));
  EXPECT_TRUE(matches("a*b*c", "a1b2bc"));
  EXPECT_FALSE(matches("a*b*c", "a1b2b"));
  EXPECT_TRUE(matches("*.weight", "h.0.weight"));
  EXPECT_FALSE(matches("*.weight", "h.0.weights"));
  EXPECT_FALSE(matches("h.0", "h.01"));
  EXPECT_FALSE(matches("h?0", "h.0"));
  EXPECT_FALSE(matches(std::string(20, '*') + "b", std::string(2000, 'a')));
}

}  // namespace
}  // namespace reprise

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.h"
#include "distributed/buckets.h"
#include "distributed/disagreement.h"
#include "distributed/rank_tree.h"

namespace reprise::distributed {
namespace {

std::string describe(const std::vector<Bucket>& buckets) {
  std::string text;
  for (const Bucket& bucket : buckets) {
    text += std::string(name(bucket.dtype)) + "[" + std::to_string(bucket.numel) + "]:";
    for (const Bucket::Slot& slot : bucket.slots) {
      text += " " + std::to_string(slot.parameter) + "@" + std::to_string(slot.offset);
    }
    text += "; ";
  }
  return text;
}

TEST(Buckets, FirstIsSmallThenLargerInReadyOrder) {
  const std::vector<BucketEntry> entries{
      {7, 32, DType::f32}, {3, 32, DType::f32}, {0, 32, DType::f32}, {1, 100, DType::f32}};
  EXPECT_EQ(describe(lay_out(entries, {128, 4 * 64})),
            "f32[32]: 7@0; f32[64]: 3@0 0@32; f32[100]: 1@0; ");
}

TEST(Buckets, SlotsStartAt64Bytes) {
  const std::vector<BucketEntry> entries{
      {0, 1, DType::f32}, {1, 17, DType::f32}, {2, 0, DType::f32}, {3, 5, DType::f32}};
  EXPECT_EQ(describe(lay_out(entries, {})), "f32[53]: 0@0 1@16 2@48 3@48; ");
}

TEST(Buckets, OneDTypeEachOrderedByTheirLastEntry) {
  const std::vector<BucketEntry> entries{
      {0, 32, DType::f32}, {1, 32, DType::bf16}, {2, 32, DType::f32}, {3, 32, DType::bf16}};
  EXPECT_EQ(describe(lay_out(entries, {})), "f32[64]: 0@0 2@32; bf16[64]: 1@0 3@32; ");
  EXPECT_EQ(describe(lay_out(entries, {128, 256})),
            "f32[32]: 0@0; f32[32]: 2@0; bf16[64]: 1@0 3@32; ");
}

TEST(Buckets, AnEntryLargerThanTheLimitStandsAlone) {
  const std::vector<BucketEntry> entries{
      {0, 8, DType::f32}, {1, 1000, DType::f32}, {2, 8, DType::f32}};
  EXPECT_EQ(describe(lay_out(entries, {64, 64})), "f32[8]: 0@0; f32[1000]: 1@0; f32[8]: 2@0; ");
}

TEST(Buckets, NoEntriesNoBuckets) {
  EXPECT_TRUE(lay_out({}, {}).empty());
}

TEST(Buckets, LimitsMustBePositive) {
  try {
    lay_out({}, {0, 5});
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[buckets] limits must be positive, got 0 and 5 bytes");
  }
}

TEST(RankTree, SlicesCoverEverythingOnce) {
  for (std::int64_t count : {0, 1, 5, 1000, 1001}) {
    for (int size = 1; size <= 7; ++size) {
      std::int64_t at = 0;
      for (int r = 0; r < size; ++r) {
        const auto [begin, end] = slice_of(count, r, size);
        EXPECT_EQ(begin, at);
        at = end;
      }
      EXPECT_EQ(at, count);
    }
  }
}

// The order is part of the contract: these sums differ in every other order.
TEST(RankTree, AddsInTheFixedOrder) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> draw(-1e4f, 1e4f);
  std::vector<std::vector<float>> parts(6, std::vector<float>(3000));
  for (auto& part : parts) {
    for (float& x : part) {
      x = draw(random);
    }
  }
  std::vector<const void*> at;
  for (auto& part : parts) {
    at.push_back(part.data());
  }
  auto p = [&](std::size_t r, std::size_t i) { return parts[r][i]; };
  std::vector<float> sum(3000);
  int differ = 0;
  for (std::size_t n : {1u, 2u, 3u, 4u, 5u, 6u}) {
    reduce_tree(std::span(at).first(n), sum.data(), 3000, DType::f32, Reduce::sum);
    for (std::size_t i = 0; i < sum.size(); ++i) {
      float expected = p(0, i), serial = 0;
      switch (n) {
        case 2:
          expected = p(0, i) + p(1, i);
          break;
        case 3:
          expected = (p(0, i) + p(1, i)) + p(2, i);
          break;
        case 4:
          expected = (p(0, i) + p(1, i)) + (p(2, i) + p(3, i));
          break;
        case 5:
          expected = ((p(0, i) + p(1, i)) + (p(2, i) + p(3, i))) + p(4, i);
          break;
        case 6:
          expected = ((p(0, i) + p(1, i)) + (p(2, i) + p(3, i))) + (p(4, i) + p(5, i));
          break;
      }
      for (std::size_t r = 0; r < n; ++r) {
        serial += p(r, i);
      }
      differ += serial != expected;
      ASSERT_EQ(sum[i], expected) << n << " parts, element " << i;
    }
  }
  EXPECT_GT(differ, 100);
}

TEST(RankTree, RoundsBf16Once) {
  // 1 + 2^-8 is halfway between two bf16 values and would round down to 1 at each step.
  const std::vector<bfloat16> a{to_bfloat16(1.0f)}, b{to_bfloat16(0x1p-8f)},
      c{to_bfloat16(0x1p-8f)};
  const std::vector<const void*> parts{a.data(), b.data(), c.data()};
  bfloat16 sum;
  reduce_tree(parts, &sum, 1, DType::bf16, Reduce::sum);
  EXPECT_EQ(to_float(sum), 1.0f + 0x1p-7f);
}

TEST(RankTree, MaxAndMinShowNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> a{1, nan, 3}, b{2, 5, nan};
  const std::vector<const void*> parts{a.data(), b.data()};
  for (const Reduce reduce : {Reduce::max, Reduce::min}) {
    std::vector<float> out(3);
    reduce_tree(parts, out.data(), 3, DType::f32, reduce);
    EXPECT_EQ(out[0], reduce == Reduce::max ? 2 : 1);
    EXPECT_TRUE(std::isnan(out[1]));
    EXPECT_TRUE(std::isnan(out[2]));
  }
}

TEST(RankTree, IntegersWrapAround) {
  const std::vector<std::int64_t> a{std::numeric_limits<std::int64_t>::max()}, b{1};
  const std::vector<const void*> parts{a.data(), b.data()};
  std::int64_t out = 0;
  reduce_tree(parts, &out, 1, DType::i64, Reduce::sum);
  EXPECT_EQ(out, std::numeric_limits<std::int64_t>::min());
}

TEST(Disagreement, NamesTheMinorityOrAll) {
  auto text = [](std::vector<std::string> values) { return disagreement(values); };
  EXPECT_EQ(text({}), "");
  EXPECT_EQ(text({"a", "a"}), "");
  EXPECT_EQ(text({"a", "b"}), "rank 0 has a, rank 1 has b");
  EXPECT_EQ(text({"a", "b", "a"}), "rank 1 has b, the other 2 have a");
  EXPECT_EQ(text({"a", "b", "c", "a", "a"}), "rank 1 has b, rank 2 has c, the other 3 have a");
}

}  // namespace
}  // namespace reprise::distributed

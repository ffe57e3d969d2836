#include "distributed/header.h"

#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "distributed/disagreement.h"

namespace reprise::distributed {
namespace {

Collective sum_of(std::int64_t count, DType dtype = DType::f32) {
  return {Collective::Kind::all_reduce,  Reduce::sum, 0,
          Tensor::zeros({count}, dtype), {},          {"gradients", 3}};
}

// Three ranks, of which rank 1 has something else.
TEST(Header, EveryFieldIsCompared) {
  struct Case {
    std::function<void(Collective&)> change;
    std::string text;
  };
  const std::vector<Case> cases{
      {[](Collective& c) { c.tag.what = "loss"; },
       "purpose: rank 1 has \"loss\", the other 2 have \"gradients\""},
      {[](Collective& c) { c.kind = Collective::Kind::broadcast; },
       "operation: rank 1 has broadcast, the other 2 have all_reduce"},
      {[](Collective& c) { c.tag.bucket = 4; }, "bucket: rank 1 has 4, the other 2 have 3"},
      {[](Collective& c) { c.in = Tensor::zeros({8}, DType::bf16); },
       "dtype: rank 1 has bf16, the other 2 have f32"},
      {[](Collective& c) { c.in = Tensor::zeros({9}, DType::f32); },
       "count: rank 1 has 9, the other 2 have 8"},
      {[](Collective& c) { c.reduce = Reduce::min; },
       "reduction: rank 1 has min, the other 2 have sum"},
      {[](Collective& c) { c.root = 2; }, "root: rank 1 has 2, the other 2 have 0"}};
  const std::uint64_t hash = hash_of(header_of(sum_of(8), 5, 0));
  EXPECT_EQ(hash_of(header_of(sum_of(8), 5, 2)), hash);
  for (const Case& c : cases) {
    Collective other = sum_of(8);
    c.change(other);
    const std::vector<Header> headers{header_of(sum_of(8), 5, 0), header_of(other, 5, 1),
                                      header_of(sum_of(8), 5, 2)};
    EXPECT_EQ(explain(headers), c.text);
    EXPECT_NE(hash_of(headers[1]), hash) << c.text;
  }
  const std::vector<Header> late{header_of(sum_of(8), 5, 0), header_of(sum_of(8), 4, 1)};
  EXPECT_EQ(explain(late), "sequence: rank 0 has 5, rank 1 has 4");
  EXPECT_NE(hash_of(late[1]), hash);
}

TEST(Header, EqualOnesNeedNoWords) {
  const std::vector<Header> headers{header_of(sum_of(8), 5, 0), header_of(sum_of(8), 5, 1)};
  EXPECT_EQ(explain(headers), "");
}

TEST(RequireSame, OneRankAgreesWithItself) {
  const auto world = world_of_one();
  const Setting settings[] = {{"seed", "1"}, {"data", std::string(1000, 'x')}};
  require_same(*world, settings, "the start");
  require_same(*world, {}, "the start");
}

}  // namespace
}  // namespace reprise::distributed

// Collectives against plain loops over what every rank is known to hold.
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/philox.h"
#include "distributed/comm_nccl.h"
#include "distributed/rank_tree.h"
#include "tests/distributed/mpi/world.h"

namespace reprise::distributed {
namespace {

using testing::world;

const std::vector<DType> kDTypes{DType::f32, DType::bf16, DType::f64, DType::i32, DType::i64};
const std::vector<std::int64_t> kSizes{0, 1, 2, 3, 7, 64, 1001, 40'009};

// What rank r holds at element i: any rank can compute it.
Tensor values(int r, std::int64_t count, DType dtype) {
  const Tensor x = Tensor::empty({count}, dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t word =
        philox(static_cast<std::uint64_t>(r) + 1, static_cast<std::uint64_t>(i))[0];
    const float real = (uniform(word) - 0.5f) * static_cast<float>(1 << (word % 20));
    switch (dtype) {
      case DType::f32:
        x.data<float>()[i] = real;
        break;
      case DType::bf16:
        x.data<bfloat16>()[i] = to_bfloat16(real);
        break;
      case DType::f64:
        x.data<double>()[i] = static_cast<double>(real) * 1.1;
        break;
      case DType::i32:
        x.data<std::int32_t>()[i] = static_cast<std::int32_t>(word) / 8;
        break;
      case DType::i64:
        x.data<std::int64_t>()[i] = static_cast<std::int64_t>(word) << 20;
        break;
    }
  }
  return x;
}

Tensor expected_reduction(std::int64_t count, DType dtype, Reduce reduce) {
  std::vector<Tensor> parts;
  std::vector<const void*> at;
  for (int r = 0; r < world().size(); ++r) {
    parts.push_back(values(r, count, dtype));
    at.push_back(count == 0 ? nullptr : parts.back().raw());
  }
  const Tensor out = Tensor::empty({count}, dtype);
  if (count > 0) {
    reduce_tree(at, out.raw(), count, dtype, reduce);
  }
  return out;
}

void expect_same(const Tensor& a, const Tensor& b, const char* what) {
  ASSERT_EQ(a.bytes(), b.bytes());
  EXPECT_TRUE(a.numel() == 0 ||
              std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())) == 0)
      << what << " of " << a.numel() << " " << name(a.dtype());
}

TEST(Collectives, AllReduce) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t count : kSizes) {
      for (const Reduce reduce : {Reduce::sum, Reduce::max, Reduce::min}) {
        const Tensor x = values(world().rank(), count, dtype);
        world().all_reduce(x, reduce, {"test"}).wait();
        expect_same(x, expected_reduction(count, dtype, reduce), "all_reduce");
      }
    }
  }
}

// The tree itself is checked in layout_test.cc; here, that a sum over ranks is a sum at all.
TEST(Collectives, SumsAgainstPlainSums) {
  const std::int64_t count = 1001;
  const Tensor x = values(world().rank(), count, DType::f32);
  const Tensor n = values(world().rank(), count, DType::i64);
  world().all_reduce(x, Reduce::sum, {"test"}).wait();
  world().all_reduce(n, Reduce::sum, {"test"}).wait();
  for (std::int64_t i = 0; i < count; ++i) {
    double sum = 0, magnitude = 0;
    std::int64_t whole = 0;
    for (int r = 0; r < world().size(); ++r) {
      const double term = values(r, count, DType::f32).data<float>()[i];
      sum += term;
      magnitude += std::abs(term);
      whole += values(r, count, DType::i64).data<std::int64_t>()[i];
    }
    ASSERT_NEAR(x.data<float>()[i], sum, 1e-6 * magnitude);
    ASSERT_EQ(n.data<std::int64_t>()[i], whole);
  }
}

// More than one piece of the engine's buffers.
TEST(Collectives, LargeAllReduce) {
  const std::int64_t count = (std::int64_t{9} << 20) + 3;
  const Tensor x = Tensor::empty({count}, DType::f32);
  float* at = x.data<float>();
  const int r = world().rank(), n = world().size();
  for (std::int64_t i = 0; i < count; ++i) {
    at[i] = static_cast<float>((i % 1000) + r);
  }
  world().all_reduce(x, Reduce::sum, {"large"}).wait();
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    wrong += at[i] != static_cast<float>((i % 1000) * n + n * (n - 1) / 2);
  }
  EXPECT_EQ(wrong, 0);
}

TEST(Collectives, ReduceScatterGivesThePartsOfAllReduce) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t part : kSizes) {
      const std::int64_t count = part * world().size();
      const Tensor in = values(world().rank(), count, dtype);
      const Tensor out = Tensor::zeros({part}, dtype);
      world().reduce_scatter(in, out, Reduce::sum, {"test"}).wait();
      const Tensor all = expected_reduction(count, dtype, Reduce::sum);
      expect_same(out, all.slice(0, part * world().rank(), part * (world().rank() + 1)).clone(),
                  "reduce_scatter");
      expect_same(in, values(world().rank(), count, dtype), "input of reduce_scatter");
    }
  }
}

TEST(Collectives, AllGather) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t part : kSizes) {
      const Tensor out = Tensor::zeros({part * world().size()}, dtype);
      world().all_gather(values(world().rank(), part, dtype), out, {"test"}).wait();
      for (int r = 0; r < world().size(); ++r) {
        expect_same(out.slice(0, part * r, part * (r + 1)).clone(), values(r, part, dtype),
                    "all_gather");
      }
    }
  }
}

TEST(Collectives, BroadcastFromEveryRank) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t count : kSizes) {
      for (int root = 0; root < world().size(); ++root) {
        const Tensor x = values(world().rank(), count, dtype);
        world().broadcast(x, root, {"test"}).wait();
        expect_same(x, values(root, count, dtype), "broadcast");
      }
    }
  }
}

TEST(Collectives, AgreeIsTheOrOfAllRanks) {
  for (const std::int64_t count : {0, 1, 157}) {
    const Tensor words = Tensor::zeros({count}, DType::i64);
    for (std::int64_t i = 0; i < count; ++i) {
      words.data<std::int64_t>()[i] = std::int64_t{1} << ((world().rank() + i) % 63);
    }
    world().agree(words, {"test"}).wait();
    for (std::int64_t i = 0; i < count; ++i) {
      std::int64_t expected = 0;
      for (int r = 0; r < world().size(); ++r) {
        expected |= std::int64_t{1} << ((r + i) % 63);
      }
      ASSERT_EQ(words.data<std::int64_t>()[i], expected);
    }
  }
}

TEST(Collectives, BarrierWaitsForTheLast) {
  const auto begin = Clock::now();
  if (world().rank() == world().size() - 1) {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  world().barrier({"test"}).wait();
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(150));
}

// Several under way, waited for out of order; each with its own times.
TEST(Collectives, RunInOrderWhileTheCallerGoesOn) {
  std::vector<Tensor> data;
  std::vector<Pending> pending;
  for (int k = 0; k < 10; ++k) {
    data.push_back(values(world().rank(), 10'000 + k, DType::f32));
    pending.push_back(world().all_reduce(data.back(), Reduce::sum, {"test", k}));
  }
  for (int k = 9; k >= 0; --k) {
    pending[static_cast<std::size_t>(k)].wait();
    expect_same(data[static_cast<std::size_t>(k)],
                expected_reduction(10'000 + k, DType::f32, Reduce::sum), "queued");
  }
  for (std::size_t k = 1; k < 10; ++k) {
    EXPECT_LE(pending[k - 1].finished_at(), pending[k].started_at());
  }
}

TEST(Collectives, CuttingIntoBucketsDoesNotChangeABit) {
  const std::int64_t count = 100'003;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor whole = values(world().rank(), count, dtype);
    world().all_reduce(whole, Reduce::sum, {"whole"}).wait();
    for (const std::int64_t bucket : {257, 4096, 65'536}) {
      const Tensor x = values(world().rank(), count, dtype);
      for (std::int64_t at = 0; at < count; at += bucket) {
        world()
            .all_reduce(x.slice(0, at, std::min(count, at + bucket)), Reduce::sum, {"bucket"})
            .wait();
      }
      expect_same(x, whole, "all_reduce in buckets");
    }
  }
}

TEST(Collectives, OneNumber) {
  const int n = world().size();
  EXPECT_EQ(all_reduce_value(world(), world().rank() + 0.5, Reduce::sum, "loss"),
            n * (n - 1) / 2 + 0.5 * n);
  EXPECT_EQ(all_reduce_value(world(), world().rank(), Reduce::max, "loss"), n - 1);
}

TEST(Collectives, SecondConnectionIsRefused) {
  const auto second = connect_mpi({});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
}

// What ranks on devices need of MPI before they have NCCL.
TEST(MpiCarrier, HandsEverybodysBytesToEverybody) {
  const auto bytes_of = [](int rank) { return std::string(24, static_cast<char>('a' + rank)); };
  std::string expected;
  for (int r = 0; r < world().size(); ++r) {
    expected += bytes_of(r);
  }
  EXPECT_EQ(distributed::gather_over(world())(bytes_of(world().rank())), expected);
  distributed::NcclId id;
  id.fill(static_cast<char>('A' + world().rank()));
  EXPECT_TRUE(distributed::share_over(world())(id).ok());
  EXPECT_EQ(id[127], 'A');
}

}  // namespace
}  // namespace reprise::distributed

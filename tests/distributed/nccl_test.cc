// The NCCL communicator over a stand-in of NCCL and CUDA; over the library where there is a device.
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include <gtest/gtest.h>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/tape.h"
#include "core/cuda_device.h"
#include "core/philox.h"
#include "distributed/comm_nccl.h"
#include "distributed/rank_tree.h"
#include "distributed/reducer.h"
#include "tests/distributed/nccl_stand_in.h"

namespace reprise::testing {
namespace {

using namespace distributed;
using Options = NcclStandIn::Options;

constexpr auto kLimit = std::chrono::milliseconds(400);

// Rank 0's identifier for ranks that are threads.
class SharedId {
 public:
  NcclShare of(int rank) {
    return [this, rank](NcclId& id) {
      std::unique_lock lock(mutex_);
      if (rank == 0) {
        id_ = id;
        there_ = true;
        changed_.notify_all();
      }
      changed_.wait(lock, [this] { return there_; });
      id = id_;
      return absl::OkStatus();
    };
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool there_ = false;
  NcclId id_{};
};

struct Job {
  int ranks = 2;
  std::function<Options(int rank)> options = [](int) { return Options{}; };
  bool checked = true;
  std::chrono::milliseconds limit = std::chrono::seconds(30);
  std::shared_ptr<NcclFabric> fabric = std::make_shared<NcclFabric>();

  absl::StatusOr<std::unique_ptr<Communicator>> connect(int rank, SharedId& shared) const {
    NcclOptions nccl{.rank = rank, .size = ranks};
    nccl.limit = nccl.start_limit = limit;
    nccl.checked = checked;
    return connect_nccl(nccl, shared.of(rank),
                        std::make_unique<NcclStandIn>(fabric, options(rank)));
  }

  // `body` on a thread for each rank; what each threw.
  std::vector<std::string> run(const std::function<void(Communicator&)>& body) const {
    SharedId shared;
    std::vector<std::string> errors(static_cast<std::size_t>(ranks));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank) {
      threads.emplace_back([&, rank] {
        std::string& error = errors[static_cast<std::size_t>(rank)];
        auto communicator = connect(rank, shared);
        if (!communicator.ok()) {
          error = std::string(communicator.status().message());
          return;
        }
        try {
          body(**communicator);
          (*communicator)->close();
        } catch (const std::exception& e) {
          error = e.what();
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    return errors;
  }

  void expect_clean(const std::vector<std::string>& errors) const {
    for (const std::string& error : errors) {
      EXPECT_EQ(error, "");
    }
    EXPECT_TRUE(fabric->violations().empty()) << fabric->violations()[0];
  }
};

// What a rank holds at an element.
Tensor values(int rank, std::int64_t count, DType dtype) {
  const Tensor x = Tensor::empty({count}, dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t word =
        philox(static_cast<std::uint64_t>(rank) + 1, static_cast<std::uint64_t>(i))[0];
    if (dtype == DType::f32) {
      x.data<float>()[i] = uniform(word) - 0.5f;
    } else if (dtype == DType::bf16) {
      x.data<bfloat16>()[i] = to_bfloat16(uniform(word) - 0.5f);
    } else if (dtype == DType::i32) {
      x.data<std::int32_t>()[i] = static_cast<std::int32_t>(word) / 8;
    } else {
      x.data<std::int64_t>()[i] = static_cast<std::int64_t>(word) << 20;
    }
  }
  return x;
}

Tensor reduced(int ranks, std::int64_t count, DType dtype, Reduce reduce) {
  std::vector<Tensor> parts;
  std::vector<const void*> at;
  for (int r = 0; r < ranks; ++r) {
    parts.push_back(values(r, count, dtype));
    at.push_back(parts.back().raw());
  }
  const Tensor out = Tensor::empty({count}, dtype);
  reduce_tree(at, out.raw(), count, dtype, reduce);
  return out;
}

void expect_same(const Tensor& a, const Tensor& b, const char* what) {
  ASSERT_EQ(a.bytes(), b.bytes());
  EXPECT_EQ(std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())), 0) << what;
}

void every_collective(Communicator& world) {
  const int n = world.size(), rank = world.rank();
  for (const DType dtype : {DType::f32, DType::bf16, DType::i32, DType::i64}) {
    const std::int64_t part = 37, count = part * n;
    for (const Reduce reduce : {Reduce::sum, Reduce::max, Reduce::min}) {
      const Tensor x = values(rank, count, dtype), out = Tensor::zeros({part}, dtype);
      world.reduce_scatter(x, out, reduce, {"scatter"}).wait();
      world.all_reduce(x, reduce, {"sum", 3}).wait();
      expect_same(x, reduced(n, count, dtype, reduce), "all_reduce");
      expect_same(out, x.slice(0, part * rank, part * (rank + 1)).clone(), "reduce_scatter");
    }
    const Tensor all = Tensor::zeros({count}, dtype);
    world.all_gather(values(rank, part, dtype), all, {"gather"}).wait();
    for (int r = 0; r < n; ++r) {
      expect_same(all.slice(0, part * r, part * (r + 1)).clone(), values(r, part, dtype), "gather");
      const Tensor x = values(rank, part, dtype);
      world.broadcast(x, r, {"broadcast"}).wait();
      expect_same(x, values(r, part, dtype), "broadcast");
    }
    world.all_reduce(Tensor::zeros({0}, dtype), Reduce::sum, {"nothing"}).wait();
  }
  const Tensor words = Tensor::zeros({3}, DType::i64);
  for (int i = 0; i < 3; ++i) {
    words.data<std::int64_t>()[i] = std::int64_t{1} << (rank + 8 * i);
  }
  world.agree(words, {"bits"}).wait();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(words.data<std::int64_t>()[i], ((std::int64_t{1} << n) - 1) << 8 * i);
  }
  world.barrier({"barrier"}).wait();
}

TEST(Nccl, EveryCollectiveOnTheDeviceAndFromHostMemory) {
  for (const bool on_device : {true, false}) {
    for (const int busy : {0, 3}) {
      for (const int ranks : {1, 2, 3}) {
        Job job;
        job.ranks = ranks;
        job.options = [&](int rank) {
          return Options{.busy_polls = busy + (busy > 0 ? rank : 0), .on_device = on_device};
        };
        job.expect_clean(job.run(every_collective));
        const std::vector<std::string> calls = job.fabric->calls_of(ranks - 1);
        EXPECT_EQ(calls.front(), "ncclCommInitRankConfig");
        EXPECT_EQ(calls[calls.size() - 2], "ncclCommFinalize");
        EXPECT_EQ(calls.back(), "ncclCommDestroy");
      }
    }
  }
}

// Rank r's kernels write their data when its compute stream comes to it, after the call.
TEST(Nccl, WaitsForWhatTheComputeStreamHasYetToDo) {
  std::vector<Tensor> data;
  for (int r = 0; r < 2; ++r) {
    data.push_back(Tensor::zeros({64}, DType::f32));
  }
  for (const bool checked : {true, false}) {
    Job job;
    job.checked = checked;
    job.options = [&](int rank) {
      const Tensor mine = data[static_cast<std::size_t>(rank)];
      mine.zero();
      return Options{.compute = [=] { mine.copy_from(values(rank, 64, DType::f32)); },
                     .compute_polls = 10 + 30 * rank};
    };
    job.expect_clean(job.run([&](Communicator& world) {
      const Tensor& mine = data[static_cast<std::size_t>(world.rank())];
      world.all_reduce(mine, Reduce::sum, {"gradients", 0}).wait();
      expect_same(mine, reduced(2, 64, DType::f32, Reduce::sum), "sum");
    }));
  }
}

TEST(Nccl, ManyUnderWayAreDoneInOrder) {
  Job job;
  job.options = [](int) { return Options{.busy_polls = 1}; };
  job.expect_clean(job.run([](Communicator& world) {
    std::vector<Tensor> data;
    std::vector<Pending> pending;
    for (int k = 0; k < 20; ++k) {
      data.push_back(Tensor::full({5 + k}, DType::f32, k + world.rank()));
      pending.push_back(world.all_reduce(data.back(), Reduce::sum, {"queued", k}));
    }
    for (int k = 19; k >= 0; --k) {
      pending[static_cast<std::size_t>(k)].wait();
      EXPECT_EQ(data[static_cast<std::size_t>(k)].data<float>()[0], static_cast<float>(2 * k + 1));
    }
  }));
}

std::vector<std::string> disagreeing(Job& job, int kind) {
  return job.run([&](Communicator& world) {
    const bool odd = world.rank() == 1;
    const Tensor f = Tensor::zeros({kind == 0 && odd ? 5 : 4}, DType::f32);
    const Tensor i = Tensor::zeros({4}, DType::i32);
    world
        .all_reduce(kind == 1 && odd ? i : f, kind == 2 && odd ? Reduce::max : Reduce::sum,
                    {kind == 3 && odd ? "something else" : "gradients", 2})
        .wait();
  });
}

TEST(Nccl, RanksThatDifferAreToldBeforeTheirDataIsTouched) {
  const std::vector<std::string> expected{
      "count: rank 1 has 5, the other 2 have 4", "dtype: rank 1 has i32, the other 2 have f32",
      "reduction: rank 1 has max, the other 2 have sum",
      "purpose: rank 1 has \"something else\", the other 2 have \"gradients\""};
  for (int kind = 0; kind < 4; ++kind) {
    Job job;
    job.ranks = 3;
    for (const std::string& error : disagreeing(job, kind)) {
      EXPECT_NE(error.find("ranks disagree at collective 1"), std::string::npos) << error;
      EXPECT_NE(error.find(expected[static_cast<std::size_t>(kind)]), std::string::npos) << error;
    }
    EXPECT_TRUE(job.fabric->violations().empty()) << job.fabric->violations()[0];
    EXPECT_EQ(job.fabric->calls_of(2),
              (std::vector<std::string>{"ncclCommInitRankConfig", "all_gather", "ncclCommAbort"}));
  }
}

TEST(Nccl, WithoutChecksADifferenceEndsAtTheLimit) {
  Job job;
  job.checked = false;
  job.limit = kLimit;
  for (const std::string& error : disagreeing(job, 0)) {
    EXPECT_NE(error.find("did not finish within 0.4 s of rank"), std::string::npos) << error;
    EXPECT_NE(error.find("gradients, bucket 2"), std::string::npos) << error;
  }
  EXPECT_EQ(job.fabric->calls_of(0).back(), "ncclCommAbort");
}

TEST(Nccl, ARankThatDoesNotComeEndsAtTheLimit) {
  Job job;
  job.limit = kLimit;
  const std::vector<std::string> errors = job.run([](Communicator& world) {
    if (world.rank() == 0) {
      world.barrier({"alone"}).wait();
    } else {
      std::this_thread::sleep_for(2 * kLimit);
      world.abort("the test is over");
    }
  });
  EXPECT_EQ(errors[0],
            "[communicator] collective 1 (barrier (alone)) did not join within 0.4 s of rank 0; "
            "NCCL does not say which of the 2 ranks it waits for");
  EXPECT_EQ(errors[1], "[communicator] rank 1 failed: the test is over");
  EXPECT_TRUE(job.fabric->violations().empty()) << job.fabric->violations()[0];
}

TEST(Nccl, AnErrorOfNcclAbortsOnceAndFailsAllThatFollows) {
  Job job;
  job.limit = kLimit;
  job.options = [](int rank) { return Options{.fail_state_at = rank == 0 ? 3 : -1}; };
  std::string again;
  const std::vector<std::string> errors = job.run([&](Communicator& world) {
    const Tensor x = Tensor::zeros({4}, DType::f32);
    world.all_reduce(x, Reduce::sum, {"first"}).wait();  // a header and a sum
    try {
      world.all_reduce(x, Reduce::sum, {"second"}).wait();
    } catch (const CommunicatorError&) {
      if (world.rank() == 0) {
        try {
          world.barrier({"third"}).wait();
        } catch (const CommunicatorError& e) {
          again = e.what();
        }
      }
      throw;
    }
  });
  EXPECT_NE(errors[0].find("in collective 2 (all_reduce of 4 f32 (second)): remote process exited "
                           "(another rank ended or cannot be reached)"),
            std::string::npos)
      << errors[0];
  EXPECT_EQ(again, errors[0]);
  const std::vector<std::string> calls = job.fabric->calls_of(0);
  EXPECT_EQ(std::ranges::count(calls, "ncclCommAbort"), 1);
  EXPECT_EQ(calls.back(), "ncclCommAbort");
  EXPECT_TRUE(job.fabric->violations().empty()) << job.fabric->violations()[0];
}

TEST(Nccl, AbortEndsWhatWaits) {
  Job job;
  job.limit = std::chrono::seconds(20);
  const auto begin = Clock::now();
  std::string first;
  const std::vector<std::string> errors = job.run([&](Communicator& world) {
    if (world.rank() == 1) {
      world.abort("the disk is full");
      return;
    }
    const Pending waiting = world.barrier({"never"});
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    EXPECT_FALSE(waiting.done());
    world.abort("told by the watchdog");
    waiting.wait();
  });
  EXPECT_EQ(errors[0], "[communicator] rank 0 failed: told by the watchdog");
  EXPECT_EQ(errors[1], "[communicator] rank 1 failed: the disk is full");
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(10));
  EXPECT_TRUE(job.fabric->violations().empty()) << job.fabric->violations()[0];
}

TEST(Nccl, FailuresAtTheStartAndTheEnd) {
  for (const std::string call :
       {"ncclGetUniqueId", "ncclCommInitRankConfig", "ncclCommFinalize", "ncclCommDestroy"}) {
    Job job;
    job.ranks = 1;
    job.options = [&](int) { return Options{.busy_polls = 1, .fail_call = call}; };
    const std::vector<std::string> errors = job.run(every_collective);
    EXPECT_NE(errors[0].find(call), std::string::npos) << errors[0];
    EXPECT_NE(errors[0].find("unhandled cuda error"), std::string::npos) << errors[0];
    EXPECT_TRUE(job.fabric->violations().empty()) << job.fabric->violations()[0];
  }
  Job job;
  job.limit = kLimit;
  SharedId shared;
  const auto lonely = job.connect(0, shared);  // rank 1 never comes
  EXPECT_EQ(lonely.status().code(), absl::StatusCode::kInternal);
  EXPECT_NE(lonely.status().message().find("start did not begin within 0.4 s"), std::string::npos)
      << lonely.status();
  EXPECT_EQ(job.fabric->calls_of(0).back(), "ncclCommAbort");
}

TEST(Nccl, MistakesOfTheCaller) {
  const auto calls = [] {
    return std::make_unique<NcclStandIn>(std::make_shared<NcclFabric>(), Options{});
  };
  SharedId shared;
  const auto none = connect_nccl({.rank = 2, .size = 2}, shared.of(0), calls());
  EXPECT_EQ(none.status().message(), "rank must be one of 2, got 2");
  const auto world = *connect_nccl({.rank = 0, .size = 1}, shared.of(0), calls());
  EXPECT_THROW(world->all_reduce({}, Reduce::sum, {}), Error);
  EXPECT_THROW(world->agree(Tensor::zeros({2}, DType::i32), {}), Error);
  world->close();
  EXPECT_THROW(world->barrier({}).wait(), CommunicatorError);
}

TEST(Nccl, WhoCarriesTheIdentifier) {
  ASSERT_EQ(std::getenv("REPRISE_RENDEZVOUS"), nullptr);
  const NcclOptions two{.rank = 1, .size = 2}, one;
  const auto none = nccl_share(two, nullptr);
  EXPECT_EQ(none.status().message(),
            "2 ranks need MPI, or a folder that all of them see in REPRISE_RENDEZVOUS, to share "
            "NCCL's identifier");
  EXPECT_TRUE(nccl_share(one, nullptr).ok());
  const auto world = world_of_one();
  NcclId id{};
  id[3] = 7;
  ASSERT_TRUE((*nccl_share(two, world.get()))(id).ok());
  EXPECT_EQ(id[3], 7);
  world->abort("gone");
  EXPECT_EQ((*nccl_share(two, world.get()))(id).message(), "[communicator] rank 0 failed: gone");
}

// Gradients of two ranks with different data, through the reducer as it is.
TEST(Nccl, CarriesTheReducer) {
  constexpr std::int64_t kWidth = 24;
  Job job;
  job.options = [](int rank) { return Options{.busy_polls = 1 + rank}; };
  std::vector<std::vector<float>> first(2), second(2);
  job.expect_clean(job.run([&](Communicator& world) {
    const auto rank = static_cast<std::size_t>(world.rank());
    Parameter a("a", Tensor::full({kWidth}, DType::f32, 2)),
        b("b", Tensor::full({kWidth}, DType::f32, 3));
    Reducer reducer(world, {&a, &b}, {{64, 64}});
    Tape tape;
    for (int step = 0; step < 2; ++step) {
      a.zero_gradient();
      b.zero_gradient();
      const Tape::Scope scope(tape);
      const Variable x = values(world.rank(), kWidth, DType::f32);
      reducer.backward(sum(mul(mul(x, a), b)));
    }
    first[rank] = a.gradient().to_vector<float>();
    second[rank] = b.gradient().to_vector<float>();
  }));
  const Tensor total = reduced(2, kWidth, DType::f32, Reduce::sum);
  for (std::size_t i = 0; i < kWidth; ++i) {
    const float mean = total.data<float>()[i] / 2;
    EXPECT_NEAR(first[0][i], 3 * mean, 1e-6);
    EXPECT_NEAR(second[0][i], 2 * mean, 1e-6);
  }
  EXPECT_EQ(first[0], first[1]);
  EXPECT_EQ(second[0], second[1]);
}

TEST(NcclLibrary, WorldOfOneOnADevice) {
  const Device device{DeviceKind::cuda, 0};
  const auto calls = nccl_library(device);
  if (cuda_device_count() == 0 || nccl_version().empty()) {
    EXPECT_EQ(calls.status().code(), absl::StatusCode::kFailedPrecondition);
    GTEST_SKIP() << "no device, or no NCCL in this build: " << calls.status().message();
  }
  NcclOptions options{.device = device};
  auto world = connect_nccl(options, *nccl_share(options, nullptr));
  ASSERT_TRUE(world.ok()) << world.status();
  every_collective(**world);  // host memory
  const std::vector<float> numbers{1, 2, 3};
  const Tensor x = Tensor::from(numbers, {3}, device), y = Tensor::zeros({3}, DType::f32, device);
  (*world)->all_reduce(x, Reduce::sum, {"x"}).wait();
  (*world)->all_gather(x, y, {"x"}).wait();
  EXPECT_EQ(x.to_vector<float>(), numbers);
  EXPECT_EQ(y.to_vector<float>(), numbers);
  (*world)->close();
}

}  // namespace
}  // namespace reprise::testing

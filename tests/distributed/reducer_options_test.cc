// The reducer on ranks in threads: what its options and its errors promise. That its results are
// right whatever is combined is the random runs' part (random_ranks_test.cc).
#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/linear_cross_entropy.h"
#include "core/allocator.h"
#include "distributed/local_world.h"
#include "distributed/reducer.h"
#include "nn/optimizer/adamw.h"
#include "nn/optimizer/clip.h"
#include "tests/distributed/mpi/toy_model.h"

namespace reprise::distributed {
namespace {

using testing::toy_data;
using testing::ToyModel;
using Kind = ReducerEvent::Kind;

constexpr std::int64_t kBytes = ToyModel::kWidth * 4;  // of one parameter
const BucketOptions kSmall{kBytes, 3 * kBytes};

std::vector<std::vector<float>> gradients_of(const ToyModel& model) {
  std::vector<std::vector<float>> result;
  for (const Parameter* p : model.parameters) {
    result.push_back(p->has_gradient() ? p->gradient().to_vector<float>() : std::vector<float>());
  }
  return result;
}

Policies dropping() {
  Policies policies;
  policies.set("*", keep_inputs());
  return policies;
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

struct Job {  // one rank's
  ToyModel model;
  Tape tape;
  Variable loss(int rank, int step, bool branch = false) {
    const auto seed = static_cast<std::uint64_t>(1 + rank + 10 * step);
    return model.loss(toy_data(seed), seed, branch);
  }
};

TEST(ReducerOrder, IsRenewedWhenAPlanComesBackAndKeptByPlan) {
  run_ranks(3, [](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters, {kSmall});
    // The branch is the last op: its parameter is ready first, or else unreached.
    const std::vector<bool> branch{true,  true,  false, true, false, false,
                                   false, false, true,  true, true,  false};
    std::vector<std::int64_t> reorders;
    for (std::size_t step = 0; step < branch.size(); ++step) {
      job.model.zero();
      const Tape::Scope scope(job.tape);
      reducer.backward(job.loss(ranks.rank(), static_cast<int>(step), branch[step]));
      reorders.push_back(reducer.reorders());
      EXPECT_FALSE(reducer.plans_differed());
    }
    // Alternating plans move nothing; the second of two equal ones does, once.
    EXPECT_EQ(reorders, (std::vector<std::int64_t>{0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2}));
    // Ranks that differ: the lowest one's order holds, and nobody minds.
    job.model.zero();
    {
      const Tape::Scope scope(job.tape);
      reducer.backward(job.loss(ranks.rank(), 20, ranks.rank() == 1));
    }
    EXPECT_TRUE(reducer.plans_differed());
  });
}

// Parameters in a row, then the other way round: with the first order every bucket waits for the
// last parameter, with the renewed one each goes as its parameter is ready.
TEST(ReducerOrder, ARenewedOrderLaunchesAsEarlyAsAFirstOne) {
  run_ranks(2, [](Communicator& ranks) {
    Parameter a("a", toy_data(1)), b("b", toy_data(2)), c("c", toy_data(3));
    std::vector<Parameter*> row{&a, &b, &c};
    Reducer reducer(ranks, row, {{1, 1}});
    Tape tape;
    std::vector<std::vector<int>> ready_at_launch;
    for (int step = 0; step < 4; ++step) {
      const Tape::Scope scope(tape);
      Variable x = toy_data(7);
      for (Parameter* p : row) {
        p->zero_gradient();
        x = testing::toy_mul(x, *p);
      }
      reducer.backward(testing::toy_sum(x));
      std::vector<int>& at = ready_at_launch.emplace_back();
      int ready = 0;
      for (const ReducerEvent& e : reducer.events()) {
        ready += e.kind == Kind::ready;
        if (e.kind == Kind::launch) {
          at.push_back(ready);
        }
      }
      if (step == 0) {
        std::ranges::reverse(row);
      }
    }
    EXPECT_EQ(ready_at_launch,
              (std::vector<std::vector<int>>{{1, 2, 3}, {3, 3, 3}, {3, 3, 3}, {1, 2, 3}}));
  });
}

TEST(ReducerMemory, GradientsLiveInTheBucketsAndNothingIsCopied) {
  Job job;
  const auto one = world_of_one();
  Reducer reducer(*one, job.model.parameters, {kSmall});
  for (int step = 0; step < 3; ++step) {
    job.model.zero();
    {
      const Tape::Scope scope(job.tape, dropping());
      reducer.backward(job.loss(0, step, true));
    }
    std::int64_t bytes = 0;
    for (const Bucket& bucket : reducer.buckets()) {
      bytes += 4 * bucket.numel;
    }
    const MemoryReport report = allocator(cpu).report();
    const auto gradients = static_cast<std::size_t>(MemoryKind::gradients);
    EXPECT_EQ(report.live[gradients], bytes);
    if (step == 1) {
      allocator(cpu).reset_peak();
    } else if (step == 2) {
      // A parameter used in several places has its sum in the bucket all the time.
      EXPECT_EQ(report.peak[gradients], bytes);
    }
    for (const Bucket& bucket : reducer.buckets()) {
      const Parameter* first = job.model.parameters[bucket.slots[0].parameter];
      for (const Bucket::Slot& slot : bucket.slots) {
        const Parameter* p = job.model.parameters[slot.parameter];
        if (p->has_gradient() && first->has_gradient()) {
          EXPECT_TRUE(p->gradient().shares_storage(first->gradient()));
        }
      }
    }
  }
}

TEST(ReducerMemory, ANewOrderDoesNotHoldEmptyGradientsTwice) {
  Job job;
  const auto one = world_of_one();
  Reducer reducer(*one, job.model.parameters, {kSmall});
  const auto gradients = static_cast<std::size_t>(MemoryKind::gradients);
  std::int64_t before = 0;
  for (int step = 0; step < 6; ++step) {
    job.model.zero();
    const Tape::Scope scope(job.tape);
    reducer.backward(job.loss(0, step, step > 0));
    before = step == 0 ? allocator(cpu).report().live[gradients] : before;
    if (step == 1) {
      allocator(cpu).reset_peak();
    }
  }
  EXPECT_EQ(reducer.reorders(), 1);
  EXPECT_LE(allocator(cpu).report().peak[gradients], before + 64 * 32);
}

// models.md's rule: what counts is labels that are not ignored, over all micro-batches of all
// ranks.
TEST(ReducerMean, OverTokensIsTheMeanOverAllLabels) {
  const std::int64_t width = 5, classes = 7;
  std::vector<float> initial;
  for (std::int64_t i = 0; i < width * classes; ++i) {
    initial.push_back(uniform(philox(3, static_cast<std::uint64_t>(i))[0]) - 0.5f);
  }
  // Label counts differ by rank and micro-batch; one micro-batch has none.
  const std::vector<std::vector<std::int64_t>> labels{
      {0, 3, -100, 6}, {-100, -100, -100, -100}, {1, -100, -100, -100}, {2, 2, 5, 4}};
  auto rows = [&](std::size_t micro) {
    std::vector<float> x;
    for (std::int64_t i = 0; i < 4 * width; ++i) {
      x.push_back(uniform(philox(50 + micro, static_cast<std::uint64_t>(i))[0]));
    }
    return x;
  };
  std::vector<float> all_rows;
  std::vector<std::int64_t> all_labels;
  for (std::size_t micro = 0; micro < 4; ++micro) {
    std::ranges::copy(rows(micro), std::back_inserter(all_rows));
    std::ranges::copy(labels[micro], std::back_inserter(all_labels));
  }
  Parameter full("w", Tensor::from(initial, {classes, width}));
  {
    Tape tape;
    const Tape::Scope scope(tape);
    backward(linear_cross_entropy(Tensor::from(all_rows, {16, width}), full,
                                  Tensor::from(all_labels, {16})));
  }
  const std::vector<float> expected = full.gradient().to_vector<float>();
  run_ranks(2, [&](Communicator& ranks) {
    Parameter w("w", Tensor::from(initial, {classes, width}));
    Reducer reducer(ranks, {&w}, {.mean = Mean::tokens});
    Tape tape;
    EXPECT_THROW(  // nobody counted
        {
          const Tape::Scope scope(tape);
          BackwardOptions options;
          reducer.attach(options);
          const Variable loss = linear_cross_entropy(Tensor::from(rows(0), {4, width}), w,
                                                     Tensor::from(labels[0], {4}));
          backward(loss, options);
        },
        Error);
    w.zero_gradient();
    for (std::size_t m = 0; m < 2; ++m) {
      const std::size_t micro = 2 * static_cast<std::size_t>(ranks.rank()) + m;
      const auto count = std::ranges::count_if(labels[micro], [](auto l) { return l >= 0; });
      reducer.add_tokens(count);
      const Tape::Scope scope(tape);
      const Variable loss = linear_cross_entropy(Tensor::from(rows(micro), {4, width}), w,
                                                 Tensor::from(labels[micro], {4}), /*items=*/1);
      m == 0 ? reducer.accumulate(loss) : reducer.backward(loss);
    }
    EXPECT_EQ(reducer.tokens(), 8);
    const std::vector<float> got = w.gradient().to_vector<float>();
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_NEAR(got[i], expected[i], 5e-5 + 1.3e-6 * std::abs(expected[i]));
    }
  });
}

TEST(ReducerMean, WithoutAnyTokenGradientsAreZero) {
  run_ranks(2, [](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters, {.mean = Mean::tokens});
    reducer.add_tokens(0);
    const Tape::Scope scope(job.tape);
    BackwardOptions options;
    options.scale = {0};  // what a loss over no label gives
    reducer.backward(job.loss(ranks.rank(), 0), options);
    EXPECT_EQ(reducer.tokens(), 0);
    EXPECT_EQ(job.model.parameters[0]->gradient().to_vector<float>(),
              std::vector<float>(ToyModel::kWidth));
    EXPECT_THROW(reducer.add_tokens(-1), Error);
  });
}

TEST(ReducerCompression, RoundsEachRanksGradientAndTheSumOnce) {
  std::vector<std::vector<std::vector<float>>> local(3);
  run_ranks(3, [&](Communicator& ranks) {
    Job job;
    const Tape::Scope scope(job.tape);
    backward(job.loss(ranks.rank(), 0));
    local[static_cast<std::size_t>(ranks.rank())] = gradients_of(job.model);
  });
  run_ranks(3, [&](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters, {.buckets = kSmall, .compress = true});
    {
      const Tape::Scope scope(job.tape);
      reducer.backward(job.loss(ranks.rank(), 0));
    }
    const auto got = gradients_of(job.model);
    int inexact = 0;
    for (std::size_t p = 0; p < got.size(); ++p) {
      for (std::size_t i = 0; i < got[p].size(); ++i) {
        auto term = [&](std::size_t r) { return to_float(to_bfloat16(local[r][p][i])); };
        EXPECT_EQ(got[p][i], to_float(to_bfloat16((term(0) + term(1)) + term(2))) / 3);
        inexact += got[p][i] != ((local[0][p][i] + local[1][p][i]) + local[2][p][i]) / 3;
      }
    }
    EXPECT_GT(inexact, 100);
  });
}

TEST(ReducerClip, TheNormIsThatOfTheMeanAndTheSameOnEveryRank) {
  std::mutex mutex;
  std::vector<double> norms;
  run_ranks(3, [&](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters, {kSmall});
    const Tape::Scope scope(job.tape);
    reducer.backward(job.loss(ranks.rank(), 0, ranks.rank() == 1));
    double squares = 0;
    for (const auto& gradient : gradients_of(job.model)) {
      for (const float x : gradient) {
        squares += static_cast<double>(x) * x;
      }
    }
    const double norm = nn::clip_global_norm(reducer.parameters(), 0.01);
    EXPECT_NEAR(norm, std::sqrt(squares), 1e-7 * norm);
    EXPECT_NEAR(nn::global_norm(reducer.parameters()), 0.01, 1e-6);
    const std::lock_guard lock(mutex);
    norms.push_back(norm);
  });
  EXPECT_EQ(norms, std::vector<double>(3, norms[0]));
}

struct Trained {
  std::vector<std::vector<float>> values;
  int updates_before_swept = 0;
};

Trained train(Communicator& ranks, bool early) {
  Job job;
  Reducer reducer(ranks, job.model.parameters, {kSmall});
  nn::AdamW optimizer(job.model.parameters, {.weight_decay = 0.1});
  if (early) {
    reducer.update_early([&](std::span<Parameter* const> p) { optimizer.step_some(p, 0.01); });
  }
  Trained result;
  for (int step = 0; step < 4; ++step) {
    optimizer.zero_gradients();
    const Tape::Scope scope(job.tape, dropping());
    reducer.backward(job.loss(ranks.rank(), step, ranks.rank() == 1));
    if (!early) {
      optimizer.step(0.01);
    }
    bool swept = false;
    for (const ReducerEvent& e : reducer.events()) {
      swept = swept || e.kind == Kind::swept;
      result.updates_before_swept += e.kind == Kind::update && !swept;
    }
  }
  for (const Parameter* p : job.model.parameters) {
    result.values.push_back(p->value().to_vector<float>());
  }
  return result;
}

TEST(ReducerUpdate, AsBucketsArriveGivesTheBitsOfThePlainOrder) {
  for (const int size : {1, 2, 3}) {
    run_ranks(size, [](Communicator& ranks) {
      const Trained plain = train(ranks, false), early = train(ranks, true);
      EXPECT_EQ(early.values, plain.values);
      EXPECT_EQ(plain.updates_before_swept, 0);
    });
  }
  // There buckets are complete at once.
  EXPECT_GT(train(*world_of_one(), true).updates_before_swept, 4);
}

// `w` is ready with the loss; the first segment, which is replayed last, still reads it.
TEST(ReducerUpdate, WaitsForTheLastReadThatAReplayMayMake) {
  auto sweep = [](bool early, std::vector<float>& gradient, std::vector<std::string>* order) {
    Parameter w("w", Tensor::full({4}, DType::f32, 0.5)),
        v("v", Tensor::full({4}, DType::f32, 0.25));
    const auto one = world_of_one();
    Reducer reducer(*one, {&w, &v}, {{1, 1}});
    if (early) {
      reducer.update_early([&](std::span<Parameter* const> parameters) {
        for (Parameter* p : parameters) {
          order->push_back("update " + p->name());
          p->write().data<float>()[0] += 100;
        }
      });
    }
    Tape tape;
    const Tape::Scope scope(tape, dropping());
    Variable x = Tensor::full({4}, DType::f32, 2);
    x = checkpoint("first", [&] {
      // No gradient goes this way, but a replay reads w.
      const Variable scaled = no_grad([&] { return testing::toy_mul(x, w); });
      return testing::toy_square(testing::toy_mul(testing::toy_tanh(scaled), v));
    });
    const Variable loss = testing::toy_sum(testing::toy_mul(x, w));
    BackwardOptions options;
    options.on_ready = [&](Parameter& p) {
      if (order != nullptr) {
        order->push_back("ready " + p.name());
      }
    };
    reducer.backward(loss, options);
    gradient = v.gradient().to_vector<float>();
  };
  std::vector<float> plain, early;
  std::vector<std::string> order;
  sweep(false, plain, nullptr);
  sweep(true, early, &order);
  EXPECT_EQ(plain, early);
  EXPECT_EQ(order, (std::vector<std::string>{"ready w", "ready v", "update w", "update v"}));
}

TEST(ReducerUpdate, ATapeThatIsKeptIsRefused) {
  Job job;
  const auto one = world_of_one();
  Reducer reducer(*one, job.model.parameters);
  reducer.update_early([](std::span<Parameter* const>) {});
  BackwardOptions options;
  options.keep = true;
  EXPECT_EQ(error_of([&] { reducer.attach(options); }),
            "[reducer] a tape that is kept reads values that an early update would change");
}

TEST(ReducerUneven, RanksThatRanOutTakePartUntilAllAreDone) {
  for (const bool by_live : {true, false}) {
    run_ranks(3, [&](Communicator& ranks) {
      Job job;
      Reducer reducer(ranks, job.model.parameters, {.divide_by_live = by_live});
      const int steps = 1 + ranks.rank();  // rank 0 has one step of data, rank 2 three
      std::vector<int> live;
      for (int step = 0;; ++step) {
        job.model.zero();
        if (step < steps) {
          const Tape::Scope scope(job.tape);
          reducer.backward(job.loss(ranks.rank(), step));
        } else if (!reducer.join()) {
          break;
        }
        live.push_back(reducer.live());
        if (step == 2) {  // rank 2's alone
          Job alone;
          const Tape::Scope scope(alone.tape);
          backward(alone.loss(2, 2));
          const auto expected = alone.model.parameters[0]->gradient().to_vector<float>();
          const auto got = job.model.parameters[0]->gradient().to_vector<float>();
          for (std::size_t i = 0; i < got.size(); ++i) {
            EXPECT_EQ(got[i], by_live ? expected[i] : expected[i] / 3);
          }
        }
      }
      EXPECT_EQ(live, (std::vector<int>{3, 2, 1}));
      EXPECT_FALSE(reducer.join());  // again, for who asks again
    });
  }
}

TEST(ReducerUneven, ARankWithoutAnyDataAndWorldsWithoutAny) {
  run_ranks(2, [](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters);
    if (ranks.rank() == 0) {
      EXPECT_TRUE(reducer.join());  // it learns the layout from rank 1
    } else {
      const Tape::Scope scope(job.tape);
      reducer.backward(job.loss(1, 0));
    }
    EXPECT_TRUE(job.model.parameters[0]->has_gradient());
    EXPECT_FALSE(reducer.join());
  });
  run_ranks(2, [](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters);
    EXPECT_FALSE(reducer.join());
  });
}

TEST(ReducerUneven, MicroBatchesOfAnUnfinishedStepStillCount) {
  run_ranks(2, [](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters);
    {
      const Tape::Scope scope(job.tape);
      reducer.accumulate(job.loss(ranks.rank(), 0));
    }
    EXPECT_TRUE(reducer.join());
    EXPECT_EQ(reducer.live(), 2);
    EXPECT_FALSE(reducer.join());
  });
}

TEST(ReducerShards, MemoryIsALogarithmOfSetsAndIsTold) {
  for (const int shards : {1, 2, 4, 8, 16}) {
    Job job;
    const auto one = world_of_one();
    Reducer reducer(*one, job.model.parameters, {.buckets = kSmall, .shards = shards});
    for (int step = 0; step < 2; ++step) {
      job.model.zero();
      for (int s = 0; s < shards; ++s) {
        const Tape::Scope scope(job.tape);
        s + 1 < shards ? reducer.accumulate(job.loss(s, step))
                       : reducer.backward(job.loss(s, step));
      }
    }
    std::int64_t set = 0;
    for (const Bucket& bucket : reducer.buckets()) {
      set += 4 * bucket.numel;
    }
    EXPECT_EQ(reducer.shard_bytes(), set * static_cast<int>(std::log2(shards))) << shards;
    EXPECT_EQ(allocator(cpu).report().live[static_cast<std::size_t>(MemoryKind::gradients)],
              set + reducer.shard_bytes());
  }
}

TEST(ReducerShards, MistakesOfTheCaller) {
  const auto one = world_of_one();
  Job job;
  Reducer reducer(*one, job.model.parameters, {.shards = 2});
  auto run = [&](bool last) {
    return error_of([&] {
      const Tape::Scope scope(job.tape);
      BackwardOptions options;
      last ? reducer.attach(options) : reducer.attach_accumulation(options);
      backward(job.loss(0, 0), options);
      last ? reducer.finish() : reducer.finish_accumulation();
    });
  };
  EXPECT_EQ(run(true),
            "[reducer] a rank has 2 of 2 shards: accumulate() for all but the last, backward() for "
            "that; this is backward() for shard 1");
  EXPECT_EQ(run(false), "no error");
  EXPECT_EQ(run(false),
            "[reducer] a rank has 2 of 2 shards: accumulate() for all but the last, backward() for "
            "that; this is accumulate() for shard 2");
  EXPECT_EQ(run(true), "no error");
  EXPECT_EQ(run(false),
            "[reducer] with shards gradients must be zeroed before a step: tied has one");
  EXPECT_EQ(error_of([&] { reducer.join(); }),
            "[reducer] with shards every rank has data in every step");
  EXPECT_EQ(error_of([] {
              run_ranks(2, [](Communicator& ranks) {
                Job mine;
                Reducer(ranks, mine.model.parameters, {.shards = 3});
              });
            }),
            "[reducer] shards must be a multiple of the 2 ranks, got 3");
  EXPECT_EQ(error_of([&] { Reducer(*one, job.model.parameters, {.compress = true, .shards = 2}); }),
            "[reducer] with shards gradients cannot be compressed: bits would depend on the ranks");
}

TEST(ReducerInvariants, AParameterThatIsReadyTwiceIsNamedWithItsContributions) {
  Job job;
  const auto one = world_of_one();
  Reducer reducer(*one, job.model.parameters, {kSmall});
  const Tape::Scope scope(job.tape, dropping());
  const Variable loss = job.loss(0, 0);
  BackwardOptions options;
  reducer.attach(options);
  options.on_ready = [ready = options.on_ready](Parameter& p) {
    ready(p);
    if (p.name() == "tied") {
      ready(p);  // what a hook that fires per segment would do
    }
  };
  const std::string error = error_of([&] { backward(loss, options); });
  EXPECT_TRUE(error.starts_with("reducer: in step 0 parameter tied (bucket ")) << error;
  EXPECT_NE(
      error.find("expected to be ready once, seen 2 times; 6 contributions: toy_mul (record "),
      std::string::npos)
      << error;
  EXPECT_NE(error.find("segment block/inner)"), std::string::npos) << error;
}

TEST(ReducerInvariants, AParameterThatNeverBecomesReadyIsNamed) {
  Job job;
  const auto one = world_of_one();
  Reducer reducer(*one, job.model.parameters, {kSmall});
  const Tape::Scope scope(job.tape);
  const Variable loss = job.loss(0, 0);
  BackwardOptions options;
  reducer.attach(options);
  options.on_ready = [ready = options.on_ready](Parameter& p) {
    if (p.name() != "block.2.bias") {
      ready(p);
    }
  };
  backward(loss, options);
  const std::string error = error_of([&] { reducer.finish(); });
  EXPECT_TRUE(
      error.starts_with("reducer: 14 of 15 parameters became ready in step 0; parameter "
                        "block.2.bias (bucket "))
      << error;
  EXPECT_NE(error.find("expected to be ready once, seen 0 times; 1 contribution: toy_mul_add "
                       "(record "),
            std::string::npos)
      << error;
}

TEST(ReducerInvariants, AGradientThatCannotBeAddedToIsNamed) {
  run_ranks(2, [](Communicator& ranks) {
    Job job;
    Reducer reducer(ranks, job.model.parameters, {.mean = Mean::tokens});
    auto step = [&] {
      reducer.add_tokens(3);
      const Tape::Scope scope(job.tape);
      BackwardOptions options;
      reducer.attach(options);
      const Variable loss = job.loss(ranks.rank(), 0);
      backward(loss, options);
      reducer.finish();
    };
    step();
    EXPECT_NE(error_of(step).find("of an earlier reduction was not zeroed: it can be added to only "
                                  "where sums over 2 ranks are divided by 2, not by 6"),
              std::string::npos);
  });
}

}  // namespace
}  // namespace reprise::distributed

#include "distributed/reducer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include <gtest/gtest.h>

#include "tests/distributed/mpi/toy_model.h"
#include "tests/distributed/mpi/world.h"

namespace reprise::distributed {
namespace {

using testing::toy_data;
using testing::ToyModel;
using testing::world;
using Kind = ReducerEvent::Kind;
using Gradients = std::map<std::string, std::vector<float>>;

Gradients gradients_of(const ToyModel& model) {
  Gradients result;
  for (const Parameter* p : model.parameters) {
    if (p->has_gradient()) {
      result[p->name()] = p->gradient().to_vector<float>();
    }
  }
  return result;
}

bool same_bits(const Gradients& a, const Gradients& b) {
  return std::ranges::equal(a, b, [](const auto& x, const auto& y) {
    return x.first == y.first && x.second.size() == y.second.size() &&
           std::memcmp(x.second.data(), y.second.data(), x.second.size() * sizeof(float)) == 0;
  });
}

std::uint64_t data_seed(int rank, int step, int micro = 0) {
  return static_cast<std::uint64_t>(1 + rank + 10 * step + 1000 * micro);
}

const BucketOptions kSmall{ToyModel::kWidth * 4, 3 * ToyModel::kWidth * 4};

// Gradients of `steps` steps; the branch is taken by odd ranks only.
std::vector<Gradients> train(const Policies& policies, BucketOptions buckets, int steps,
                             int micro_batches = 1) {
  ToyModel model;
  Reducer reducer(world(), model.parameters, {buckets});
  Tape tape;
  std::vector<Gradients> result;
  for (int step = 0; step < steps; ++step) {
    model.zero();
    for (int micro = 0; micro < micro_batches; ++micro) {
      const Tape::Scope scope(tape, policies);
      const std::uint64_t seed = data_seed(world().rank(), step, micro);
      const Variable loss = model.loss(toy_data(seed), seed, world().rank() % 2 == 1);
      if (micro + 1 < micro_batches) {
        reducer.accumulate(loss);
      } else {
        reducer.backward(loss);
      }
    }
    result.push_back(gradients_of(model));
    for (Parameter* p : model.parameters) {  // gradients now change the next step's
      if (p->has_gradient()) {
        float* value = p->write().data<float>();
        for (std::int64_t i = 0; i < p->value().numel(); ++i) {
          value[i] -= 1e-3f * p->gradient().data<float>()[i];
        }
      }
    }
  }
  return result;
}

// The same step in one process: sweeps over every rank's data, added by the tree.
Gradients by_hand(int micro_batches) {
  std::vector<Gradients> ranks;
  for (int r = 0; r < world().size(); ++r) {
    ToyModel model;
    Tape tape;
    for (int micro = 0; micro < micro_batches; ++micro) {
      const Tape::Scope scope(tape);
      const std::uint64_t seed = data_seed(r, 0, micro);
      backward(model.loss(toy_data(seed), seed, r % 2 == 1));
    }
    ranks.push_back(gradients_of(model));
  }
  Gradients result;
  for (const auto& [name, gradient] : ranks[1]) {  // rank 1 takes the branch
    std::vector<std::vector<float>> terms;
    for (const Gradients& rank : ranks) {
      const auto it = rank.find(name);
      terms.push_back(it == rank.end() ? std::vector<float>(gradient.size()) : it->second);
    }
    while (terms.size() > 1) {
      std::vector<std::vector<float>> next;
      for (std::size_t i = 0; i < terms.size(); i += 2) {
        next.push_back(terms[i]);
        for (std::size_t k = 0; i + 1 < terms.size() && k < gradient.size(); ++k) {
          next.back()[k] += terms[i + 1][k];
        }
      }
      terms = std::move(next);
    }
    for (float& x : terms[0]) {
      x /= static_cast<float>(world().size());
    }
    result[name] = terms[0];
  }
  return result;
}

TEST(Reducer, IsTheMeanOverRanksBitwise) {
  EXPECT_TRUE(same_bits(train({}, kSmall, 1)[0], by_hand(1)));
  EXPECT_TRUE(same_bits(train({}, kSmall, 1, 3)[0], by_hand(3)));
}

TEST(Reducer, SegmentsDoNotChangeABit) {
  Policies keep, drop;
  keep.set("*", keep_all());
  drop.set("*", keep_inputs());
  const std::vector<Gradients> with = train(drop, kSmall, 3), without = train(keep, kSmall, 3);
  for (std::size_t step = 0; step < 3; ++step) {
    EXPECT_TRUE(same_bits(with[step], without[step])) << "step " << step;
  }
  EXPECT_FALSE(same_bits(with[0], with[1]));
}

TEST(Reducer, BucketSizesDoNotChangeABit) {
  const std::vector<Gradients> one = train({}, {1 << 20, 1 << 20}, 2);
  for (const BucketOptions buckets : {BucketOptions{1, 1}, kSmall, BucketOptions{1000, 5000}}) {
    const std::vector<Gradients> many = train({}, buckets, 2);
    EXPECT_TRUE(same_bits(one[0], many[0]) && same_bits(one[1], many[1]));
  }
}

TEST(Reducer, EveryRankHasTheSame) {
  const Gradients mine = train({}, kSmall, 1)[0];
  for (const auto& [name, gradient] : mine) {
    const Tensor root = Tensor::from(gradient, {static_cast<std::int64_t>(gradient.size())});
    world().broadcast(root, 0, {"compare"}).wait();
    EXPECT_EQ(root.to_vector<float>(), gradient) << name;
  }
}

TEST(Reducer, UnusedStaysAbsentAndUsedSomewhereIsThereEverywhere) {
  const Gradients gradients = train({}, kSmall, 1)[0];
  EXPECT_FALSE(gradients.contains("unused"));
  EXPECT_TRUE(gradients.contains("branch"));
  EXPECT_TRUE(gradients.contains("tied"));
}

// Not zeroed, and used by nobody in the second step: it keeps the first step's gradient.
TEST(Reducer, AGradientThatNobodyUsedIsLeftAlone) {
  ToyModel model;
  Reducer reducer(world(), model.parameters, {kSmall});
  Tape tape;
  std::vector<float> before;
  for (const bool branch : {true, false}) {
    const Tape::Scope scope(tape);
    const std::uint64_t seed = data_seed(world().rank(), 0);
    reducer.backward(model.loss(toy_data(seed), seed, branch));
    const std::vector<float> now = model.parameters[1]->gradient().to_vector<float>();
    if (!branch) {
      EXPECT_EQ(now, before);
    }
    before = now;
  }
}

TEST(Reducer, EventsOfTheFirstStep) {
  ToyModel model;
  Reducer reducer(world(), model.parameters, {kSmall});
  Policies drop;
  drop.set("*", keep_inputs());
  Tape tape;
  for (int step = 0; step < 3; ++step) {
    model.zero();
    const Tape::Scope scope(tape, drop);
    const std::uint64_t seed = data_seed(world().rank(), step);
    reducer.backward(model.loss(toy_data(seed), seed, world().rank() == 0));
    ASSERT_GT(reducer.buckets().size(), 3u);
    std::vector<int> ready(model.parameters.size()), launched(reducer.buckets().size()),
        complete(reducer.buckets().size());
    std::int64_t swept = -1, first_launch = -1, last_ready = -1;
    std::size_t next_launch = 0;
    const auto& events = reducer.events();
    for (std::size_t i = 0; i < events.size(); ++i) {
      const ReducerEvent& e = events[i];
      ASSERT_EQ(e.sequence, static_cast<std::int64_t>(i));
      ASSERT_TRUE(i == 0 || events[i - 1].time <= e.time);
      switch (e.kind) {
        case Kind::plan:
          EXPECT_EQ(i, 0u);
          break;
        case Kind::ready:
          ++ready[e.index];
          last_ready = e.sequence;
          break;
        case Kind::launch:
          EXPECT_EQ(e.index, next_launch++);
          ++launched[e.index];
          first_launch = first_launch < 0 ? e.sequence : first_launch;
          for (const Bucket::Slot& slot : reducer.buckets()[e.index].slots) {
            EXPECT_EQ(ready[slot.parameter], 1);
          }
          break;
        case Kind::complete:
          EXPECT_EQ(launched[e.index], 1);
          ++complete[e.index];
          break;
        case Kind::update:
          ADD_FAILURE() << "nobody asked for updates";
          break;
        case Kind::swept:
          swept = e.sequence;
          break;
      }
    }
    EXPECT_TRUE(std::ranges::all_of(ready, [](int n) { return n == 1; })) << "step " << step;
    EXPECT_TRUE(std::ranges::all_of(launched, [](int n) { return n == 1; }));
    EXPECT_TRUE(std::ranges::all_of(complete, [](int n) { return n == 1; }));
    EXPECT_LT(first_launch, last_ready) << "step " << step;  // while backward still runs
    EXPECT_LT(last_ready, swept);
  }
  EXPECT_EQ(reducer.steps(), 3);
}

TEST(Reducer, AChangeOfWhatIsTrainableMakesNewBuckets) {
  ToyModel model;
  Reducer reducer(world(), model.parameters, {kSmall});
  Tape tape;
  for (int step = 0; step < 4; ++step) {
    model.zero();
    model.parameters[3]->set_trainable(step % 2 == 0);
    const Tape::Scope scope(tape);
    const std::uint64_t seed = data_seed(world().rank(), step);
    reducer.backward(model.loss(toy_data(seed), seed, true));
    EXPECT_EQ(model.parameters[3]->has_gradient(), step % 2 == 0);
    std::size_t slots = 0;
    for (const Bucket& bucket : reducer.buckets()) {
      slots += bucket.slots.size();
    }
    EXPECT_EQ(slots, model.parameters.size() - static_cast<std::size_t>(step % 2));
  }
}

TEST(Reducer, InPartsWithTheCallersCallbacks) {
  ToyModel model;
  Reducer reducer(world(), model.parameters, {kSmall});
  Tape tape;
  const Tape::Scope scope(tape);
  const std::uint64_t seed = data_seed(world().rank(), 0);
  const Variable loss = model.loss(toy_data(seed), seed, world().rank() % 2 == 1);
  int plans = 0;
  std::size_t ready = 0;
  BackwardOptions options;
  options.on_plan = [&](const Plan&) { ++plans; };
  options.on_ready = [&](Parameter&) { ++ready; };
  EXPECT_THROW(reducer.finish(), Error);
  reducer.attach(options);
  backward(loss, options);
  reducer.finish();
  EXPECT_EQ(plans, 1);
  EXPECT_EQ(ready, model.parameters.size());
  EXPECT_TRUE(same_bits(gradients_of(model), by_hand(1)));
}

TEST(Reducer, MistakesOfTheCaller) {
  ToyModel model;
  EXPECT_THROW(Reducer(world(), {model.parameters[0], model.parameters[0]}), Error);
}

}  // namespace
}  // namespace reprise::distributed

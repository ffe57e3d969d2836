// Rows of docs/conformance.md: segments under data parallelism. Where the peer needs a flag, or
// raises, there is one mode here.
#include <gtest/gtest.h>

#include "tests/distributed/conformance/net.h"

namespace reprise::testing {
namespace {

TEST(SegmentsOnRanks, Once) {
  expect_conformance([](Net& net, Variable x, int) {
    return net.segment(Net::block, net.l2, Net::block(net.l1, std::move(x)));
  });
}

TEST(SegmentsOnRanks, UnusedParameters) {  // l3 is used by nobody and stays without a gradient
  expect_conformance([](Net& net, Variable x, int) {
    x = net.segment(Net::block, net.l2, Net::block(net.l1, std::move(x)));
    (void)net.segment(Net::block, net.l3, x);  // an output that no loss reads
    return x;
  });
}

TEST(SegmentsOnRanks, SameLayerTwice) {
  expect_conformance([](Net& net, Variable x, int) {
    x = net.segment(Net::block, net.l1, std::move(x));
    return net.segment(Net::block, net.l2, net.segment(Net::block, net.l2, std::move(x)));
  });
}

// Nothing is learned in a first step: it is as the others, and so it may change later.
TEST(SegmentsOnRanks, SameLayerTwiceThenOnce) {
  expect_conformance([](Net& net, Variable x, int iteration) {
    x = net.segment(Net::block, net.l2, std::move(x));
    return iteration % 2 == 0 ? net.segment(Net::block, net.l2, std::move(x)) : x;
  });
}

TEST(SegmentsOnRanks, DynamicModule) {
  expect_conformance([](Net& net, Variable x, int iteration) {
    return net.segment(Net::block, iteration % 2 == 0 ? net.l1 : net.l2, std::move(x));
  });
}

Variable tied(Net& net, Variable x, bool first) {
  const Parameter& bias = first ? net.l1.bias : net.l2.bias;
  return net.segment(
      [&](Variable y) { return silu(add_bias(linear(std::move(y), net.l1.weight), bias)); },
      std::move(x));
}

TEST(SegmentsOnRanks, DynamicWeightSharing) {
  expect_conformance([](Net& net, Variable x, int iteration) {
    return tied(net, std::move(x), iteration % 2 == 0);
  });
}

TEST(SegmentsOnRanks, WeightSharingAroundTheWholeModel) {
  expect_conformance([](Net& net, Variable x, int) {
    return net.segment([&](Variable y) { return tied(net, tied(net, std::move(y), true), false); },
                       std::move(x));
  });
}

TEST(SegmentsOnRanks, TwiceWithWeightSharing) {
  expect_conformance([](Net& net, Variable x, int) {
    for (int i = 0; i < 4; ++i) {
      x = tied(net, std::move(x), i % 2 == 0);
    }
    return x;
  });
}

TEST(SegmentsOnRanks, NestedSegments) {
  expect_conformance([](Net& net, Variable x, int) {
    return net.segment(
        [&](Variable y) {
          y = net.segment(Net::block, net.l1, std::move(y));
          return net.segment(
              [&](Variable z) { return net.segment(Net::block, net.l1, std::move(z)); },
              net.segment(Net::block, net.l2, std::move(y)));
        },
        std::move(x));
  });
}

TEST(SegmentsOnRanks, MicroBatchesInsideOfAccumulation) {
  expect_conformance(
      [](Net& net, Variable x, int) {
        x = net.segment(Net::block, net.l1, std::move(x));
        return net.segment(Net::block, net.l2, net.segment(Net::block, net.l2, std::move(x)));
      },
      {.micro_batches = 3});
}

// Both halves of the rows in one step, one sweep: the model is called twice before backward.
TEST(SegmentsOnRanks, MicroBatchesOutsideOfAccumulation) {
  expect_conformance([](Net& net, Variable x, int) {
    Variable halves[] = {slice(x, 0, 0, 3), slice(x, 0, 3, 6)};
    for (Variable& half : halves) {
      half = net.segment(Net::block, net.l2, net.segment(Net::block, net.l1, contiguous(half)));
    }
    return concat({halves[0], halves[1]}, 0);
  });
}

TEST(SegmentsOnRanks, BranchesByRank) {
  expect_conformance([](Net& net, Variable x, int iteration) {
    x = net.segment(Net::block, net.l1, std::move(x));
    return net.segment(Net::block, (net.rank + iteration) % 2 == 0 ? net.l2 : net.l3, std::move(x));
  });
}

// A hook on a weight that is used inside and outside of a segment fires once.
TEST(SegmentsOnRanks, AParameterUsedInsideAndOutsideIsReadyOnce) {
  on_ranks([](distributed::Communicator& ranks) {
    Net net;
    distributed::Reducer reducer(ranks, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("inputs-only"));
    Variable x = net.segment(Net::block, net.l1, rows_of(ranks.rank(), 0));
    const Variable loss = mean_square(linear(x, net.l1.weight));
    int ready = 0;
    BackwardOptions options;
    options.on_ready = [&](Parameter& p) { ready += &p == &net.l1.weight; };
    reducer.backward(loss, options);
    EXPECT_EQ(ready, 1);
  });
}

// The norm that the peer's pipeline tests compare with a constant: here with one process.
TEST(SegmentsOnRanks, NormsOfGradients) {
  on_ranks([](distributed::Communicator& ranks) {
    const Forward forward = [](Net& net, Variable x, int) {
      return net.segment(Net::block, net.l2, net.segment(Net::block, net.l1, std::move(x)));
    };
    auto norm = [](const Values& gradients) {
      double sum = 0;
      for (const auto& gradient : gradients) {
        for (const float g : gradient) {
          sum += static_cast<double>(g) * g;
        }
      }
      return std::sqrt(sum);
    };
    const auto got = train(ranks, forward, true, {}, {});
    const auto alone = train_alone(ranks.size(), forward);
    for (std::size_t s = 0; s < got.size(); ++s) {
      EXPECT_NEAR(norm(got[s]), norm(alone[s]), 1e-5 * norm(alone[s]));
    }
  });
}

// Half precision: bf16 weights and gradients.
TEST(SegmentsOnRanks, HalfPrecision) {
  on_ranks([](distributed::Communicator& ranks) {
    std::vector<std::vector<bfloat16>> first;
    for (const bool segments : {false, true}) {
      Net net(DType::bf16);
      net.segments = segments;
      distributed::Reducer reducer(ranks, net.parameters);
      Tape tape;
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      Variable x = cast(Variable(rows_of(ranks.rank(), 0)), DType::bf16);
      x = net.segment(Net::block, net.l1, std::move(x));
      x = net.segment(Net::block, net.l1, std::move(x));
      reducer.backward(mean_square(cast(std::move(x), DType::f32)));
      for (std::size_t p = 0; p < 2; ++p) {
        const auto gradient = net.parameters[p]->gradient().to_vector<bfloat16>();
        if (!segments) {
          first.push_back(gradient);
        } else {
          EXPECT_EQ(std::memcmp(first[p].data(), gradient.data(), 2 * gradient.size()), 0);
        }
      }
    }
  });
}

}  // namespace
}  // namespace reprise::testing

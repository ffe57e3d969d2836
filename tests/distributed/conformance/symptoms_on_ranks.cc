// What users of the peer trip over under data parallelism (docs/conformance.md, the last table): a
// test for each, in one mode without flags.
#include <algorithm>
#include <string>

#include <gtest/gtest.h>

#include "autograd/reduce.h"
#include "nn/lora.h"
#include "nn/models/llama.h"
#include "nn/optimizer/clip.h"
#include "tests/distributed/conformance/net.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::Reducer;
using distributed::ReducerEvent;

Variable deep(Net& net, Variable x) {
  return net.segment(
      [&](Variable y) {
        for (int i = 0; i < 3; ++i) {
          y = net.segment(Net::block, net.l1, std::move(y));
          y = net.segment(Net::block, net.l2, std::move(y));
        }
        return y;
      },
      std::move(x));
}

Variable once_each(Net& net, Variable x) {
  for (const nn::Linear* layer : {&net.l1, &net.l2, &net.l3}) {
    x = net.segment(Net::block, *layer, std::move(x));
  }
  return x;
}

nn::Batch batch_of(int rank) {
  nn::Batch batch;
  std::vector<std::int64_t> ids;
  for (int i = 0; i < 8; ++i) {
    ids.push_back((3 * i + 5 * rank) % 23);
  }
  batch.ids = batch.labels = Tensor::from(ids, {2, 4});
  return batch;
}

nn::LlamaConfig tiny() {
  nn::LlamaConfig config{.vocabulary = 23, .width = 16, .inner = 24, .layers = 2, .heads = 2};
  config.kv_heads = 1;
  config.head_size = config.rope.dim = 8;
  return config;
}

// "Expected to mark a variable ready only once": two hooks a segment, three segments a weight.
TEST(SymptomsOnRanks, AVariableIsMarkedReadyOnce) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    for (int i = 0; i < 3; ++i) {
      net.zero();
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      std::vector<int> ready(net.parameters.size());
      BackwardOptions options;
      options.on_ready = [&](Parameter& p) {
        ++ready[static_cast<std::size_t>(std::ranges::find(net.parameters, &p) -
                                         net.parameters.begin())];
      };
      reducer.backward(mean_square(deep(net, rows_of(ranks.rank(), i))), options);
      EXPECT_EQ(ready, std::vector<int>(net.parameters.size(), 1));
    }
  });
}

// "Gradient ... has already been reduced": every bucket travels once in a step.
TEST(SymptomsOnRanks, NoGradientIsReducedTwice) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters, {{1, 1}});
    Tape tape;
    for (int i = 0; i < 3; ++i) {
      net.zero();
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      reducer.backward(mean_square(deep(net, rows_of(ranks.rank(), i))));
      std::vector<int> launched(reducer.buckets().size()), complete(launched.size());
      for (const ReducerEvent& e : reducer.events()) {
        launched[e.index] += e.kind == ReducerEvent::Kind::launch;
        complete[e.index] += e.kind == ReducerEvent::Kind::complete;
      }
      EXPECT_EQ(launched, std::vector<int>(6, 1));
      EXPECT_EQ(complete, launched);
    }
  });
}

// find_unused_parameters with segments: hidden parameters looked unused, and then fired.
TEST(SymptomsOnRanks, UnusedParametersAreFoundInSegments) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("inputs-only"));
    std::vector<std::string> unused;
    BackwardOptions options;
    options.on_plan = [&](const Plan& plan) {
      for (const Parameter* p : plan.unreached) {
        unused.push_back(p->name());
      }
    };
    reducer.backward(mean_square(deep(net, rows_of(ranks.rank(), 0))), options);
    EXPECT_EQ(unused, (std::vector<std::string>{"l3.weight", "l3.bias"}));
    EXPECT_FALSE(net.l3.weight.has_gradient());
    EXPECT_TRUE(net.l1.weight.has_gradient());
  });
}

// PEFT's modules_to_save and frozen towers: frozen originals beside trained copies.
TEST(SymptomsOnRanks, FrozenWeightsBesideTrainedCopies) {
  on_ranks([](Communicator& ranks) {
    std::vector<std::vector<float>> results[2];
    for (const bool segments : {false, true}) {
      nn::Llama model(tiny(), {cpu, DType::f32});
      Generator generator{5, 0};
      model.initialize(generator);
      nn::add_lora(model,
                   {.rank = 2,
                    .init = nn::LoraInit::random,
                    .targets = {.names = {"q_proj", "v_proj"}},
                    .modules_to_save = {"lm_head"}},
                   generator);
      const std::vector<Parameter*> trained = model.trainable_parameters();
      Reducer reducer(ranks, trained);
      Tape tape;
      for (int i = 0; i < 2; ++i) {
        for (Parameter* p : trained) {
          p->zero_gradient();
        }
        const Tape::Scope scope(tape, Policies::named(segments ? "inputs-only" : "keep-all"));
        BackwardOptions options;
        options.reach_all = true;
        reducer.backward(model.loss(batch_of(ranks.rank())), options);
      }
      std::size_t slots = 0;
      for (const distributed::Bucket& bucket : reducer.buckets()) {
        slots += bucket.slots.size();
      }
      EXPECT_EQ(slots, trained.size());
      EXPECT_EQ(trained.size(), 2u * 2 * 2 + 1);
      for (const Parameter* p : trained) {
        results[segments ? 1 : 0].push_back(p->gradient().to_vector<float>());
      }
    }
    EXPECT_EQ(results[0], results[1]);
  });
}

// static_graph with accumulation: counts learned in "iteration 1" were those of a micro-batch, and
// later steps were not reduced. Here ranks agree in the first step and in every later one.
TEST(SymptomsOnRanks, AccumulationIsReducedInEveryStep) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    for (int step = 0; step < 4; ++step) {
      net.zero();
      const int micro_batches = 1 + step % 3;
      for (int m = 0; m < micro_batches; ++m) {
        const Tape::Scope scope(tape, Policies::named("inputs-only"));
        const Variable loss = mean_square(deep(net, rows_of(ranks.rank(), 10 * step + m)));
        m + 1 < micro_batches ? reducer.accumulate(loss) : reducer.backward(loss);
      }
      const Tensor root = net.l1.weight.gradient().clone();
      ranks.broadcast(root, 0, {"compare"}).wait();
      EXPECT_EQ(root.to_vector<float>(), net.l1.weight.gradient().to_vector<float>());
      Net alone;
      Tape other;
      const Tape::Scope scope(other);
      backward(mean_square(deep(alone, rows_of(ranks.rank(), 10 * step))));
      EXPECT_NE(alone.gradients(), net.gradients());
    }
  });
}

// The first step has no overlap: here bucket 0 is launched before the last parameter is ready.
TEST(SymptomsOnRanks, TheFirstStepOverlaps) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters, {{1, 1}});
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("inputs-only"));
    reducer.backward(mean_square(once_each(net, rows_of(ranks.rank(), 0))));
    std::int64_t first_launch = -1, last_ready = -1;
    for (const ReducerEvent& e : reducer.events()) {
      if (e.kind == ReducerEvent::Kind::launch && first_launch < 0) {
        first_launch = e.sequence;
      } else if (e.kind == ReducerEvent::Kind::ready) {
        last_ready = e.sequence;
      }
    }
    EXPECT_GE(first_launch, 0);
    EXPECT_LT(first_launch, last_ready);
  });
}

// Zero or absent adapter gradients with a finite loss: a norm of exactly 0 over the ranks.
TEST(SymptomsOnRanks, AdaptersUnderFrozenInputsHaveGradients) {
  on_ranks([](Communicator& ranks) {
    nn::Llama model(tiny(), {cpu, DType::f32});
    Generator generator{5, 0};
    model.initialize(generator);
    nn::add_lora(model, {.rank = 2, .init = nn::LoraInit::random, .targets = {.names = {"q_proj"}}},
                 generator);
    Reducer reducer(ranks, model.trainable_parameters());
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("nested"));
    reducer.backward(model.loss(batch_of(ranks.rank())));
    for (Parameter* p : model.trainable_parameters()) {
      EXPECT_GT(nn::global_norm({&p, 1}), 0) << p->name();
    }
  });
}

// "Trying to backward through the graph a second time" in nested checkpoints.
TEST(SymptomsOnRanks, NestedSegmentsAreSweptOnce) {
  on_ranks([](Communicator& ranks) {
    Net net;
    Reducer reducer(ranks, net.parameters);
    Tape tape;
    const Tape::Scope scope(tape, Policies::named("inputs-only"));
    const Variable loss = mean_square(deep(net, rows_of(ranks.rank(), 0)));
    BackwardOptions keep;
    keep.keep = true;
    reducer.accumulate(loss, keep);
    reducer.backward(loss);
    EXPECT_EQ(reducer.steps(), 1);
  });
}

// The micro-batch's mean instead of the mean over all tokens: the accumulation bug of 2024.
TEST(SymptomsOnRanks, MicroBatchesCountByTheirTokens) {
  on_ranks([](Communicator& ranks) {
    // Ranks and micro-batches with different numbers of labels: 3, then 1 + rank.
    auto batch = [&](int rank, int micro) {
      nn::Batch in = batch_of(rank + 10 * micro);
      in.labels = in.labels.clone();
      auto* labels = in.labels.data<std::int64_t>();
      for (int i = micro == 0 ? 4 : 2 + std::min(rank, 5); i < 8; ++i) {
        labels[i] = -100;
      }
      return in;
    };
    auto predicted = [](const nn::Batch& in) {
      std::int64_t count = 0;
      for (int row = 0; row < 2; ++row) {
        for (int t = 1; t < 4; ++t) {
          count += in.labels.data<std::int64_t>()[4 * row + t] >= 0;
        }
      }
      return count;
    };
    auto make = [](nn::Llama& model) {
      Generator generator{5, 0};
      model.initialize(generator);
    };
    nn::Llama model(tiny(), {cpu, DType::f32}), alone(tiny(), {cpu, DType::f32});
    make(model);
    make(alone);
    Reducer reducer(ranks, model.trainable_parameters(), {.mean = distributed::Mean::tokens});
    for (int micro = 0; micro < 2; ++micro) {
      Tape tape;
      const Tape::Scope scope(tape, Policies::named("inputs-only"));
      const nn::Batch in = batch(ranks.rank(), micro);
      reducer.add_tokens(predicted(in));
      const Variable loss = model.loss(in, {.items = 1});
      micro == 0 ? reducer.accumulate(loss) : reducer.backward(loss);
    }
    double items = 0;
    for (int r = 0; r < ranks.size(); ++r) {
      items += static_cast<double>(predicted(batch(r, 0)) + predicted(batch(r, 1)));
    }
    Tape tape;
    const Tape::Scope scope(tape);
    std::vector<Variable> losses;
    for (int r = 0; r < ranks.size(); ++r) {
      losses.push_back(alone.loss(batch(r, 0), {.items = items}));
      losses.push_back(alone.loss(batch(r, 1), {.items = items}));
    }
    backward(losses);
    EXPECT_EQ(static_cast<double>(reducer.tokens()), items);
    const auto expected = alone.trainable_parameters(), got = model.trainable_parameters();
    for (std::size_t p = 0; p < got.size(); ++p) {
      const auto g = got[p]->gradient().to_vector<float>();
      const auto e = expected[p]->gradient().to_vector<float>();
      for (std::size_t i = 0; i < g.size(); ++i) {
        ASSERT_NEAR(g[i], e[i], 5e-5 + 1.3e-6 * std::abs(e[i])) << got[p]->name();
      }
    }
  });
}

}  // namespace
}  // namespace reprise::testing

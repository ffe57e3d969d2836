#include "tests/distributed/rank_program.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <utility>

#include <fmt/format.h>

#include "core/philox.h"
#include "distributed/rank_tree.h"
#include "distributed/sharding.h"
#include "tests/autograd/toy_ops.h"

namespace reprise::testing {
namespace {

using distributed::Mean;
using distributed::Reducer;

constexpr float kRate = 0.05f;

class Model {
 public:
  explicit Model(const RankProgram& program) : program_(program) {
    for (std::size_t i = 0; i < program.frozen.size(); ++i) {
      const std::int64_t length = program.width * (program.twice_as_long[i] ? 2 : 1);
      std::vector<float> values;
      for (std::int64_t k = 0; k < length; ++k) {
        values.push_back(uniform(philox(program.seed + 7 * i, static_cast<std::uint64_t>(k))[0]) -
                         0.3f);
      }
      owned_.push_back(
          std::make_unique<Parameter>("p" + std::to_string(i), Tensor::from(values, {length})));
      parameters.push_back(owned_.back().get());
    }
  }

  void set_step(int step) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const bool on = program_.trainable(i, step);
      if (parameters[i]->trainable() && !on) {
        parameters[i]->zero_gradient();
      }
      parameters[i]->set_trainable(on);
    }
  }

  Variable loss(std::uint64_t source, int step) {
    const std::uint64_t seed =
        program_.seed * 1000 + source * 10 + static_cast<std::uint64_t>(step);
    std::vector<float> values;
    for (std::int64_t i = 0; i < program_.width; ++i) {
      values.push_back(uniform(philox(seed, static_cast<std::uint64_t>(i))[0]) - 0.5f);
    }
    Generator generator{seed, 0};
    auto body = [&](Variable x) {
      for (const RankBlock& block : program_.blocks) {
        for (int i = 0; i < (block.twice ? 2 : 1); ++i) {
          x = run(block, block.depth, std::move(x), source, step, generator);
        }
      }
      return toy_mul(toy_tanh(std::move(x)), whole(0));
    };
    const Variable data = Tensor::from(values, {program_.width});
    Variable x = program_.segment_around_all ? checkpoint("model", body, data) : body(data);
    return toy_sum(toy_square(std::move(x)));
  }

  Values gradients() const {
    Values all;
    for (const Parameter* p : parameters) {
      all.push_back(p->has_gradient() ? p->gradient().to_vector<float>() : std::vector<float>());
    }
    return all;
  }
  Values values() const {
    Values all;
    for (const Parameter* p : parameters) {
      all.push_back(p->value().to_vector<float>());
    }
    return all;
  }
  static void update(std::span<Parameter* const> parameters) {
    for (Parameter* p : parameters) {
      if (!p->has_gradient()) {
        continue;
      }
      const auto* g = p->gradient().data<float>();
      auto* value = p->write().data<float>();
      for (std::int64_t i = 0; i < p->value().numel(); ++i) {
        value[i] -= kRate * g[i];
      }
    }
  }
  void zero() {
    for (Parameter* p : parameters) {
      p->zero_gradient();
    }
  }

  std::vector<Parameter*> parameters;

 private:
  Variable whole(std::size_t i, bool second = false) {
    Variable p = *parameters[i];
    if (!program_.twice_as_long[i]) {
      return p;
    }
    const std::int64_t begin = second ? program_.width : 0;
    return toy_slice(std::move(p), begin, begin + program_.width);
  }

  Variable run(const RankBlock& block, int depth, Variable x, std::uint64_t source, int step,
               Generator& generator) {
    if (depth > 0) {
      return checkpoint(
          "block", [&] { return run(block, depth - 1, std::move(x), source, step, generator); });
    }
    for (const Use& use : block.uses) {
      if ((source + static_cast<std::uint64_t>(step)) % static_cast<std::uint64_t>(use.branch) !=
          0) {
        continue;
      }
      switch (use.kind) {
        case Use::Kind::mul:
          x = toy_mul(x, whole(use.parameter, use.second_half));
          break;
        case Use::Kind::add:
          x = toy_add(x, whole(use.parameter, use.second_half));
          break;
        case Use::Kind::mul_add:
          x = toy_mul_add(x, whole(use.parameter, use.second_half), whole(use.other));
          break;
        case Use::Kind::tanh:
          x = toy_add(toy_tanh(toy_mul(x, whole(use.parameter))), x);
          break;
        case Use::Kind::dropout:
          x = toy_mul(toy_dropout(x, 0.2f, generator), whole(use.parameter));
          break;
        case Use::Kind::ignored:  // an output that no loss reads
          (void)toy_mul(x, whole(use.parameter));
          break;
      }
    }
    return x;
  }

  const RankProgram& program_;
  std::vector<std::unique_ptr<Parameter>> owned_;
};

double divisor(const RankProgram& program, int step) {
  if (program.options.mean == Mean::tokens) {
    std::int64_t tokens = 0;
    for (int r = 0; r < program.ranks; ++r) {
      for (int m = 0;
           m < program.micro_batches[static_cast<std::size_t>(r)][static_cast<std::size_t>(step)];
           ++m) {
        tokens += program.tokens(program.source(r, m), step);
      }
    }
    return static_cast<double>(std::max<std::int64_t>(1, tokens));
  }
  if (program.options.shards > 0) {
    return program.options.shards;
  }
  return program.options.divide_by_live ? program.live(step) : program.ranks;
}

// Of parameter i. Compressed: bf16 from every rank, added in f32, rounded once.
std::vector<float> sum_of(const std::vector<Values>& parts, std::size_t i, bool compress) {
  const auto rounded = [&](std::vector<float> values) {
    for (float& x : values) {
      x = compress ? to_float(to_bfloat16(x)) : x;
    }
    return values;
  };
  std::vector<std::vector<float>> sent;
  std::vector<const void*> addends;
  for (const Values& part : parts) {
    sent.push_back(rounded(part[i]));
    addends.push_back(sent.back().data());
  }
  std::vector<float> sum(parts[0][i].size());
  reduce_tree(addends, sum.data(), std::ssize(sum), DType::f32, distributed::Reduce::sum);
  return rounded(std::move(sum));
}

void set_gradients(const std::vector<Parameter*>& parameters, const Values& gradients) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    parameters[i]->zero_gradient();
    if (!gradients[i].empty()) {
      parameters[i]->bind_gradient(Tensor::from(gradients[i], parameters[i]->shape()));
      parameters[i]->set_gradient_present();
    } else if (parameters[i]->defined()) {
      parameters[i]->unbind_gradient();
    }
  }
}

}  // namespace

bool RankProgram::trainable(std::size_t parameter, int step) const {
  if (parameter == 0) {
    return true;
  }
  return thaw_step >= 0 && step >= thaw_step ? frozen[parameter] || parameter % 2 == 1
                                             : !frozen[parameter];
}

int RankProgram::live(int step) const {
  return static_cast<int>(std::ranges::count_if(micro_batches, [&](const std::vector<int>& rank) {
    return rank[static_cast<std::size_t>(step)] > 0;
  }));
}

std::uint64_t RankProgram::source(int rank, int micro) const {
  const int per_rank = options.shards > 0 ? options.shards / ranks : 8;
  return static_cast<std::uint64_t>(rank * per_rank + micro);
}

std::int64_t RankProgram::tokens(std::uint64_t source, int step) const {
  return philox(seed, 31 * source + static_cast<std::uint64_t>(step))[0] % 6;
}

std::string RankProgram::text() const {
  std::string micro;
  for (const auto& rank : micro_batches) {
    micro += fmt::format("[{}] ", fmt::join(rank, " "));
  }
  return fmt::format(
      "seed {}: {} ranks, {} parameters of {}, {} blocks, micro-batches {}shards {}, buckets {} "
      "{}, "
      "mean {}, live {}, zero {}, early {}, compressed {}, thaw at {}, stage {}, again {}",
      seed, ranks, frozen.size(), width, blocks.size(), micro, options.shards,
      options.buckets.first_bucket_bytes, options.buckets.bucket_bytes,
      static_cast<int>(options.mean), options.divide_by_live, zero, early, options.compress,
      thaw_step, stage, gather_again);
}

RankProgram draw_program(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  auto draw = [&](int least, int most) {
    return least + static_cast<int>(random() % static_cast<std::uint64_t>(most - least + 1));
  };
  auto chance = [&](int percent) { return draw(0, 99) < percent; };
  RankProgram program;
  program.seed = seed;
  program.ranks = draw(1, 4);
  program.steps = draw(1, 4);
  program.width = draw(1, 40);
  const int parameters = draw(2, 9);
  for (int i = 0; i < parameters; ++i) {
    program.twice_as_long.push_back(chance(25));
    program.frozen.push_back(i > 0 && chance(25));
  }
  if (chance(25)) {
    program.thaw_step = draw(1, 2);
  }
  const int blocks = draw(1, 4);
  for (int b = 0; b < blocks; ++b) {
    RankBlock block;
    const int uses = draw(1, 5);
    for (int u = 0; u < uses; ++u) {
      Use use;
      use.kind = static_cast<Use::Kind>(draw(0, 5));
      use.parameter = static_cast<std::size_t>(draw(0, parameters - 1));
      use.other = static_cast<std::size_t>(draw(0, parameters - 1));
      use.second_half = chance(50);
      use.branch = chance(40) ? draw(2, 3) : 1;
      block.uses.push_back(use);
    }
    block.depth = draw(0, 3);
    block.twice = chance(30);
    program.blocks.push_back(block);
  }
  program.segment_around_all = chance(30);
  program.drop = chance(80);
  program.early = chance(40);
  distributed::ReducerOptions& options = program.options;
  auto bytes = [&] { return chance(20) ? std::int64_t{1} << 20 : draw(1, 800); };
  options.buckets = {bytes(), bytes()};
  options.mean = chance(40) ? Mean::tokens : Mean::ranks;
  options.divide_by_live = chance(50);
  const int most_micro = draw(1, 3);
  if (chance(25)) {
    options.shards = program.ranks * draw(1, 6);
  }
  const bool uneven = options.shards == 0 && chance(30);
  for (int r = 0; r < program.ranks; ++r) {
    std::vector<int>& rank = program.micro_batches.emplace_back();
    const int ends = uneven ? draw(0, program.steps) : program.steps;
    for (int s = 0; s < program.steps; ++s) {
      const int count = options.shards > 0 ? options.shards / program.ranks : draw(1, most_micro);
      rank.push_back(s < ends ? count : 0);
    }
  }
  while (program.steps > 0 && program.live(program.steps - 1) == 0) {
    --program.steps;
  }
  program.zero = uneven || options.shards > 0 || options.mean == Mean::tokens || chance(80);
  options.compress = options.shards == 0 && chance(25);
  return program;
}

RankProgram sharded(RankProgram program, int stage, std::size_t gather_again) {
  program.stage = stage;
  program.gather_again = gather_again;
  program.thaw_step = -1;
  program.zero = true;
  return program;
}

namespace {

// A rank's reducer, or its sharding.
class Engine {
 public:
  Engine(const RankProgram& program, Model& model, distributed::Communicator& ranks)
      : program_(program), model_(model) {
    if (program.stage == 0) {
      reducer_.emplace(ranks, model.parameters, program.options);
    } else {
      const auto reads =
          distributed::record_reads(model.parameters, [&] { (void)model.loss(0, 0); });
      sharding_.emplace(
          ranks, model.parameters, reads,
          distributed::ShardingOptions{program.stage, program.options, program.gather_again});
    }
    if (program.early) {
      reducer_ ? reducer_->update_early(Model::update) : sharding_->update_early(Model::update);
    }
  }
  void zero() { reducer_ ? model_.zero() : sharding_->zero_gradients(); }
  void add_tokens(std::int64_t n) { reducer_ ? reducer_->add_tokens(n) : sharding_->add_tokens(n); }
  void sweep(const Variable& loss, bool last) {
    if (reducer_) {
      last ? reducer_->backward(loss) : reducer_->accumulate(loss);
    } else {
      last ? sharding_->backward(loss) : sharding_->accumulate(loss);
    }
  }
  bool join() { return reducer_ ? reducer_->join() : sharding_->join(); }
  StepResult update() {
    StepResult result;
    result.gradients = gradients();
    if (!program_.early) {
      Model::update(reducer_ ? std::span<Parameter* const>(model_.parameters)
                             : sharding_->shards());
    }
    if (reducer_) {
      result.parameters = model_.values();
      return result;
    }
    sharding_->updated();
    for (const Parameter* p : model_.parameters) {
      result.parameters.push_back(sharding_->gathered(*p).to_vector<float>());
    }
    return result;
  }

 private:
  Values gradients() {
    if (reducer_) {
      return model_.gradients();
    }
    Values all;
    for (const Parameter* p : model_.parameters) {
      const Tensor gradient = sharding_->gathered_gradient(*p);
      all.push_back(gradient.defined() ? gradient.to_vector<float>() : std::vector<float>());
    }
    return all;
  }

  const RankProgram& program_;
  Model& model_;
  std::optional<Reducer> reducer_;
  std::optional<distributed::Sharding> sharding_;
};

}  // namespace

std::vector<StepResult> run_rank(const RankProgram& program,
                                 distributed::Communicator& communicator) {
  const int rank = communicator.rank();
  const auto& mine = program.micro_batches[static_cast<std::size_t>(rank)];
  Model model(program);
  model.set_step(0);
  Engine engine(program, model, communicator);
  Policies policies;
  policies.set("*", program.drop ? keep_inputs() : keep_all());
  Tape tape;
  std::vector<StepResult> results;
  for (int step = 0;; ++step) {
    model.set_step(std::min(step, program.steps - 1));
    if (program.zero) {
      engine.zero();
    }
    const int micros = step < program.steps ? mine[static_cast<std::size_t>(step)] : 0;
    for (int m = 0; m < micros; ++m) {
      const Tape::Scope scope(tape, policies);
      const std::uint64_t source = program.source(rank, m);
      const Variable loss = model.loss(source, step);
      if (program.options.mean == Mean::tokens) {
        engine.add_tokens(program.tokens(source, step));
      }
      engine.sweep(loss, m + 1 == micros);
    }
    // With shards nobody runs out: all stop together.
    if (micros == 0 && (program.options.shards > 0 || !engine.join())) {
      return results;
    }
    results.push_back(engine.update());
  }
}

std::vector<StepResult> expected_of(const RankProgram& program) {
  Model model(program);
  std::vector<StepResult> results;
  Values before(model.parameters.size());
  for (int step = 0; step < program.steps; ++step) {
    set_gradients(model.parameters, before);
    model.set_step(step);
    if (program.zero) {
      model.zero();
    }
    before = model.gradients();
    std::vector<Values> parts;
    std::vector<bool> used(model.parameters.size());
    for (int r = 0; r < program.ranks; ++r) {
      set_gradients(model.parameters, before);
      const int micros =
          program.micro_batches[static_cast<std::size_t>(r)][static_cast<std::size_t>(step)];
      for (int m = 0; m < micros; ++m) {
        Tape tape;
        const Tape::Scope scope(tape);
        BackwardOptions options;
        options.on_plan = [&](const Plan& plan) {
          for (const Ready& ready : plan.order) {
            const auto at = std::ranges::find(model.parameters, ready.parameter);
            used[static_cast<std::size_t>(at - model.parameters.begin())] = true;
          }
        };
        backward(model.loss(program.source(r, m), step), options);
        if (program.options.shards > 0) {
          parts.push_back(model.gradients());
          model.zero();
        }
      }
      if (program.options.shards == 0) {
        parts.push_back(model.gradients());
      }
    }
    for (std::size_t i = 0; i < model.parameters.size(); ++i) {
      if (!used[i]) {
        continue;
      }
      const auto count = static_cast<std::size_t>(model.parameters[i]->value().numel());
      for (Values& part : parts) {
        part[i].resize(count);  // zeros from those who have none
      }
      std::vector<float> sum = sum_of(parts, i, program.options.compress);
      for (float& x : sum) {
        x /= static_cast<float>(divisor(program, step));
      }
      before[i] = sum;
    }
    set_gradients(model.parameters, before);
    StepResult& result = results.emplace_back();
    result.gradients = before;
    Model::update(model.parameters);
    result.parameters = model.values();
  }
  return results;
}

Values full_batch(const RankProgram& program) {
  Model model(program);
  model.set_step(0);
  for (int r = 0; r < program.ranks; ++r) {
    for (int m = 0; m < program.micro_batches[static_cast<std::size_t>(r)][0]; ++m) {
      Tape tape;
      const Tape::Scope scope(tape);
      backward(model.loss(program.source(r, m), 0));
    }
  }
  Values sums = model.gradients();
  for (std::vector<float>& sum : sums) {
    for (float& x : sum) {
      x /= static_cast<float>(divisor(program, 0));
    }
  }
  return sums;
}

std::string difference(const std::vector<StepResult>& a, const std::vector<StepResult>& b) {
  if (a.size() != b.size()) {
    return fmt::format("{} steps and {}", a.size(), b.size());
  }
  for (std::size_t step = 0; step < a.size(); ++step) {
    for (const auto of : {&StepResult::gradients, &StepResult::parameters}) {
      const Values &x = a[step].*of, &y = b[step].*of;
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (x[i].size() != y[i].size() ||
            (!x[i].empty() && std::memcmp(x[i].data(), y[i].data(), 4 * x[i].size()) != 0)) {
          return fmt::format("step {}: the {} of p{} differ{}", step,
                             of == &StepResult::gradients ? "gradients" : "values", i,
                             x[i].size() != y[i].size() ? ": one is absent" : "");
        }
      }
    }
  }
  return {};
}

}  // namespace reprise::testing

// Data-parallel training: two processes, each with half of the batch, every block a segment. Each
// parameter's gradient is reduced once a step, and is bitwise what it is without segments.
//
//   two_ranks [--ranks N]         (default 2; it starts mpirun by itself)
#include <cstdio>
#include <cstdlib>

#include "core/parallel.h"
#include "distributed/reducer.h"
#include "nn/models/llama.h"
#include "train/launch.h"
#include "train/policy_table.h"
#include "train/text.h"
#include "train/trainer.h"

using namespace reprise;

namespace {

struct Run {
  std::string digest;          // of the reduced gradients of the first step
  double first = 0, last = 0;  // loss, mean over ranks
  int ready = 0;               // calls of on_ready in the first step
};

Run train_with(const char* policy, distributed::Communicator& ranks, const train::ByteData& data) {
  nn::LlamaConfig config{
      .vocabulary = train::kByteVocabulary, .width = 64, .inner = 172, .layers = 4, .heads = 4};
  config.kv_heads = 4;
  config.head_size = config.rope.dim = 16;
  nn::Llama model(config, {cpu, DType::f32});
  Generator generator{/*seed=*/1};  // the same on all ranks: they start from one model
  model.initialize(generator);
  train::TrainerOptions options;
  options.policies = Policies::named(policy);
  train::Trainer trainer(model, generator, options);
  distributed::Reducer reducer(ranks, trainer.parameters());
  Run run;
  trainer.hooks.before = [&](BackwardOptions& backward) {
    if (trainer.steps() == 0) {
      backward.on_ready = [&](Parameter&) { ++run.ready; };
    }
    reducer.attach(backward);
  };
  trainer.hooks.after = [&] {
    reducer.finish();
    if (trainer.steps() == 0) {
      run.digest = train::gradient_digest(trainer.parameters());
    }
  };
  Generator order{/*seed=*/2, static_cast<std::uint64_t>(ranks.rank()) << 40};
  for (int step = 0; step < 20; ++step) {
    const double loss = all_reduce_value(ranks, trainer.step(data.draw(order), 3e-3),
                                         distributed::Reduce::sum, "loss") /
                        ranks.size();
    (step == 0 ? run.first : run.last) = loss;
  }
  const auto parameters = static_cast<int>(trainer.parameters().size());
  if (run.ready != parameters) {
    std::printf("rank %d: %d ready calls for %d parameters\n", ranks.rank(), run.ready, parameters);
    run.digest.clear();
  }
  return run;
}

int run(distributed::Communicator& ranks) {
  std::string text;
  for (int i = 0; text.size() < 20000; ++i) {
    text += "rank and file, line " + std::to_string(i) + ". ";
  }
  const train::ByteData data(text, /*batch=*/4, /*tokens=*/32);
  const Run segments = train_with("inputs-only", ranks, data);
  const Run plain = train_with("keep-all", ranks, data);
  const bool right = !segments.digest.empty() && segments.digest == plain.digest &&
                     segments.last == plain.last && segments.last < segments.first - 0.5;
  if (ranks.rank() == 0) {
    std::printf("%d ranks: loss %.4f -> %.4f, gradients with segments %s\n", ranks.size(),
                segments.first, segments.last,
                segments.digest == plain.digest ? "bitwise equal" : "DIFFER");
  }
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  auto launch = train::plan_launch(argc, argv);
  if (launch.ok() && launch->ranks == 0 && launch->world.size == 1) {
    launch->ranks = 2;
  }
  if (launch.ok() && launch->ranks > 1) {
    const auto code = train::supervise(*launch);
    if (!code.ok()) {
      std::fprintf(stderr, "%s\n", std::string(code.status().message()).c_str());
    }
    return code.ok() ? *code : 2;
  }
  if (!launch.ok()) {
    std::fprintf(stderr, "%s\n", std::string(launch.status().message()).c_str());
    return 2;
  }
  try {
    set_threads(launch->world.threads);
    auto ranks = train::connect(launch->world);
    if (!ranks.ok()) {
      std::fprintf(stderr, "%s\n", std::string(ranks.status().message()).c_str());
      return 2;
    }
    const absl::Status done =
        train::run_rank(*std::move(ranks), [](distributed::Communicator& communicator) {
          return run(communicator) == 0 ? absl::OkStatus()
                                        : absl::InternalError("gradients differ");
        });
    return done.ok() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

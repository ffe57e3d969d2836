// A data-parallel step of GPT-2 on several ranks: its time, how much of the communication backward
// hides, what is copied, what the checks cost, and what a delay of every collective adds. Rank 0
// prints one JSON object; --log writes the events of its last step for tools/make_scaling.
//
//   bench_reduce --ranks 2 --layers 12 --tokens 128 --delay-ms 50
#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <thread>

#include <fmt/format.h>

#include "core/parallel.h"
#include "distributed/comm_queue.h"
#include "distributed/reducer.h"
#include "nn/models/language_model.h"
#include "nn/weights/json.h"
#include "train/launch.h"
#include "train/trainer.h"

namespace reprise::bench {
namespace {

using distributed::Clock;
using distributed::Collective;
using distributed::Communicator;
using distributed::Pending;
using distributed::Reducer;
using distributed::ReducerEvent;

struct Options {
  std::int64_t layers = 12, width = 768, heads = 12, vocabulary = 50257, batch = 1, tokens = 128;
  int threads = 1, warmup = 1, steps = 5, delay_ms = 0, delayed_steps = 3;
  double bucket_mib = 25, first_bucket_mib = 1;
  std::string policy = "keep-all", log;
};

double ms(Clock::duration time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Holds every collective back for so long, one after the other.
class Delayed final : public Communicator {
 public:
  Delayed(Communicator& inner, std::chrono::milliseconds delay) : inner_(inner), delay_(delay) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void abort(std::string why) override { inner_.abort(std::move(why)); }
  void close() override { queue_.finish(std::chrono::seconds(60)); }
  Pending start(Collective collective) override {
    ++collectives;
    return queue_.push([this, c = std::move(collective)] {
      std::this_thread::sleep_for(delay_);
      inner_.start(c).wait();
    });
  }

  int collectives = 0;  // calls of this rank, all of one thread

 private:
  Communicator& inner_;
  const std::chrono::milliseconds delay_;
  distributed::CommQueue queue_;
};

std::unique_ptr<nn::LanguageModel> build(const Options& o) {
  const nlohmann::json config = {
      {"model_type", "gpt2"}, {"vocab_size", o.vocabulary}, {"n_positions", 1024},
      {"n_embd", o.width},    {"n_layer", o.layers},        {"n_head", o.heads},
      {"resid_pdrop", 0.0},   {"embd_pdrop", 0.0},          {"attn_pdrop", 0.0}};
  auto read = nn::JsonReader::parse(config.dump(), "bench");
  auto model = nn::build_language_model(*read, {cpu, DType::f32});
  if (!model.ok()) {
    fail("bench", "{}", std::string(model.status().message()));
  }
  return *std::move(model);
}

nn::Batch random_batch(const Options& o, int rank) {
  Generator generator{7 + static_cast<std::uint64_t>(rank), 0};
  std::vector<std::int64_t> ids(static_cast<std::size_t>(o.batch * o.tokens));
  for (std::int64_t& id : ids) {
    id = philox(generator.seed, generator.reserve(4))[0] % o.vocabulary;
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {o.batch, o.tokens});
  return batch;
}

struct Step {
  double total_ms = 0;
  double callbacks_ms = 0;  // of the reducer, on the main thread
  Clock::time_point begin, end;
  std::vector<ReducerEvent> events;
  std::int64_t gradient_bytes_taken = 0;  // from the allocator, while it ran
};

// Bytes of a kind that the allocator handed out, as its timeline has them.
std::int64_t bytes_taken(const std::string& timeline, MemoryKind kind) {
  std::int64_t bytes = 0;
  for (const auto& event : nlohmann::json::parse(timeline).at("events")) {
    const auto delta = event.at(2).get<std::int64_t>();
    bytes += event.at(3).get<std::string>() == name(kind) ? std::max<std::int64_t>(delta, 0) : 0;
  }
  return bytes;
}

// Steps of one trainer over one communicator.
class Runner {
 public:
  Runner(const Options& options, train::Trainer& trainer, const nn::Batch& batch,
         Communicator& world)
      : trainer_(trainer),
        batch_(batch),
        reducer(world, trainer.parameters(),
                {{static_cast<std::int64_t>(options.first_bucket_mib * (1 << 20)),
                  static_cast<std::int64_t>(options.bucket_mib * (1 << 20))}}) {
    trainer_.hooks.before = [this](BackwardOptions& backward) { attach(backward); };
    trainer_.hooks.after = [this] { reducer.finish(); };
  }
  ~Runner() { trainer_.hooks = {}; }

  Step step(bool count_bytes) {
    callbacks_ = {};
    allocator(cpu).set_timeline(count_bytes);
    Step result;
    result.begin = Clock::now();
    trainer_.step(batch_, 1e-4);
    result.end = Clock::now();
    result.total_ms = ms(result.end - result.begin);
    result.callbacks_ms = ms(callbacks_);
    result.events = reducer.events();
    if (count_bytes) {
      result.gradient_bytes_taken =
          bytes_taken(allocator(cpu).timeline_json(), MemoryKind::gradients);
      allocator(cpu).set_timeline(false);
    }
    return result;
  }

 private:
  train::Trainer& trainer_;
  const nn::Batch& batch_;
  Clock::duration callbacks_{};

 public:
  Reducer reducer;

 private:
  void attach(BackwardOptions& backward) {
    reducer.attach(backward);
    backward.on_plan = [this, inner = std::move(backward.on_plan)](const Plan& plan) {
      const auto begin = Clock::now();
      inner(plan);
      callbacks_ += Clock::now() - begin;
    };
    backward.on_ready = [this, inner = std::move(backward.on_ready)](Parameter& p) {
      const auto begin = Clock::now();
      inner(p);
      callbacks_ += Clock::now() - begin;
    };
  }
};

Clock::time_point time_of(const std::vector<ReducerEvent>& events, ReducerEvent::Kind kind,
                          std::size_t index = 0) {
  for (const ReducerEvent& event : events) {
    if (event.kind == kind && event.index == index) {
      return event.time;
    }
  }
  fail("bench", "the event log lacks an event");
}

// A bucket is under way from its launch, or the end of the one before, to its end.
struct Overlap {
  double busy_ms = 0, hidden_ms = 0;
};
Overlap overlap_of(const std::vector<ReducerEvent>& events, std::size_t buckets) {
  Overlap result;
  const auto swept = time_of(events, ReducerEvent::Kind::swept);
  Clock::time_point free;
  for (std::size_t b = 0; b < buckets; ++b) {
    const auto begin = std::max(free, time_of(events, ReducerEvent::Kind::launch, b));
    const auto end = std::max(begin, time_of(events, ReducerEvent::Kind::complete, b));
    result.busy_ms += ms(end - begin);
    result.hidden_ms += ms(std::max(begin, std::min(end, swept)) - begin);
    free = end;
  }
  return result;
}

// Backward from the bucket before to this one's launch.
std::vector<double> backward_ms_by_bucket(const std::vector<ReducerEvent>& events,
                                          std::size_t buckets) {
  std::vector<double> result;
  auto last = time_of(events, ReducerEvent::Kind::plan);
  for (std::size_t b = 0; b < buckets; ++b) {
    const auto launch = time_of(events, ReducerEvent::Kind::launch, b);
    result.push_back(ms(launch - last));
    last = launch;
  }
  return result;
}

// What one collective of the kind takes when nothing else runs: a barrier is a header alone.
double check_ms(Communicator& world, bool agree, std::int64_t words) {
  std::vector<double> times;
  const Tensor data = Tensor::zeros({words}, DType::i64, cpu, MemoryKind::communication);
  for (int i = 0; i < 300; ++i) {
    const auto begin = Clock::now();
    (agree ? world.agree(data, {"cost of a check"}) : world.barrier({"cost of a check"})).wait();
    times.push_back(ms(Clock::now() - begin));
  }
  return median(times);
}

void write_log(const Options& o, const Runner& runner, const Step& step, int ranks) {
  const auto at = [&](Clock::time_point time) { return ms(time - step.begin); };
  nlohmann::json log = {{"ranks", ranks},
                        {"tokens_per_rank", o.batch * o.tokens},
                        {"plan_ms", at(time_of(step.events, ReducerEvent::Kind::plan))},
                        {"swept_ms", at(time_of(step.events, ReducerEvent::Kind::swept))},
                        {"step_ms", step.total_ms}};
  Clock::time_point last = time_of(step.events, ReducerEvent::Kind::swept);
  for (std::size_t b = 0; b < runner.reducer.buckets().size(); ++b) {
    const distributed::Bucket& bucket = runner.reducer.buckets()[b];
    const auto complete = time_of(step.events, ReducerEvent::Kind::complete, b);
    last = std::max(last, complete);
    log["buckets"].push_back(
        {{"bytes", bucket.numel * static_cast<std::int64_t>(size_bytes(bucket.dtype))},
         {"launch_ms", at(time_of(step.events, ReducerEvent::Kind::launch, b))},
         {"complete_ms", at(complete)}});
  }
  log["after_reduction_ms"] = ms(step.end - last);
  std::ofstream(o.log) << log.dump(1) << "\n";
}

const Tensor& gradient_of(const Reducer& reducer, const distributed::Bucket::Slot& slot) {
  return reducer.parameters()[slot.parameter]->gradient();
}

// Bytes of all buckets, and how many gradients lie in one.
std::pair<std::int64_t, std::int64_t> count_buckets(const Reducer& reducer) {
  std::int64_t bytes = 0, in_buckets = 0;
  for (const distributed::Bucket& bucket : reducer.buckets()) {
    bytes += bucket.numel * static_cast<std::int64_t>(size_bytes(bucket.dtype));
    const Tensor& first = gradient_of(reducer, bucket.slots.front());
    for (const distributed::Bucket::Slot& slot : bucket.slots) {
      in_buckets += gradient_of(reducer, slot).shares_storage(first) ? 1 : 0;
    }
  }
  return {bytes, in_buckets};
}

// The fields of a run without delays.
nlohmann::json measure_plain(const Options& o, train::Trainer& trainer, const nn::Batch& batch,
                             Communicator& world) {
  Runner runner(o, trainer, batch, world);
  const Step first = runner.step(false);
  const std::size_t buckets = runner.reducer.buckets().size();
  const Overlap first_overlap = overlap_of(first.events, buckets);
  for (int i = 1; i < o.warmup; ++i) {
    runner.step(false);
  }
  std::vector<double> times, shares, busy, exposed, callbacks;
  Step last;
  for (int i = 0; i < o.steps; ++i) {
    last = runner.step(false);
    times.push_back(last.total_ms);
    const Overlap overlap = overlap_of(last.events, buckets);
    shares.push_back(overlap.hidden_ms / overlap.busy_ms);
    busy.push_back(overlap.busy_ms);
    exposed.push_back(overlap.busy_ms - overlap.hidden_ms);
    callbacks.push_back(last.callbacks_ms);
  }
  const auto parameters = static_cast<std::int64_t>(trainer.parameters().size());
  const auto [bucket_bytes, in_buckets] = count_buckets(runner.reducer);
  const Step counted = runner.step(true);
  const double header = check_ms(world, false, 0);
  const double agreement = check_ms(world, true, 2 + (parameters + 63) / 64);
  if (world.rank() == 0 && !o.log.empty()) {
    write_log(o, runner, last, world.size());
  }
  return {{"first_step_overlap", first_overlap.hidden_ms / first_overlap.busy_ms},
          {"step_ms", times},
          {"buckets", buckets},
          {"gradient_bytes", bucket_bytes},
          {"overlap", median(shares)},
          {"communication_ms", median(busy)},
          {"exposed_ms", median(exposed)},
          {"backward_ms_by_bucket", backward_ms_by_bucket(last.events, buckets)},
          {"gradients_outside_buckets", parameters - in_buckets},
          {"gradient_bytes_taken_in_a_step", counted.gradient_bytes_taken},
          {"callbacks_ms", median(callbacks)},
          {"header_ms", header},
          {"agreement_ms", agreement},
          {"checks_share", (agreement + static_cast<double>(buckets) * header) / median(times)}};
}

// The same steps with every collective held back; how much more than `plain` they take, as a whole
// and of what their events have after backward (where compute's noise is not).
nlohmann::json measure_delayed(const Options& o, train::Trainer& trainer, const nn::Batch& batch,
                               Communicator& world, const nlohmann::json& plain) {
  Delayed delayed(world, std::chrono::milliseconds(o.delay_ms));
  Runner runner(o, trainer, batch, delayed);
  runner.step(false);  // the layout is agreed on
  std::vector<double> times, exposed;
  int collectives = 0;
  for (int i = 0; i < o.delayed_steps; ++i) {
    const int before = delayed.collectives;
    const Step step = runner.step(false);
    times.push_back(step.total_ms);
    const Overlap overlap = overlap_of(step.events, runner.reducer.buckets().size());
    exposed.push_back(overlap.busy_ms - overlap.hidden_ms);
    collectives = delayed.collectives - before;
  }
  delayed.close();
  const double sum = static_cast<double>(collectives) * o.delay_ms;
  const double growth = median(times) - median(plain.at("step_ms").get<std::vector<double>>());
  const double exposed_growth = median(exposed) - plain.at("exposed_ms").get<double>();
  return {{"delay_ms", o.delay_ms},
          {"collectives", collectives},
          {"step_ms", times},
          {"growth_ms", growth},
          {"growth_share_of_delays", growth / sum},
          {"exposed_growth_ms", exposed_growth},
          {"exposed_growth_share_of_delays", exposed_growth / sum}};
}

nlohmann::json measure(const Options& o, Communicator& world) {
  const auto model = build(o);
  Generator generator{1, 0};
  model->initialize(generator);
  train::TrainerOptions trainer_options;
  trainer_options.max_norm = 0;
  trainer_options.policies = Policies::named(o.policy);
  train::Trainer trainer(*model, generator, trainer_options);
  const nn::Batch batch = random_batch(o, world.rank());
  nlohmann::json out = {{"peer", "reprise"},    {"ranks", world.size()},
                        {"threads", o.threads}, {"policy", o.policy},
                        {"batch", o.batch},     {"tokens", o.tokens},
                        {"layers", o.layers},   {"mpi", distributed::mpi_library().c_str()}};
  out.update(measure_plain(o, trainer, batch, world));
  if (o.delay_ms > 0) {
    out["delayed"] = measure_delayed(o, trainer, batch, world, out);
  }
  return out;
}

int run(const Options& options, const train::World& place) {
  set_threads(options.threads);
  auto connected = train::connect(place, std::chrono::seconds(60));
  if (!connected.ok()) {
    fmt::print(stderr, "reduce: {}\n", connected.status().ToString());
    return 1;
  }
  const std::unique_ptr<Communicator> world = *std::move(connected);
  try {
    const nlohmann::json result = measure(options, *world);
    world->close();
    if (place.rank == 0) {
      fmt::print("{}\n", result.dump());
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "reduce: rank {}: {}\n", place.rank, error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace reprise::bench

int main(int argc, char** argv) {
  using namespace reprise;
  const absl::StatusOr<train::Launch> launch = train::plan_launch(argc, argv);
  if (!launch.ok()) {
    fmt::print(stderr, "reduce: {}\n", std::string(launch.status().message()));
    return 2;
  }
  bench::Options options;
  CLI::App app("A data-parallel step, as JSON; --ranks N starts N processes.", "reduce");
  app.add_option("--layers", options.layers);
  app.add_option("--width", options.width);
  app.add_option("--heads", options.heads);
  app.add_option("--vocabulary", options.vocabulary);
  app.add_option("--batch", options.batch, "Sequences a rank");
  app.add_option("--tokens", options.tokens, "Of a sequence");
  app.add_option("--policy", options.policy)->check(CLI::IsMember(Policies::names()));
  app.add_option("--threads", options.threads, "Compute threads a rank");
  app.add_option("--warmup", options.warmup)->check(CLI::PositiveNumber);
  app.add_option("--steps", options.steps)->check(CLI::PositiveNumber);
  app.add_option("--bucket-mib", options.bucket_mib);
  app.add_option("--first-bucket-mib", options.first_bucket_mib);
  app.add_option("--delay-ms", options.delay_ms, "Also with each collective held back so long");
  app.add_option("--delayed-steps", options.delayed_steps)->check(CLI::PositiveNumber);
  app.add_option("--log", options.log, "File for the events of the last step of rank 0");
  std::vector<std::string> arguments(launch->arguments.rbegin(), launch->arguments.rend());
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  if (launch->only_watches()) {
    const absl::StatusOr<int> code = train::supervise(*launch);
    if (!code.ok()) {
      fmt::print(stderr, "reduce: {}\n", std::string(code.status().message()));
    }
    return code.value_or(1);
  }
  return bench::run(options, launch->world);
}

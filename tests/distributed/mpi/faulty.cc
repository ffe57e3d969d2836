// A small training job in which one rank goes wrong: mpi_faulty FAULT CULPRIT [anything].
// A fault is a difference ("count", "seed", ...) or KIND@POINT: kill, stop, exit0, exit3, loop,
// silent, slow, long (a minute) or throw at start, forward, backward, replay, optimizer, save or
// end. With --ranks N it starts itself.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include <unistd.h>

#include "core/parallel.h"
#include "core/progress.h"
#include "distributed/disagreement.h"
#include "distributed/reducer.h"
#include "tests/distributed/mpi/toy_model.h"
#include "train/launch.h"

namespace reprise::testing {
namespace {

using distributed::Clock;
using distributed::Communicator;
using distributed::Reduce;
using distributed::Reducer;
using distributed::ReducerOptions;

constexpr int kSteps = 4, kFaultyStep = 2;
constexpr std::chrono::seconds kLimit(3);

void go_wrong(const std::string& kind) {
  if (kind == "stop") {
    raise(SIGSTOP);
  } else if (kind == "kill") {
    raise(SIGKILL);
  } else if (kind == "exit0") {
    _exit(0);
  } else if (kind == "exit3") {
    std::exit(3);
  } else if (kind == "silent") {
    while (true) {
      pause();
    }
  } else if (kind == "loop") {
    volatile bool forever = true;
    while (forever) {
    }
  } else if (kind == "slow" || kind == "long") {
    for (const auto end = Clock::now() + kLimit * (kind == "long" ? 40 : 3) / 2;
         Clock::now() < end;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      progress().tick();
    }
  } else if (kind == "throw") {
    throw std::runtime_error("device lost");
  }
}

class Job {
 public:
  Job(std::string fault, bool culprit) : fault_(std::move(fault)), culprit_(culprit) {}

  void at(const char* point) const {
    const std::size_t cut = fault_.find('@');
    if (culprit_ && cut != std::string::npos && fault_.substr(cut + 1) == point) {
      go_wrong(fault_.substr(0, cut));
    }
  }

  bool differs(const char* what) const { return culprit_ && fault_ == what; }

  void train(Communicator& world) const {
    const distributed::Setting settings[] = {
        {"config", differs("config") ? "width 128" : "width 96"},
        {"seed", differs("seed") ? "8" : "7"},
        {"length of the data", differs("data") ? "999" : "1000"}};
    require_same(world, settings, "the start of the run");
    ToyModel model(differs("list") ? 1 : 0);
    if (fault_ == "shape") {
      model.add("last", culprit_ ? 5 : 4);
    }
    ReducerOptions options{{512, 2048}};
    if (differs("setting")) {
      options.buckets.bucket_bytes = 4096;
    }
    Reducer reducer(world, model.parameters, options);
    Tape tape;
    for (int step = 0; step < kSteps; ++step) {
      const bool now = step == kFaultyStep;
      if (now && differs("skip")) {
        continue;
      }
      if (now && differs("frozen")) {
        model.parameters[4]->set_trainable(false);
      }
      if (now && differs("order")) {
        world.barrier({"something else"}).wait();
      }
      progress().begin_step(step + 1);
      train_step(model, reducer, tape, now);
    }
    payload(world);
  }

 private:
  void train_step(ToyModel& model, Reducer& reducer, Tape& tape, bool now) const {
    model.zero();
    const Tape::Scope scope(tape);
    Variable loss;
    {
      const PhaseScope phase(Phase::forward);
      loss = model.loss(toy_data(static_cast<std::uint64_t>(reducer.steps())), 7, true);
      if (now) {
        at("forward");
      }
    }
    if (now) {
      ToyHook::call = [this](std::string_view op, bool backward) {
        if (op == "toy_tanh") {
          at(backward ? "backward" : "replay");
        }
      };
    }
    reducer.backward(loss);
    ToyHook::call = nullptr;
    if (now) {
      {
        const PhaseScope phase(Phase::optimizer);
        at("optimizer");
      }
      const PhaseScope phase(Phase::saving);
      at("save");
    }
  }

  void payload(Communicator& world) const {
    if (differs("leave")) {
      return;
    }
    const Tensor data = Tensor::zeros({differs("count") ? 500'000 : 1'000'000},
                                      differs("dtype") ? DType::i32 : DType::f32);
    world.all_reduce(data, differs("reduction") ? Reduce::max : Reduce::sum, {"payload"}).wait();
  }

  const std::string fault_;
  const bool culprit_;
};

int work(const train::World& place, const std::string& fault, bool culprit) {
  const Job job(fault, culprit);
  job.at("start");
  distributed::ConnectOptions options;
  options.limit = place.watchdog.value_or(kLimit);
  options.start_limit = std::chrono::seconds(fault.ends_with("@start") ? 5 : 60);
  if (job.differs("version")) {
    options.version = "Reprise 9.9.9";
  }
  auto world = train::connect(place, options);
  if (!world.ok()) {
    std::fprintf(stderr, "%s\n", std::string(world.status().message()).c_str());
    return 1;
  }
  std::printf("rank %d of %d, %d threads\n", (*world)->rank(), (*world)->size(), threads());
  std::fflush(stdout);
  if (fault == "throw-through") {
    const std::unique_ptr<Communicator> communicator = *std::move(world);
    if (culprit) {
      throw std::runtime_error("device lost");
    }
    communicator->close();
    return 0;
  }
  const absl::Status done = train::run_rank(*std::move(world), [&](Communicator& communicator) {
    job.train(communicator);
    job.at("end");
    return job.differs("status") ? absl::InternalError("the disk is full") : absl::OkStatus();
  });
  return done.ok() ? 0 : 1;
}

int run(int argc, char** argv) {
  absl::StatusOr<train::Launch> launch = train::plan_launch(argc, argv);
  if (!launch.ok()) {
    std::fprintf(stderr, "%s\n", std::string(launch.status().message()).c_str());
    return 2;
  }
  if (launch->ranks > 1) {
    const absl::StatusOr<int> code = train::supervise(*launch);
    if (!code.ok()) {
      std::fprintf(stderr, "%s\n", std::string(code.status().message()).c_str());
    }
    return code.value_or(1);
  }
  set_threads(launch->world.threads);
  try {
    return work(launch->world, launch->arguments.at(0),
                launch->world.rank == std::stoi(launch->arguments.at(1)));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rank %d ends: %s\n", launch->world.rank, e.what());
    return 1;
  }
}

}  // namespace
}  // namespace reprise::testing

int main(int argc, char** argv) {
  return reprise::testing::run(argc, argv);
}

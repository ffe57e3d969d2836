// A small training job in which one rank goes wrong: mpi_faulty FAULT CULPRIT [anything].
// With --ranks N it starts itself.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include <unistd.h>

#include "core/parallel.h"
#include "distributed/reducer.h"
#include "tests/distributed/mpi/toy_model.h"
#include "train/launch.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::Reduce;
using distributed::Reducer;
using distributed::ReducerOptions;

constexpr int kSteps = 4, kFaultyStep = 2;

void fault_before_step(const std::string& fault, Communicator& world) {
  if (fault == "stop") {
    raise(SIGSTOP);
  } else if (fault == "kill") {
    raise(SIGKILL);
  } else if (fault == "exit0") {
    _exit(0);
  } else if (fault == "exit3") {
    _exit(3);
  } else if (fault == "silent") {
    while (true) {
      pause();
    }
  } else if (fault == "throw-outside") {
    throw std::runtime_error("the data loader gave up");
  } else if (fault == "order") {
    world.barrier({"something else"}).wait();
  } else if (fault == "throw-in-backward" || fault == "throw-in-replay") {
    ToyHook::call = [replay = fault == "throw-in-replay"](std::string_view op, bool backward) {
      if (op == "toy_tanh" && backward != replay) {
        throw std::runtime_error("device lost");
      }
    };
  }
}

void payload_fault(const std::string& fault, bool culprit, Communicator& world) {
  const Tensor data =
      Tensor::zeros({culprit && fault == "count" ? std::int64_t{500'000} : std::int64_t{1'000'000}},
                    culprit && fault == "dtype" ? DType::i32 : DType::f32);
  const Reduce reduce = culprit && fault == "reduction" ? Reduce::max : Reduce::sum;
  world.all_reduce(data, reduce, {"payload"}).wait();
}

void train(const std::string& fault, bool culprit, Communicator& world) {
  ToyModel model(culprit && fault == "list" ? 1 : 0);
  if (fault == "shape") {
    model.add("last", culprit ? 5 : 4);
  }
  ReducerOptions options{{512, 2048}};
  if (culprit && fault == "setting") {
    options.buckets.bucket_bytes = 4096;
  }
  Reducer reducer(world, model.parameters, options);
  Tape tape;
  for (int step = 0; step < kSteps; ++step) {
    const bool now = culprit && step == kFaultyStep;
    if (now && fault == "skip") {
      continue;
    }
    if (now && fault == "frozen") {
      model.parameters[4]->set_trainable(false);
    }
    model.zero();
    const Tape::Scope scope(tape);
    const Variable loss = model.loss(toy_data(static_cast<std::uint64_t>(step)), 7, true);
    if (now) {
      fault_before_step(fault, world);
    }
    reducer.backward(loss);
  }
  if (fault == "leave" && culprit) {
    return;
  }
  payload_fault(fault, culprit, world);
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
  const std::string fault = launch->arguments.at(0);
  const bool culprit = launch->world.rank == std::stoi(launch->arguments.at(1));
  try {
    auto world = train::connect(launch->world, std::chrono::seconds(3));
    if (!world.ok()) {
      std::fprintf(stderr, "%s\n", std::string(world.status().message()).c_str());
      return 1;
    }
    const std::unique_ptr<Communicator> communicator = *std::move(world);
    std::printf("rank %d of %d, %d threads\n", communicator->rank(), communicator->size(),
                threads());
    std::fflush(stdout);
    train(fault, culprit, *communicator);
    communicator->close();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rank %d ends: %s\n", launch->world.rank, e.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace reprise::testing

int main(int argc, char** argv) {
  return reprise::testing::run(argc, argv);
}

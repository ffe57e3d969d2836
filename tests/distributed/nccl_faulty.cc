// Ranks over NCCL's stand-in for processes, one of which goes wrong: nccl_faulty RANKS FAULT
// CULPRIT [anything]. A fault is none, kill, stop, exit0, silent, throw, count or version. This
// process forks the ranks and waits for them; its exit code is 0 when all of theirs are, else the
// first that is not 0 of a rank other than the culprit.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/parallel.h"
#include "core/progress.h"
#include "distributed/comm_nccl.h"
#include "tests/distributed/nccl_processes.h"
#include "train/launch.h"

namespace reprise::testing {
namespace {

using namespace distributed;

void go_wrong(const std::string& fault) {
  if (fault == "kill") {
    raise(SIGKILL);
  } else if (fault == "stop") {
    raise(SIGSTOP);
  } else if (fault == "exit0") {
    _exit(0);
  } else if (fault == "throw") {
    throw std::runtime_error("device lost");
  }
  while (fault == "silent") {
    pause();
  }
}

absl::Status steps(Communicator& world, const std::string& fault) {
  for (int step = 0; step < 4; ++step) {
    progress().begin_step(step + 1);
    const PhaseScope phase(Phase::forward);
    if (step == 2) {
      go_wrong(fault);
    }
    const Tensor data = Tensor::zeros({fault == "count" && step == 2 ? 50 : 100}, DType::f32);
    world.all_reduce(data, Reduce::sum, {"gradients", step}).wait();
  }
  return absl::OkStatus();
}

int run_rank(NcclMeetingPlace& place, const std::string& folder, int rank, int size,
             const std::string& fault) {
  set_threads(1);
  NcclOptions options{.rank = rank, .size = size};
  options.limit = std::chrono::seconds(3);
  options.start_limit = std::chrono::seconds(60);
  options.gather = gather_over_folder(folder, rank, size, options.start_limit);
  options.watchdog.version = fault == "version" ? "Reprise 9.9.9" : library_version();
  options.watchdog.reap_parent = false;
  auto world = connect_nccl(options, share_over_folder(folder, rank, size, options.start_limit),
                            std::make_unique<NcclForProcesses>(place));
  if (!world.ok()) {
    std::fprintf(stderr, "%s\n", std::string(world.status().message()).c_str());
    return 1;
  }
  return train::run_rank(*std::move(world), [&](Communicator& c) { return steps(c, fault); }).ok()
             ? 0
             : 1;
}

int run(int size, const std::string& fault, int culprit) {
  std::string folder = std::filesystem::temp_directory_path() / "nccl-faulty-XXXXXX";
  NcclMeetingPlace* place = NcclMeetingPlace::map();
  if (place == nullptr || mkdtemp(folder.data()) == nullptr) {
    return 2;
  }
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      std::exit(run_rank(*place, folder, rank, size, rank == culprit ? fault : "none"));
    }
  }
  int code = 0;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    waitpid(ranks[static_cast<std::size_t>(rank)], &status, 0);
    const int its = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    code = code == 0 && rank != culprit ? its : code;
  }
  std::filesystem::remove_all(folder);
  return code;
}

}  // namespace
}  // namespace reprise::testing

int main(int argc, char** argv) {
  return argc < 4 ? 2 : reprise::testing::run(std::atoi(argv[1]), argv[2], std::atoi(argv[3]));
}

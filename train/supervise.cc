// The processes beside the ranks: the one that starts mpirun and waits, and each rank's parent.
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "distributed/processes.h"
#include "distributed/run_folder.h"
#include "train/guard.h"
#include "train/launch.h"

namespace reprise::train {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void become_mpirun(const std::string& mpirun, const std::string& self,
                                const Launch& launch, const std::string& run_folder,
                                const sigset_t& mask, pid_t parent) {
  // mpirun ends its job when it gets TERM, so that the job ends when the supervisor is killed.
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) {
    _exit(1);
  }
  sigprocmask(SIG_SETMASK, &mask, nullptr);
  if (!run_folder.empty()) {
    setenv("REPRISE_RUN_DIR", run_folder.c_str(), 1);
    const std::string us =
        fmt::format("{}:{}:{}", parent, distributed::start_time(parent), getpid());
    setenv("REPRISE_GUARD", us.c_str(), 1);
  }
  if (launch.world.watchdog) {
    const std::string text =
        fmt::format("{}", std::chrono::duration<double>(*launch.world.watchdog).count());
    setenv("REPRISE_WATCHDOG", text.c_str(), 1);
  }
  setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 1);
  setenv("OMPI_MCA_hwloc_base_binding_policy", "none", 1);
  setenv("OMPI_MCA_orte_execute_quiet", "1", 1);  // ranks say what is wrong, without a banner
  if (geteuid() == 0) {
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
  }
  std::vector<std::string> arguments{"-n", std::to_string(launch.ranks), "--bind-to", "none", self};
  arguments.insert(arguments.end(), launch.arguments.begin(), launch.arguments.end());
  distributed::become(mpirun, std::move(arguments));
}

// Processes whose parent is this one; those of a dead mpirun are adopted.
std::vector<pid_t> children() {
  std::vector<pid_t> result;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    const std::string name = entry.path().filename().string();
    pid_t pid = 0;
    const auto [end, bad] = std::from_chars(name.data(), name.data() + name.size(), pid);
    if (bad == std::errc() && end == name.data() + name.size() &&
        distributed::parent_of(pid) == getpid()) {
      result.push_back(pid);
    }
  }
  return result;
}

class Supervisor {
 public:
  explicit Supervisor(pid_t mpirun) : mpirun_(mpirun) {}

  int run(const sigset_t& signals) {
    while (true) {
      const bool left = reap();
      if (!left) {
        return exit_code();
      }
      const Clock::time_point now = Clock::now();
      if (kill_mpirun_at_ && !status_ && now > *kill_mpirun_at_) {
        kill(mpirun_, SIGKILL);
      }
      if (status_ && now > *kill_rest_at_) {
        for (const pid_t pid : children()) {
          kill(pid, SIGKILL);
        }
      }
      const timespec wait{0, 100'000'000};
      const int signal = sigtimedwait(&signals, nullptr, &wait);
      if (signal == SIGINT || signal == SIGTERM) {
        signal_ = signal;
        if (!status_) {
          kill(mpirun_, SIGTERM);
        }
        if (!kill_mpirun_at_) {
          kill_mpirun_at_ = Clock::now() + std::chrono::seconds(5);
        }
      }
    }
  }

 private:
  // Returns whether children are left.
  bool reap() {
    while (true) {
      int status = 0;
      const pid_t pid = waitpid(-1, &status, WNOHANG);
      if (pid < 0) {
        return false;
      }
      if (pid == 0) {
        return true;
      }
      if (pid == mpirun_) {
        status_ = status;
        kill_rest_at_ = Clock::now() + std::chrono::milliseconds(1500);
      }
    }
  }

  int exit_code() const {
    if (signal_ != 0) {
      return 128 + signal_;
    }
    const int status = status_.value_or(1);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  }

  const pid_t mpirun_;
  int signal_ = 0;
  std::optional<int> status_;
  std::optional<Clock::time_point> kill_mpirun_at_, kill_rest_at_;
};

}  // namespace

absl::StatusOr<int> supervise(const Launch& launch) {
  std::error_code error;
  const std::string self = std::filesystem::read_symlink("/proc/self/exe", error).string();
  if (error) {
    return absl::ErrnoToStatus(error.value(), "/proc/self/exe");
  }
  if (launch.guarded_by) {
    return guard_rank(self, launch.arguments, launch.world.rank, launch.world.size,
                      *launch.guarded_by);
  }
  absl::StatusOr<std::string> mpirun = find_mpirun();
  if (!mpirun.ok()) {
    return mpirun.status();
  }
  const distributed::RunFolder folder;
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  sigset_t signals, before;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) {
    sigaddset(&signals, signal);
  }
  sigprocmask(SIG_BLOCK, &signals, &before);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    become_mpirun(*mpirun, self, launch, folder.path(), before, parent);
  }
  if (pid < 0) {
    const int code = errno;
    sigprocmask(SIG_SETMASK, &before, nullptr);
    return absl::ErrnoToStatus(code, "fork");
  }
  const int result = Supervisor(pid).run(signals);
  sigprocmask(SIG_SETMASK, &before, nullptr);
  if (result == 128 + SIGINT || result == 128 + SIGTERM || folder.path().empty()) {
    return result;
  }
  const distributed::Outcome outcome = distributed::explain_run(folder.path(), launch.ranks);
  // What a rank printed may be lost in the pipes of an mpirun that was stopped and had to be
  // killed.
  const std::string& text =
      outcome.text.empty() && result == 128 + SIGKILL ? outcome.verdict : outcome.text;
  if (!text.empty()) {
    std::fprintf(stderr, "reprise: %s\n", text.c_str());
  }
  // A launcher's own code is that of one rank or another; MPICH's takes a rank that left with 0 for
  // the end of the job.
  return outcome.code.value_or(result == 0 && !outcome.finished ? 1 : result);
}

}  // namespace reprise::train

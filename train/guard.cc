#include "train/guard.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "distributed/processes.h"
#include "distributed/run_folder.h"

namespace reprise::train {
namespace {

using Clock = std::chrono::steady_clock;
using distributed::ProcessHandle;
using distributed::RunFile;

// For the others to see the end, to say who it was and to end themselves.
constexpr std::chrono::milliseconds kLastWords(3000);
// For the launcher, once whoever started it is gone.
constexpr std::chrono::milliseconds kLauncherPatience(2000);
// Beyond the watchdog's limit, for the other ranks to speak first.
constexpr std::chrono::milliseconds kOthersFirst(5000);
constexpr std::chrono::milliseconds kBetweenLooks(500);
// Time in which this process did not run itself is not held against its rank.
constexpr std::chrono::milliseconds kLongestTurn(1000);

class Guard {
 public:
  Guard(int rank, int ranks, const Guarded& by)
      : rank_(rank),
        ranks_(ranks),
        folder_(by.folder),
        launcher_(by.launcher),
        mpirun_(by.mpirun),
        parent_(getppid()),
        limit_(by.limit) {
    // Another process may have its number by now.
    launcher_gone_ = distributed::start_time(by.launcher) != by.started;
    for (const int signal : {SIGTERM, SIGINT, SIGCHLD}) {
      sigaddset(&signals_, signal);
    }
    sigprocmask(SIG_BLOCK, &signals_, &before_);
  }

  int run(const std::string& program, const std::vector<std::string>& arguments) {
    const pid_t self = getpid();
    child_ = fork();
    if (child_ == 0) {
      become_rank(program, arguments, self);
    }
    if (child_ < 0) {
      std::fprintf(stderr, "reprise: fork: %s\n", std::strerror(errno));
      return 1;
    }
    while (!reap()) {
      turn();
    }
    while (take_signal(0)) {
    }
    distributed::write_end(folder_, {rank_, child_, status_, signalled_ ? 1 : 0, 0});
    const Clock::time_point end = Clock::now() + kLastWords;
    while (Clock::now() < end && others_may_speak()) {
      turn();
    }
    return WIFSIGNALED(status_) ? 128 + WTERMSIG(status_) : WEXITSTATUS(status_);
  }

 private:
  [[noreturn]] void become_rank(const std::string& program,
                                const std::vector<std::string>& arguments, pid_t parent) const {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
      _exit(1);
    }
    sigprocmask(SIG_SETMASK, &before_, nullptr);
    setenv("REPRISE_GUARD", "rank", 1);
    distributed::become(program, arguments);
  }

  bool reap() {
    ended_ = waitpid(child_, &status_, WNOHANG) == child_;
    return ended_;
  }

  // Whether there was one.
  bool take_signal(long wait_ns) {
    const timespec wait{0, wait_ns};
    const int signal = sigtimedwait(&signals_, nullptr, &wait);
    if (signal == SIGTERM || signal == SIGINT) {
      signalled_ = true;
      send(signal);
    }
    return signal > 0;
  }

  void turn() {
    take_signal(20'000'000);
    pollfd one{launcher_.descriptor(), POLLIN, 0};
    launcher_gone_ = launcher_gone_ || (launcher_.valid() && poll(&one, 1, 0) == 1);
    if (launcher_gone_ && !signalled_) {
      signalled_ = true;
      // MPICH's mpirun starts ranks through another process.
      distributed::leave_reaper(mpirun_, kLauncherPatience);
      distributed::leave_reaper(parent_, kLauncherPatience);
      send(SIGKILL);
    }
    look_at_rank();
  }

  void look_at_rank() {
    const Clock::time_point now = Clock::now();
    if (now - looked_at_ < kBetweenLooks) {
      return;
    }
    const auto turn = std::min<Clock::duration>(now - looked_at_, kLongestTurn);
    looked_at_ = now;
    if (ended_ || distributed::process_state(child_) != 'T') {
      stopped_ = {};
      return;
    }
    stopped_ += turn;
    if (stopped_ > limit_ + kOthersFirst && !given_up_) {
      given_up_ = true;
      std::fprintf(
          stderr,
          "reprise: rank %d (pid %d) is stopped (state T), and so is every rank that could "
          "end the job\n",
          rank_, static_cast<int>(child_));
      send(SIGKILL);
    }
  }

  void send(int signal) const {
    if (!ended_) {  // its number is still its own
      kill(child_, signal);
    }
  }

  // Of a rank that was connected and is gone.
  bool others_may_speak() const {
    if (signalled_ || launcher_gone_) {
      return false;
    }
    const auto mine = distributed::read_run_file(folder_, rank_);
    if (!mine || mine->end == RunFile::End::starting || mine->end == RunFile::End::refused ||
        (mine->end == RunFile::End::finished && status_ == 0)) {
      return false;
    }
    for (int r = 0; r < ranks_; ++r) {
      if (r != rank_ && !distributed::read_end(folder_, r)) {
        return true;
      }
    }
    return false;
  }

  const int rank_, ranks_;
  const std::string folder_;
  const ProcessHandle launcher_, mpirun_, parent_;
  const std::chrono::milliseconds limit_;
  bool launcher_gone_ = false, signalled_ = false, ended_ = false, given_up_ = false;
  Clock::time_point looked_at_ = Clock::now();
  Clock::duration stopped_{};
  sigset_t signals_{}, before_{};
  pid_t child_ = -1;
  int status_ = 0;
};

}  // namespace

int guard_rank(const std::string& program, const std::vector<std::string>& arguments, int rank,
               int ranks, const Guarded& by) {
  return Guard(rank, ranks, by).run(program, arguments);
}

}  // namespace reprise::train

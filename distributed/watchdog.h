// The watchdog of a rank: a thread that tells the others how far this rank is and hears how far
// they are (distributed/control.h). When a rank is gone, does not answer, makes no progress or has
// failed, the job ends within seconds, with one message that names it and the last state of all
// (docs/distributed.md). A slow rank is warned of, never ended.
//
//   auto watchdog = Watchdog::start(rank, size, options, gather);      // on all ranks
//   ...
//   watchdog->launched();                                   // asked for, from any thread
//   watchdog->join("all_reduce of ...", bytes);             // the comm thread takes it up
//   watchdog->moved();                                      // a part of it is through
//   watchdog->complete();
//   ...
//   watchdog->goodbye();                                    // after the engine's own end
//
// It needs nothing of MPI or NCCL but a way to hand everybody's card to everybody, once.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <absl/status/statusor.h>

#include "distributed/control.h"
#include "distributed/judge.h"
#include "distributed/processes.h"
#include "distributed/run_folder.h"

namespace reprise::distributed {

inline constexpr int kEndedByWatchdog = 86;  // exit code

struct WatchdogOptions {
  Judge::Limits limits;
  std::chrono::milliseconds start_limit = std::chrono::seconds(120);  // to connect
  std::string version;                                                // must be equal on all ranks
  // Takes SIGTERM and SIGINT where they have no handler: a launcher that cleans up after another
  // rank sends them, and that rank is to be named.
  bool signals = true;
  // Kill the parent process (a launcher, which may wait for a machine that does not answer) when it
  // has not ended some seconds after the verdict.
  bool reap_parent = true;
  // Called once, on the watchdog's thread, with the verdict's text; then the process ends with
  // kEndedByWatchdog. For NCCL: mark its communicator as aborted.
  std::function<void(const std::string& why)> on_verdict;
  // In place of the end of the process and of its neighbours; for tests.
  std::function<void(const std::string& why)> end;
  const Progress* progress = nullptr;  // null: the process's
  std::string run_folder;              // of run_folder.h; empty: none
};

// result = mine of rank 0, of rank 1, ...; throws CommunicatorError.
using GatherBytes = std::function<std::string(std::string_view mine)>;

class Watchdog {
 public:
  // Before there are threads: the watchdog takes SIGTERM and SIGINT from then on, where they have
  // no handler. Returns the mask to restore after goodbye().
  static sigset_t block_signals();
  // A collective. Internal when a rank cannot be reached; FailedPrecondition, on all ranks, when
  // versions differ. Throws what `gather` throws.
  static absl::StatusOr<std::unique_ptr<Watchdog>> start(int rank, int size,
                                                         WatchdogOptions options,
                                                         const GatherBytes& gather);
  // Without goodbye() the others take this rank for dead.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;

  // From any thread.
  void launched();
  void join(std::string_view what, std::int64_t bytes);
  void moved();
  void complete();
  // Tell the others now what progress() says, not with the next beat.
  void publish();

  // This rank cannot go on. Returns at once; the job ends within two seconds.
  void fail(Failure failure, const std::string& why);
  // The same; this process ends with it.
  [[noreturn]] void fail_and_end(Failure failure, const std::string& why);
  // Empty, or the verdict.
  std::string verdict() const;

  // After the last collective. Rank 0 waits for all others, who may still fail.
  void goodbye();

 private:
  struct Neighbour {
    int rank = -1;
    ProcessHandle process;
  };
  Watchdog(int rank, int size, WatchdogOptions options);
  void run();
  void handle(const ControlPlane::Event& event, Clock::time_point now);
  void judge(Clock::time_point now);
  void take_signal();
  void end_by_signal(Clock::time_point now);
  void execute(const std::string& why, bool issuer);
  void kill(const Neighbour& neighbour) const;
  [[noreturn]] void end_process();
  RankState compose() const;
  Message message(Message::Kind kind) const;
  void tell() const;
  void wake() const;

  const int rank_, size_;
  const WatchdogOptions options_;
  const Progress& progress_;
  std::unique_ptr<ControlPlane> plane_;
  std::vector<Neighbour> neighbours_;  // on this machine
  std::vector<pid_t> pids_;            // 0: on another machine
  ProcessHandle parent_;
  int wake_ = -1, signals_ = -1;
  std::unique_ptr<RunFile> run_file_;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  RankState mine_;
  Judge judge_;
  std::string verdict_;
  bool said_goodbye_ = false, everybody_left_ = false, stopping_ = false, over_ = false;
  bool ending_ = false;  // a thread waits for the end of the process
  bool publish_later_ = false;
  Clock::time_point published_at_;

  std::optional<Clock::time_point> signalled_at_;  // the thread's own
  int signal_ = 0;
  std::thread thread_;
};

}  // namespace reprise::distributed

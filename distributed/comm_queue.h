// The communication thread of a process: jobs run on it one after the other, in order. After the
// first that fails every later one fails with the same error, unrun.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "distributed/communicator.h"

namespace reprise::distributed {

class CommQueue {
 public:
  CommQueue();
  // Ends the thread after the jobs that are queued; leaves it behind when a job does not return
  // within `patience` (it holds what it needs).
  ~CommQueue();
  CommQueue(const CommQueue&) = delete;

  // A job throws to fail. `always`: it runs after a failure too. What it captured is released
  // before the handle is done.
  Pending push(std::function<void()> job, bool always = false);
  // Waits so long for the thread to end; false when it has not.
  bool finish(std::chrono::milliseconds patience);
  std::string error() const;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::thread thread_;
};

}  // namespace reprise::distributed

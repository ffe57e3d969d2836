#include "distributed/comm_queue.h"

#include <condition_variable>
#include <utility>

namespace reprise::distributed {

struct CommQueue::Shared {
  struct Job {
    std::function<void()> run;
    bool always;
    std::shared_ptr<Pending::State> state;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Job> jobs;
  bool stopping = false;
  bool ended = false;
  std::string error;

  void work() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return stopping || !jobs.empty(); });
      if (jobs.empty()) {
        break;
      }
      Job job = std::move(jobs.front());
      jobs.pop_front();
      std::string failed = job.always ? std::string() : error;
      lock.unlock();
      const Clock::time_point started = Clock::now();
      if (failed.empty()) {
        try {
          job.run();
        } catch (const std::exception& e) {
          failed = e.what();
        }
      }
      // The caller may count references to its tensors once the handle is done.
      job.run = nullptr;
      lock.lock();
      if (error.empty()) {
        error = failed;
      }
      {
        const std::lock_guard done(job.state->mutex);
        job.state->started = started;
        job.state->finished = Clock::now();
        job.state->error = std::move(failed);
        job.state->done = true;
      }
      job.state->changed.notify_all();
    }
    ended = true;
    changed.notify_all();
  }
};

CommQueue::CommQueue() : shared_(std::make_shared<Shared>()) {
  thread_ = std::thread([shared = shared_] { shared->work(); });
}

CommQueue::~CommQueue() {
  if (thread_.joinable()) {
    finish(std::chrono::seconds(3));
  }
}

Pending CommQueue::push(std::function<void()> job, bool always) {
  auto state = std::make_shared<Pending::State>();
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->jobs.push_back({std::move(job), always, state});
  }
  shared_->changed.notify_all();
  return Pending(std::move(state));
}

bool CommQueue::finish(std::chrono::milliseconds patience) {
  if (!thread_.joinable()) {
    return true;
  }
  bool ended = false;
  {
    std::unique_lock lock(shared_->mutex);
    shared_->stopping = true;
    shared_->changed.notify_all();
    ended = shared_->changed.wait_for(lock, patience, [&] { return shared_->ended; });
  }
  if (ended) {
    thread_.join();
  } else {
    thread_.detach();
  }
  return ended;
}

std::string CommQueue::error() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->error;
}

}  // namespace reprise::distributed

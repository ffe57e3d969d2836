// Spins a little, then sleeps: a waiting thread must not take the core from the computing one.
#pragma once

#include <sched.h>
#include <time.h>

#include "distributed/communicator.h"

namespace reprise::distributed {

class Backoff {
 public:
  void pause() {
    if (++tests_ <= 20) {
      sched_yield();
      return;
    }
    const bool long_wait = Clock::now() - start_ > std::chrono::milliseconds(10);
    const timespec time{0, long_wait ? 500'000 : 50'000};
    nanosleep(&time, nullptr);
  }

 private:
  int tests_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace reprise::distributed

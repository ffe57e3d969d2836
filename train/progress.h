// The progress line of a run: step, loss, tokens/s, memory now and peak, time left.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace reprise::train {

// "1.5 GiB", "12.0 MiB", "340 B".
std::string human_bytes(std::int64_t bytes);
// "1:05", "2:03:07".
std::string human_seconds(double seconds);
// VmHWM and VmRSS of this process, from /proc/self/status; 0 where there is none.
std::int64_t peak_resident_bytes();
std::int64_t resident_bytes();

class Progress {
 public:
  // To standard error: one line that is rewritten on a terminal, else a line every ten seconds.
  explicit Progress(bool quiet = false);
  struct State {
    std::int64_t step = 0;
    double loss = 0;
    std::int64_t tokens = 0;  // trained since the start
    double fraction = 0;      // of the whole run that is done, for the time left
  };
  void show(const State& state, bool last = false);

 private:
  bool quiet_, terminal_;
  std::chrono::steady_clock::time_point start_, shown_;
};

}  // namespace reprise::train

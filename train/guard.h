// A process beside each rank that --ranks starts: its parent. It sees how the rank ends before the
// launcher does, notes it in the run folder (distributed/run_folder.h), and leaves the other ranks
// a moment to say who it was: some launchers kill all ranks as soon as one of them is gone. It
// ends the rank when whoever started the job is gone, and when the rank has been stopped (state T)
// for longer than any other rank would let it: then none is left that could judge.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include <sys/types.h>

namespace reprise::train {

// By whom this process was started (the environment's REPRISE_GUARD and REPRISE_RUN_DIR).
struct Guarded {
  std::string folder;
  pid_t launcher = 0;                                          // the process of --ranks,
  unsigned long long started = 0;                              // its distributed::start_time,
  pid_t mpirun = 0;                                            // and what it runs
  std::chrono::milliseconds limit = std::chrono::seconds(30);  // the watchdog's
};

// Runs `program` with `arguments` as the rank's process and waits for its end; returns its exit
// code, or 128 + its signal. Call it before any thread exists.
int guard_rank(const std::string& program, const std::vector<std::string>& arguments, int rank,
               int ranks, const Guarded& by);

}  // namespace reprise::train

// A process beside each rank that --ranks starts: its parent. It sees how the rank ends before the
// launcher does, notes it in the run folder (distributed/run_folder.h), and leaves the other ranks
// a moment to say who it was: some launchers kill all ranks as soon as one of them is gone. And it
// ends the rank when whoever started the job is gone.
#pragma once

#include <string>
#include <vector>

#include <sys/types.h>

namespace reprise::train {

// By whom this process was started (the environment's REPRISE_GUARD and REPRISE_RUN_DIR).
struct Guarded {
  std::string folder;
  pid_t launcher = 0;              // the process of --ranks,
  unsigned long long started = 0;  // its distributed::start_time,
  pid_t mpirun = 0;                // and what it runs
};

// Runs `program` with `arguments` as the rank's process and waits for its end; returns its exit
// code, or 128 + its signal. Call it before any thread exists.
int guard_rank(const std::string& program, const std::vector<std::string>& arguments, int rank,
               int ranks, const Guarded& by);

}  // namespace reprise::train

// Ranks: which one this process is, and starting several.
//
//   absl::StatusOr<Launch> launch = plan_launch(argc, argv);       // takes `--ranks N` out
//   if (launch->only_watches()) return supervise(*launch);          // no work in this process
//   absl::StatusOr<std::unique_ptr<distributed::Communicator>> communicator =
//   connect(launch->world);
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "distributed/communicator.h"
#include "train/guard.h"

namespace reprise::train {

// A variable of the environment, or null.
using Environment = std::function<const char*(const char* name)>;

struct World {
  int rank = 0, size = 1;
  int local_rank = 0, local_size = 1;  // on this machine
  std::string launcher;                // "Open MPI", "PMIx", "PMI", "Slurm"; empty: none
  int threads = 1;                     // compute threads a rank: its share of the cores, at least 1
  std::optional<std::chrono::milliseconds> watchdog;  // REPRISE_WATCHDOG, in seconds
};

// As the launcher's variables say: Open MPI's, PMIx's, PMI's, Slurm's (which a batch script has
// too: only with more than one task). None: one rank. InvalidArgument when one is not a number or
// they do not fit together.
absl::StatusOr<World> find_world(const Environment& environment);
absl::StatusOr<World> find_world();  // of this process

struct Launch {
  World world;
  int ranks = 0;                       // asked for by --ranks; 0 and 1: no others to start
  std::vector<std::string> arguments;  // as given, without the program and without --ranks

  // In a process that --ranks started to watch over one rank, which it is to start.
  std::optional<Guarded> guarded_by;

  bool only_watches() const { return ranks > 1 || guarded_by; }
};

// Takes `--ranks N` or `--ranks=N`, and `--watchdog SECONDS`, out of the arguments. InvalidArgument
// when N is not a number from 1 to 4096, or when this process is a rank of a launch already.
absl::StatusOr<Launch> plan_launch(std::vector<std::string> arguments,
                                   const Environment& environment);
absl::StatusOr<Launch> plan_launch(int argc, char** argv);

// The mpirun that belongs to the MPI of this program: as configured, else the one in PATH if its
// version says the same MPI. NotFound, FailedPrecondition.
absl::StatusOr<std::string> find_mpirun();

// Runs this program as `ranks` processes under mpirun, with launch.arguments, and waits for all of
// them; SIGINT and SIGTERM end them. Returns when nothing of the job is left, and says who failed
// when the ranks could not. The exit code: 0 only when every rank finished; that of the first rank
// to end in another way (128 + n for signal n, 1 for 0); that of the watchdog when a verdict ended
// the job; 128 + n for signal n to this process. In a process between mpirun and a rank, runs that
// rank. Call it before any thread exists.
absl::StatusOr<int> supervise(const Launch& launch);

// The communicator of this process; a world of one starts no MPI. A rank of several ends with its
// launcher from then on. expected_size and run_folder are filled in here.
absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect(
    const World& world, distributed::ConnectOptions options);
// With the watchdog's limit as given here, else as in the world, else the default.
absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect(
    const World& world, std::optional<std::chrono::milliseconds> limit = std::nullopt);

// The communicator for tensors on `device`: connect() for the CPU, else NCCL with the same
// watchdog. Its identifier and the ranks' addresses travel over the folder that REPRISE_RENDEZVOUS
// names, else over MPI, which has ended when this returns. FailedPrecondition, before anything is
// started, when this build has no NCCL or there is no such device.
absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect_on(
    Device device, const World& world, distributed::ConnectOptions options = {});

// Work of one rank: body(communicator), then the end of the communicator. When it throws or returns
// an error, the job ends (Communicator::abort); alone, that goes on to the caller.
absl::Status run_rank(std::unique_ptr<distributed::Communicator> communicator,
                      const std::function<absl::Status(distributed::Communicator&)>& body);

}  // namespace reprise::train

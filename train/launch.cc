#include "train/launch.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <utility>

#include <fmt/format.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <unistd.h>

#include "distributed/comm_nccl.h"

namespace reprise::train {
namespace {

std::optional<int> number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    return std::nullopt;
  }
  return value;
}

int cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) {
    return 1;
  }
  return std::max(1, CPU_COUNT(&set));
}

struct Source {
  const char *launcher, *rank, *size, *local_rank, *local_size;
};
// PMIX_RANK comes without a size: Open MPI's variables have it, srun --mpi=pmix sets Slurm's.
constexpr std::array<Source, 4> kSources{{
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"PMIx", "PMIX_RANK", "SLURM_NTASKS", "SLURM_LOCALID", nullptr},
    {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    {"Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", nullptr},
}};

absl::Status read(const Environment& environment, const char* name, int& value) {
  const char* text = name == nullptr ? nullptr : environment(name);
  if (text == nullptr) {
    return absl::OkStatus();
  }
  const std::optional<int> parsed = number(text);
  if (!parsed) {
    return absl::InvalidArgumentError(
        fmt::format("environment variable {} must be a number, got \"{}\"", name, text));
  }
  value = *parsed;
  return absl::OkStatus();
}

// Seconds, above 0.
absl::StatusOr<std::chrono::milliseconds> seconds(const char* name, std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= 0.1) ||
      !(value <= 1e6)) {
    return absl::InvalidArgumentError(
        fmt::format("{} must be a number of seconds from 0.1 to 1000000, got \"{}\"", name, text));
  }
  return std::chrono::milliseconds(static_cast<std::int64_t>(value * 1000));
}

// Output of a command that ends soon.
std::string output_of(const std::string& path, const char* argument) {
  const std::string command = "'" + path + "' " + argument + " 2>&1";
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    std::array<char, 256> line{};
    while (std::fgets(line.data(), line.size(), pipe) != nullptr) {
      text += line.data();
    }
    pclose(pipe);
  }
  return text;
}

std::string family(const std::string& text) {
  if (text.find("Open MPI") != std::string::npos || text.find("OpenRTE") != std::string::npos) {
    return "Open MPI";
  }
  if (text.find("MPICH") != std::string::npos || text.find("HYDRA") != std::string::npos) {
    return "MPICH";
  }
  return "another MPI";
}

}  // namespace

absl::StatusOr<World> find_world(const Environment& environment) {
  World world;
  int size = 0, local_rank = -1, local_size = 0;
  for (const Source& source : kSources) {
    if (environment(source.rank) == nullptr) {
      continue;
    }
    for (const auto& [name, value] :
         {std::pair(source.rank, &world.rank), std::pair(source.size, &size),
          std::pair(source.local_rank, &local_rank), std::pair(source.local_size, &local_size)}) {
      if (absl::Status status = read(environment, name, *value); !status.ok()) {
        return status;
      }
    }
    if (std::string_view(source.launcher) == "Slurm" && size <= 1) {
      world.rank = size = 0;  // a batch script
      continue;
    }
    if (size == 0) {
      // Going on as a world of one would start as many single worlds as there are ranks.
      return absl::InvalidArgumentError(
          fmt::format("{} is set without {}: the number of ranks is not known; start the program "
                      "with mpirun or srun, or with --ranks",
                      source.rank, source.size));
    }
    world.launcher = source.launcher;
    break;
  }
  world.size = std::max(1, size);
  world.local_rank = local_rank < 0 ? world.rank : local_rank;
  world.local_size = local_size > 0 ? local_size : world.size;
  if (world.rank >= world.size) {
    return absl::InvalidArgumentError(fmt::format("{}: rank must be below {} = ranks, got {}",
                                                  world.launcher, world.size, world.rank));
  }
  world.threads = std::max(1, cores() / world.local_size);
  if (const char* text = environment("REPRISE_WATCHDOG")) {
    const absl::StatusOr<std::chrono::milliseconds> limit =
        seconds("environment variable REPRISE_WATCHDOG", text);
    if (!limit.ok()) {
      return limit.status();
    }
    world.watchdog = *limit;
  }
  return world;
}

absl::StatusOr<World> find_world() {
  return find_world([](const char* name) { return std::getenv(name); });
}

absl::StatusOr<Launch> plan_launch(std::vector<std::string> arguments,
                                   const Environment& environment) {
  absl::StatusOr<World> world = find_world(environment);
  if (!world.ok()) {
    return world.status();
  }
  Launch launch{*world, 0, {}};
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string word = arguments[i];
    const std::string flag = word.substr(0, word.find('='));
    if (flag != "--ranks" && flag != "--watchdog") {
      launch.arguments.push_back(word);
      continue;
    }
    const std::string given = flag != word               ? word.substr(flag.size() + 1)
                              : i + 1 < arguments.size() ? arguments[++i]
                                                         : std::string();
    if (flag == "--watchdog") {
      const absl::StatusOr<std::chrono::milliseconds> limit = seconds("--watchdog", given);
      if (!limit.ok()) {
        return limit.status();
      }
      launch.world.watchdog = *limit;
      continue;
    }
    const std::optional<int> ranks = number(given);
    if (!ranks || *ranks < 1 || *ranks > 4096) {
      return absl::InvalidArgumentError(
          fmt::format("--ranks must be a number from 1 to 4096, got \"{}\"", given));
    }
    launch.ranks = *ranks;
  }
  const char* guard = environment("REPRISE_GUARD");
  const char* folder = environment("REPRISE_RUN_DIR");
  Guarded by;
  if (guard != nullptr && folder != nullptr && !launch.world.launcher.empty() &&
      std::sscanf(guard, "%d:%llu:%d", &by.launcher, &by.started, &by.mpirun) == 3) {
    by.folder = folder;
    by.limit = launch.world.watchdog.value_or(by.limit);
    launch.guarded_by = by;
  }
  if (launch.ranks > 0 && !launch.world.launcher.empty()) {
    return absl::InvalidArgumentError(
        fmt::format("--ranks {} inside a launch: this is rank {} of {} under {} already; leave "
                    "--ranks out",
                    launch.ranks, launch.world.rank, launch.world.size, launch.world.launcher));
  }
  return launch;
}

absl::StatusOr<Launch> plan_launch(int argc, char** argv) {
  return plan_launch(std::vector<std::string>(argv + std::min(argc, 1), argv + argc),
                     [](const char* name) { return std::getenv(name); });
}

absl::StatusOr<std::string> find_mpirun() {
  const std::string library = distributed::mpi_library();
  if (library.empty()) {
    return absl::FailedPreconditionError(
        "--ranks needs MPI, which this build does not have: install libopenmpi-dev and "
        "openmpi-bin, then configure again with -DREPRISE_MPI=ON");
  }
#ifdef REPRISE_MPIRUN
  if (access(REPRISE_MPIRUN, X_OK) == 0) {
    return REPRISE_MPIRUN;
  }
#endif
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string candidate = folder + "/mpirun";
    if (access(candidate.c_str(), X_OK) != 0) {
      continue;
    }
    const std::string version = output_of(candidate, "--version");
    if (family(version) != family(library)) {
      return absl::FailedPreconditionError(
          fmt::format("{} belongs to {}, this program to {}", candidate, family(version), library));
    }
    return candidate;
  }
  return absl::NotFoundError("there is no mpirun in PATH: install openmpi-bin");
}

absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect(
    const World& world, distributed::ConnectOptions options) {
  if (world.size == 1) {
    return distributed::world_of_one();
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  options.expected_size = world.size;
  options.expected_rank = world.rank;
  if (const char* folder = std::getenv("REPRISE_RUN_DIR")) {
    options.run_folder = folder;
  }
  return distributed::connect_mpi(options);
}

absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect(
    const World& world, std::optional<std::chrono::milliseconds> limit) {
  distributed::ConnectOptions options;
  options.limit = limit.value_or(world.watchdog.value_or(options.limit));
  return connect(world, options);
}

namespace {

// `mpi` may be null: then REPRISE_RENDEZVOUS carries what has to be carried, if there is anything.
absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect_devices(
    Device device, const World& world, const distributed::ConnectOptions& options,
    std::unique_ptr<distributed::NcclCalls> calls, distributed::Communicator* mpi,
    const sigset_t& mask) {
  distributed::NcclOptions nccl{.rank = world.rank, .size = world.size, .device = device};
  nccl.limit = options.limit;
  nccl.start_limit = options.start_limit;
  nccl.checked = options.checked;
  nccl.mask = mask;
  nccl.watchdog.limits.silence = options.silence;
  nccl.watchdog.version = fmt::format("{}, {}", options.version, distributed::nccl_version());
  if (const char* folder = std::getenv("REPRISE_RUN_DIR")) {
    nccl.watchdog.run_folder = folder;
  }
  if (world.size > 1) {
    nccl.gather = mpi != nullptr ? distributed::gather_over(*mpi)
                                 : distributed::gather_over_folder(
                                       std::getenv("REPRISE_RENDEZVOUS"), world.rank, world.size,
                                       options.start_limit);
  }
  const absl::StatusOr<distributed::NcclShare> share = distributed::nccl_share(nccl, mpi);
  return share.ok() ? distributed::connect_nccl(nccl, *share, std::move(calls)) : share.status();
}

}  // namespace

absl::StatusOr<std::unique_ptr<distributed::Communicator>> connect_on(
    Device device, const World& world, distributed::ConnectOptions options) {
  if (device.kind == DeviceKind::cpu) {
    return connect(world, std::move(options));
  }
  auto calls = distributed::nccl_library(device);
  if (!calls.ok()) {
    return calls.status();
  }
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  const char* folder = std::getenv("REPRISE_RENDEZVOUS");
  if (world.size == 1 || (folder != nullptr && *folder != 0)) {
    if (world.size > 1) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
    }
    return connect_devices(device, world, options, *std::move(calls), nullptr, mask);
  }
  absl::StatusOr<std::unique_ptr<distributed::Communicator>> mpi = connect(world, options);
  if (!mpi.ok()) {
    return mpi.status();
  }
  auto ranks = connect_devices(device, world, options, *std::move(calls), mpi->get(), mask);
  if (ranks.ok()) {
    (*mpi)->close();
    mpi->reset();
    distributed::Watchdog::block_signals();  // the end of MPI's watchdog has let them through
  } else {
    (*mpi)->abort(std::string(ranks.status().message()));
  }
  return ranks;
}

absl::Status run_rank(std::unique_ptr<distributed::Communicator> communicator,
                      const std::function<absl::Status(distributed::Communicator&)>& body) {
  absl::Status done;
  try {
    done = body(*communicator);
    if (done.ok()) {
      communicator->close();
      return done;
    }
  } catch (const std::exception& error) {
    if (communicator->size() > 1) {
      communicator->abort(error.what());
    }
    throw;
  }
  if (communicator->size() > 1) {
    communicator->abort(std::string(done.message()));
  }
  return done;
}

}  // namespace reprise::train

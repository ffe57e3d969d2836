#include "train/launch.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include <fmt/format.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "distributed/run_folder.h"

namespace reprise::train {
namespace {

using Clock = std::chrono::steady_clock;

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

[[noreturn]] void become_mpirun(const std::string& mpirun, const std::string& self,
                                const Launch& launch, const std::string& run_folder,
                                const sigset_t& mask, pid_t parent) {
  // mpirun ends its job when it gets TERM, so that the job ends when the supervisor is killed.
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) {
    _exit(1);
  }
  sigprocmask(SIG_SETMASK, &mask, nullptr);
  if (!run_folder.empty()) {
    setenv("REPRISE_RUN_DIR", run_folder.c_str(), 1);
  }
  if (launch.world.watchdog) {
    const std::string text =
        fmt::format("{}", std::chrono::duration<double>(*launch.world.watchdog).count());
    setenv("REPRISE_WATCHDOG", text.c_str(), 1);
  }
  setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 1);
  setenv("OMPI_MCA_hwloc_base_binding_policy", "none", 1);
  setenv("OMPI_MCA_orte_execute_quiet", "1", 1);  // ranks say what is wrong, without a banner
  if (geteuid() == 0) {
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
  }
  std::vector<std::string> words{mpirun,      "-n",   std::to_string(launch.ranks),
                                 "--bind-to", "none", self};
  words.insert(words.end(), launch.arguments.begin(), launch.arguments.end());
  std::vector<char*> arguments;
  for (std::string& word : words) {
    arguments.push_back(word.data());
  }
  arguments.push_back(nullptr);
  execv(mpirun.c_str(), arguments.data());
  std::fprintf(stderr, "reprise: cannot run %s: %s\n", mpirun.c_str(), std::strerror(errno));
  _exit(127);
}

// Processes whose parent is this one; those of a dead mpirun are adopted.
std::vector<pid_t> children() {
  std::vector<pid_t> result;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    const std::optional<int> pid = number(entry.path().filename().string());
    if (!pid) {
      continue;
    }
    std::ifstream file(entry.path() / "stat");
    std::string stat;
    std::getline(file, stat);
    // "pid (name) state ppid ...": the name may hold anything, but no later ')'.
    const std::size_t name_end = stat.rfind(')');
    if (name_end == std::string::npos) {
      continue;
    }
    std::istringstream rest(stat.substr(name_end + 1));
    char state = 0;
    pid_t parent = 0;
    rest >> state >> parent;
    if (parent == getpid()) {
      result.push_back(*pid);
    }
  }
  return result;
}

// Where ranks of this machine leave their last state; in memory where the system has such a place.
class RunFolder {
 public:
  RunFolder() {
    for (const char* place : {"/dev/shm/reprise-XXXXXX", "/tmp/reprise-XXXXXX"}) {
      std::string name = place;
      if (mkdtemp(name.data()) != nullptr) {
        path_ = name;
        return;
      }
    }
  }
  ~RunFolder() {
    std::error_code error;
    if (!path_.empty()) {
      std::filesystem::remove_all(path_, error);
    }
  }
  RunFolder(const RunFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;  // empty: there is none
};

class Supervisor {
 public:
  explicit Supervisor(pid_t mpirun) : mpirun_(mpirun) {}

  int run(const sigset_t& signals) {
    while (true) {
      const bool left = reap();
      if (!left) {
        return exit_code();
      }
      const Clock::time_point now = Clock::now();
      if (kill_mpirun_at_ && !status_ && now > *kill_mpirun_at_) {
        kill(mpirun_, SIGKILL);
      }
      if (status_ && now > *kill_rest_at_) {
        for (const pid_t pid : children()) {
          kill(pid, SIGKILL);
        }
      }
      const timespec wait{0, 100'000'000};
      const int signal = sigtimedwait(&signals, nullptr, &wait);
      if (signal == SIGINT || signal == SIGTERM) {
        signal_ = signal;
        if (!status_) {
          kill(mpirun_, SIGTERM);
        }
        if (!kill_mpirun_at_) {
          kill_mpirun_at_ = Clock::now() + std::chrono::seconds(5);
        }
      }
    }
  }

 private:
  // Returns whether children are left.
  bool reap() {
    while (true) {
      int status = 0;
      const pid_t pid = waitpid(-1, &status, WNOHANG);
      if (pid < 0) {
        return false;
      }
      if (pid == 0) {
        return true;
      }
      if (pid == mpirun_) {
        status_ = status;
        kill_rest_at_ = Clock::now() + std::chrono::milliseconds(1500);
      }
    }
  }

  int exit_code() const {
    if (signal_ != 0) {
      return 128 + signal_;
    }
    const int status = status_.value_or(1);
    const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    if (code > 128) {  // what was killed could not say it
      std::fprintf(stderr, "reprise: a rank was ended by signal %d (%s)\n", code - 128,
                   strsignal(code - 128));
    }
    return code;
  }

  const pid_t mpirun_;
  int signal_ = 0;
  std::optional<int> status_;
  std::optional<Clock::time_point> kill_mpirun_at_, kill_rest_at_;
};

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

absl::StatusOr<int> supervise(const Launch& launch) {
  absl::StatusOr<std::string> mpirun = find_mpirun();
  if (!mpirun.ok()) {
    return mpirun.status();
  }
  std::error_code error;
  const std::string self = std::filesystem::read_symlink("/proc/self/exe", error).string();
  if (error) {
    return absl::ErrnoToStatus(error.value(), "/proc/self/exe");
  }
  const RunFolder folder;
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  sigset_t signals, before;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) {
    sigaddset(&signals, signal);
  }
  sigprocmask(SIG_BLOCK, &signals, &before);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    become_mpirun(*mpirun, self, launch, folder.path(), before, parent);
  }
  if (pid < 0) {
    const int code = errno;
    sigprocmask(SIG_SETMASK, &before, nullptr);
    return absl::ErrnoToStatus(code, "fork");
  }
  const int result = Supervisor(pid).run(signals);
  sigprocmask(SIG_SETMASK, &before, nullptr);
  const std::string unsaid = distributed::explain_run(folder.path(), launch.ranks);
  if (result == 0 && distributed::verdict_was_said(folder.path(), launch.ranks)) {
    return 1;  // MPICH's mpirun takes a rank that left with 0 for the end of the job
  }
  if (unsaid.empty() || result == 128 + SIGINT || result == 128 + SIGTERM) {
    return result;
  }
  std::fprintf(stderr, "reprise: %s\n", unsaid.c_str());
  return result == 0 ? 1 : result;
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

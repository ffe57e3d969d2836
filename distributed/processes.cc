#include "distributed/processes.h"

#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace reprise::distributed {

ProcessHandle::ProcessHandle(pid_t pid)
    : descriptor_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {}

ProcessHandle::~ProcessHandle() {
  if (descriptor_ >= 0) {
    close(descriptor_);
  }
}

ProcessHandle::ProcessHandle(ProcessHandle&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)) {}

ProcessHandle& ProcessHandle::operator=(ProcessHandle&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

void ProcessHandle::kill() const {
  if (descriptor_ >= 0) {
    syscall(SYS_pidfd_send_signal, descriptor_, SIGKILL, nullptr, 0);
  }
}

namespace {

std::string read_file(const std::string& path) {
  std::string text;
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  char part[4096];
  for (ssize_t n = 0; file >= 0 && (n = read(file, part, sizeof part)) > 0;) {
    text.append(part, static_cast<std::size_t>(n));
  }
  if (file >= 0) {
    close(file);
  }
  return text;
}

struct Stat {
  char state = 0;
  pid_t parent = 0;
  unsigned long long started = 0;
};

Stat read_stat(const std::string& folder) {
  // "pid (name) state parent ...": the name may hold anything, but no later ')'. Field 22 is when
  // it was started.
  const std::string text = read_file(folder + "/stat");
  const std::size_t end = text.rfind(')');
  Stat stat;
  if (end == std::string::npos ||
      std::sscanf(text.c_str() + end + 1,
                  " %c %d %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
                  &stat.state, &stat.parent, &stat.started) != 3) {
    return {};
  }
  return stat;
}

// What the launcher called the process; -1: nothing.
int rank_of(const std::string& pid) {
  const std::string environment = '\0' + read_file("/proc/" + pid + "/environ");
  for (const char* name : {"OMPI_COMM_WORLD_RANK=", "PMI_RANK=", "PMIX_RANK=", "SLURM_PROCID="}) {
    const std::size_t at = environment.find('\0' + std::string(name));
    int rank = -1;
    if (at != std::string::npos) {
      const char* digits = environment.data() + at + 1 + std::strlen(name);
      std::from_chars(digits, environment.data() + environment.size(), rank);
      return rank;
    }
  }
  return -1;
}

}  // namespace

char process_state(pid_t pid) {
  return read_stat(fmt::format("/proc/{}", pid)).state;
}

unsigned long long start_time(pid_t pid) {
  return read_stat(fmt::format("/proc/{}", pid)).started;
}

pid_t parent_of(pid_t pid) {
  return read_stat(fmt::format("/proc/{}", pid)).parent;
}

bool is_guarded() {
  const char* text = std::getenv("REPRISE_GUARD");
  return text != nullptr && std::strcmp(text, "rank") == 0;
}

pid_t launcher_pid() {
  return is_guarded() ? parent_of(getppid()) : getppid();
}

std::string stopped_siblings() {
  const pid_t launcher = launcher_pid();
  std::string text;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    const std::string pid = entry.path().filename().string();
    const Stat stat = read_stat(entry.path().string());
    const pid_t parent = is_guarded() ? parent_of(stat.parent) : stat.parent;
    if (stat.state != 'T' || parent != launcher) {
      continue;
    }
    text +=
        fmt::format("{}rank {} (pid {}) is stopped", text.empty() ? "" : ", ", rank_of(pid), pid);
  }
  return text.empty() ? "no rank of this machine is stopped; one has not come so far" : text;
}

void become(const std::string& program, std::vector<std::string> arguments) {
  std::vector<char*> words{const_cast<char*>(program.c_str())};
  for (std::string& argument : arguments) {
    words.push_back(argument.data());
  }
  words.push_back(nullptr);
  execv(program.c_str(), words.data());
  std::fprintf(stderr, "reprise: cannot run %s: %s\n", program.c_str(), std::strerror(errno));
  _exit(127);
}

void leave_reaper(const ProcessHandle& process, std::chrono::milliseconds patience) {
  if (!process.valid()) {
    return;
  }
  const int descriptor = process.descriptor();
  if (fork() != 0) {
    return;
  }
  // Only what is safe after a fork of a process with threads.
  setsid();
  if (descriptor > 0) {
    syscall(SYS_close_range, 0U, static_cast<unsigned>(descriptor) - 1, 0);
  }
  syscall(SYS_close_range, static_cast<unsigned>(descriptor) + 1, ~0U, 0);
  const auto milliseconds = static_cast<int>(patience.count());
  pollfd one{descriptor, POLLIN, 0};
  if (poll(&one, 1, milliseconds) == 0) {
    syscall(SYS_pidfd_send_signal, descriptor, SIGKILL, nullptr, 0);
  }
  _exit(0);
}

}  // namespace reprise::distributed

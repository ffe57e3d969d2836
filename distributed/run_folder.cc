#include "distributed/run_folder.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "distributed/control.h"
#include "distributed/processes.h"
#include "distributed/watchdog.h"

namespace reprise::distributed {
namespace {

constexpr std::uint64_t kMagic = 0x5250524e30303032;

std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// Processes of another space of pids cannot be seen from here.
unsigned long pid_space() {
  struct stat info {};
  return stat("/proc/self/ns/pid", &info) == 0 ? static_cast<unsigned long>(info.st_ino) : 0;
}

std::string file_of(const std::string& folder, const char* what, int rank) {
  return fmt::format("{}/{}.{}", folder, what, rank);
}

template <class T>
bool read(const std::string& path, T& content) {
  std::ifstream file(path, std::ios::binary);
  return static_cast<bool>(file.read(reinterpret_cast<char*>(&content), sizeof content));
}

}  // namespace

RunFolder::RunFolder() {
  for (const char* place : {"/dev/shm", "/tmp"}) {
    sweep_run_folders(place);
    std::string name = fmt::format("{}/reprise-{}-{}-{}-XXXXXX", place, pid_space(), getpid(),
                                   start_time(getpid()));
    if (mkdtemp(name.data()) != nullptr) {
      path_ = name;
      return;
    }
  }
}

RunFolder::~RunFolder() {
  std::error_code error;
  if (!path_.empty()) {
    std::filesystem::remove_all(path_, error);
  }
}

int sweep_run_folders(const std::string& place) {
  std::vector<std::filesystem::path> stale;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(place, error)) {
    unsigned long space = 0;
    pid_t pid = 0;
    unsigned long long started = 0;
    struct stat info {};
    const std::string name = entry.path().filename().string();
    if (std::sscanf(name.c_str(), "reprise-%lu-%d-%llu-", &space, &pid, &started) == 3 &&
        lstat(entry.path().c_str(), &info) == 0 && S_ISDIR(info.st_mode) &&
        info.st_uid == geteuid() && space == pid_space() && start_time(pid) != started) {
      stale.push_back(entry.path());
    }
  }
  for (const auto& path : stale) {
    std::filesystem::remove_all(path, error);
  }
  return static_cast<int>(stale.size());
}

std::unique_ptr<RunFile> RunFile::open(const std::string& folder, int rank,
                                       const std::string& place) {
  const std::string path = file_of(folder, "rank", rank);
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) {
    return nullptr;
  }
  void* at = MAP_FAILED;
  if (ftruncate(file, sizeof(Content)) == 0) {
    at = mmap(nullptr, sizeof(Content), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);
  if (at == MAP_FAILED) {
    return nullptr;
  }
  auto* content = static_cast<Content*>(at);
  content->magic = kMagic;
  content->state.rank = rank;
  copy_text(content->place, place);
  std::unique_ptr<RunFile> opened(new RunFile(content));
  opened->write(End::starting);
  return opened;
}

RunFile::~RunFile() {
  munmap(content_, sizeof(Content));
}

void RunFile::write(const RankState& state) {
  std::memcpy(&content_->state, &state, sizeof state);
}

void RunFile::write(End end, std::string_view why) {
  copy_text(content_->why, why);
  content_->end_ns = now_ns();
  content_->end = end;
}

std::optional<RunFile::Content> read_run_file(const std::string& folder, int rank) {
  RunFile::Content c{};
  if (!read(file_of(folder, "rank", rank), c) || c.magic != kMagic) {
    return std::nullopt;
  }
  c.place[sizeof c.place - 1] = 0;
  c.why[sizeof c.why - 1] = 0;
  c.state.what[sizeof c.state.what - 1] = 0;
  c.state.phase = std::min(c.state.phase, Phase::ending);
  return c;
}

void write_end(const std::string& folder, RankEnd end) {
  end.at_ns = now_ns();
  const std::string path = file_of(folder, "end", end.rank), part = path + ".part";
  {
    std::ofstream file(part, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&end), sizeof end);
  }
  std::error_code error;
  std::filesystem::rename(part, path, error);
}

void mark_killed(const std::string& folder, int rank) {
  const std::ofstream file(file_of(folder, "killed", rank));
}

std::optional<RankEnd> read_end(const std::string& folder, int rank) {
  RankEnd end;
  return read(file_of(folder, "end", rank), end) ? std::optional(end) : std::nullopt;
}

namespace {

using End = RunFile::End;

struct Known {
  int rank = 0;
  std::optional<RunFile::Content> file;
  std::optional<RankEnd> end;
  bool killed = false;
  bool in(End state) const { return file && file->end == state; }
};

std::string how(int status) {
  if (WIFSIGNALED(status)) {
    return fmt::format("by signal {} ({})", WTERMSIG(status), strsignal(WTERMSIG(status)));
  }
  return fmt::format("with exit code {}", WEXITSTATUS(status));
}

int code_of(int status) {
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

std::string last_of(const RunFile::Content& c) {
  std::string text =
      fmt::format("last in {} of step {}, {} of {} collectives complete", name(c.state.phase),
                  c.state.step, c.state.completed, c.state.launched);
  if (c.state.joined > c.state.completed) {
    text += fmt::format(", in collective {} ({})", c.state.joined,
                        static_cast<const char*>(c.state.what));
  }
  return text;
}

std::string named(const Known& k) {
  return k.file ? fmt::format("rank {} ({})", k.rank, static_cast<const char*>(k.file->place))
                : fmt::format("rank {}", k.rank);
}

// The first that ended badly without having said so: nobody else is to blame.
const Known* first_of(const std::vector<Known>& ranks) {
  const Known* first = nullptr;
  for (const Known& k : ranks) {
    if (!k.end || k.end->by_launcher != 0 || k.killed || k.in(End::signalled) ||
        k.in(End::failed) || k.in(End::told) ||
        (k.end->status == 0 && (!k.file || k.in(End::finished)))) {
      continue;
    }
    if (first == nullptr || k.end->at_ns < first->end->at_ns) {
      first = &k;
    }
  }
  return first;
}

std::string unfinished(const std::vector<Known>& ranks) {
  std::vector<int> absent, starting;
  std::string text;
  for (const Known& k : ranks) {
    if (!k.file && (!k.end || k.end->status != 0)) {
      absent.push_back(k.rank);
    } else if (k.in(End::starting)) {
      starting.push_back(k.rank);
    } else if (k.in(End::running)) {
      text += fmt::format("{}{} ended without finishing, {}", text.empty() ? "" : "; ", named(k),
                          last_of(*k.file));
    }
  }
  if (!absent.empty()) {
    return fmt::format("rank {} ended before it connected", fmt::join(absent, ", "));
  }
  if (text.empty() && !starting.empty()) {
    return fmt::format("rank {} ended while MPI started", fmt::join(starting, ", "));
  }
  return text;
}

}  // namespace

Outcome explain_run(const std::string& folder, int ranks) {
  std::vector<Known> known;
  const Known *told = nullptr, *failed = nullptr;
  for (int rank = 0; rank < ranks; ++rank) {
    known.push_back({rank, read_run_file(folder, rank), read_end(folder, rank),
                     access(file_of(folder, "killed", rank).c_str(), F_OK) == 0});
  }
  for (const Known& k : known) {
    auto earliest = [&](End state, const Known*& so_far) {
      if (k.in(state) && (so_far == nullptr || k.file->end_ns < so_far->file->end_ns)) {
        so_far = &k;
      }
    };
    earliest(End::told, told);
    earliest(End::failed, failed);
  }
  Outcome outcome;
  outcome.finished = std::ranges::all_of(known, [](const Known& k) {
    return k.end ? k.end->status == 0 && (!k.file || k.in(End::finished)) : k.in(End::finished);
  });
  const Known* first = first_of(known);
  if (first != nullptr) {
    const int code = code_of(first->end->status);
    outcome.code = code == 0 ? 1 : code;
    if (first->in(End::refused)) {
      return outcome;
    }
    if (told != nullptr) {  // by the others: they do not know how
      outcome.text = fmt::format("{} ended {}", named(*first), how(first->end->status));
    } else if (!first->file) {
      outcome.text =
          fmt::format("rank {} ended {} before it connected", first->rank, how(first->end->status));
    } else if (first->in(End::starting)) {
      outcome.text =
          fmt::format("{} ended {} while MPI started", named(*first), how(first->end->status));
    } else {
      outcome.text = fmt::format("{} ended without finishing, {}, {}", named(*first),
                                 how(first->end->status), last_of(*first->file));
    }
  } else if (told != nullptr) {
    outcome.code = kEndedByWatchdog;
    outcome.verdict = static_cast<const char*>(told->file->why);
  } else if (failed != nullptr) {
    outcome.code = kEndedByWatchdog;
    outcome.text = fmt::format("{} failed in {} of step {}: {}", named(*failed),
                               name(failed->file->state.phase), failed->file->state.step,
                               static_cast<const char*>(failed->file->why));
  } else if (!outcome.finished &&
             std::ranges::none_of(known, [](const Known& k) { return k.in(End::refused); })) {
    outcome.text = unfinished(known);
  }
  return outcome;
}

}  // namespace reprise::distributed

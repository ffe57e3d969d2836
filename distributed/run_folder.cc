#include "distributed/run_folder.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include "distributed/control.h"

namespace reprise::distributed {
namespace {

constexpr std::uint64_t kMagic = 0x5250524e30303031;

bool read(const std::string& folder, int rank, RunFile::Content& content) {
  std::ifstream file(folder + "/rank." + std::to_string(rank), std::ios::binary);
  return file.read(reinterpret_cast<char*>(&content), sizeof content) && content.magic == kMagic;
}

}  // namespace

std::unique_ptr<RunFile> RunFile::open(const std::string& folder, int rank,
                                       const std::string& place) {
  const std::string path = folder + "/rank." + std::to_string(rank);
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
  content->end = End::starting;
  content->state.rank = rank;
  copy_text(content->place, place);
  return std::unique_ptr<RunFile>(new RunFile(content));
}

RunFile::~RunFile() {
  munmap(content_, sizeof(Content));
}

void RunFile::write(const RankState& state) {
  std::memcpy(&content_->state, &state, sizeof state);
}

void RunFile::write(End end) {
  content_->end = end;
}

bool verdict_was_said(const std::string& folder, int ranks) {
  for (int rank = 0; rank < ranks; ++rank) {
    RunFile::Content c{};
    if (read(folder, rank, c) && c.end == RunFile::End::told) {
      return true;
    }
  }
  return false;
}

std::string explain_run(const std::string& folder, int ranks) {
  std::vector<int> absent, starting;
  std::string text;
  for (int rank = 0; rank < ranks; ++rank) {
    RunFile::Content c{};
    if (!read(folder, rank, c)) {
      absent.push_back(rank);
      continue;
    }
    c.place[sizeof c.place - 1] = 0;
    c.state.what[sizeof c.state.what - 1] = 0;
    c.state.phase = std::min(c.state.phase, Phase::ending);
    if (c.end == RunFile::End::told) {
      return {};
    }
    if (c.end == RunFile::End::starting) {
      starting.push_back(rank);
    }
    if (c.end == RunFile::End::running) {
      text += fmt::format(
          "{}rank {} ({}) ended without finishing, last in {} of step {}, {} of {} collectives "
          "complete{}",
          text.empty() ? "" : "; ", rank, static_cast<const char*>(c.place), name(c.state.phase),
          c.state.step, c.state.completed, c.state.launched,
          c.state.joined > c.state.completed
              ? fmt::format(", in collective {} ({})", c.state.joined,
                            static_cast<const char*>(c.state.what))
              : std::string());
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

}  // namespace reprise::distributed

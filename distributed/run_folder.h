// A folder of one launch on one machine in which every rank keeps its last state, and whoever
// started it how it ended, so that the launcher can say who failed first when the ranks were killed
// before they could.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include <sys/types.h>

#include "distributed/judge.h"

namespace reprise::distributed {

// A new folder, in memory where the system has such a place, until the end of its life. Its name
// has this process's pid and start time: folders of launchers that were killed are removed by the
// next one of the same user.
class RunFolder {
 public:
  RunFolder();
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  const std::string& path() const { return path_; }  // empty: there is none

 private:
  std::string path_;
};

// Removes from `place` the folders of launchers that are gone: of this user, and of processes that
// this one could see. Returns how many.
int sweep_run_folders(const std::string& place);

// The file of one rank, in memory: what is written is there also after the process was killed.
class RunFile {
 public:
  enum class End : std::int32_t {
    starting,
    running,
    finished,
    signalled,  // it took a signal of the launcher's
    refused,    // it said itself why it does not start
    failed,     // it told the others why it cannot go on
    told        // a verdict was printed
  };
  struct Content {
    std::uint64_t magic;
    End end;
    std::int64_t end_ns;  // of the monotonic clock, when `end` was written
    RankState state;
    char place[96];
    char why[300];  // of failed and told
  };

  // Null when the folder does not exist or cannot be written. It says `starting`.
  static std::unique_ptr<RunFile> open(const std::string& folder, int rank,
                                       const std::string& place);
  ~RunFile();
  RunFile(const RunFile&) = delete;

  void write(const RankState& state);
  void write(End end, std::string_view why = {});

 private:
  explicit RunFile(Content* content) : content_(content) {}
  Content* content_;
};

// Empty: the rank has not opened its file.
std::optional<RunFile::Content> read_run_file(const std::string& folder, int rank);

// How the process of a rank ended, written by its parent.
struct RankEnd {
  std::int32_t rank = -1, pid = 0;
  std::int32_t status = 0;       // of waitpid
  std::int32_t by_launcher = 0;  // not 0: after a signal that the launcher sent
  std::int64_t at_ns = 0;        // of the monotonic clock
};
void write_end(const std::string& folder, RankEnd end);  // at_ns is filled in
std::optional<RankEnd> read_end(const std::string& folder, int rank);
// A neighbour is about to kill it, after a verdict.
void mark_killed(const std::string& folder, int rank);

// What became of the ranks of this machine.
struct Outcome {
  bool finished = false;    // all of them, well
  std::optional<int> code;  // of the first to end badly: its exit code, or 128 + its signal, or
                            // that of the watchdog when a verdict ended the job; empty: not known
  std::string text;         // what nobody has said yet; may be empty
  std::string verdict;      // what a rank has printed when it ended the job; may be cut short
};
Outcome explain_run(const std::string& folder, int ranks);

}  // namespace reprise::distributed

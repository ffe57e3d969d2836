// A folder of one launch on one machine in which every rank keeps its last state, so that the
// launcher can say who failed when the ranks were killed before they could.
#pragma once

#include <memory>
#include <string>

#include "distributed/judge.h"

namespace reprise::distributed {

// The file of one rank, in memory: what is written is there also after the process was killed.
class RunFile {
 public:
  enum class End : std::int32_t { starting, running, finished, signalled, told };
  struct Content {
    std::uint64_t magic;
    End end;
    RankState state;
    char place[96];
  };

  // Null when the folder does not exist or cannot be written. It says `starting`.
  static std::unique_ptr<RunFile> open(const std::string& folder, int rank,
                                       const std::string& place);
  ~RunFile();
  RunFile(const RunFile&) = delete;

  void write(const RankState& state);
  void write(End end);

 private:
  explicit RunFile(Content* content) : content_(content) {}
  Content* content_;
};

// Whether a rank of this machine has ended with a verdict, or was told one.
bool verdict_was_said(const std::string& folder, int ranks);

// Of a job of so many ranks of this machine that has ended badly: who neither finished nor was told
// to end, with the last state of each; empty when a verdict was printed already.
std::string explain_run(const std::string& folder, int ranks);

}  // namespace reprise::distributed

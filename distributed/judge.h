// What the ranks say of themselves, and what follows from it: a rank that is gone, does not answer,
// makes no progress or has failed ends the job; one that is slow is only warned of.
//
// No clock and no connection of its own: the watchdog tells it what was heard and when.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/progress.h"
#include "distributed/communicator.h"

namespace reprise::distributed {

// The last that is known of a rank. Sent as it lies in memory.
struct RankState {
  std::int32_t rank = 0, pid = 0;
  std::int64_t step = 0;
  std::uint64_t ticks = 0;  // of core/progress.h
  // Collectives, by number from 1: asked for, taken up, done; and messages of the one under way.
  std::uint64_t launched = 0, joined = 0, completed = 0, transfers = 0;
  std::int64_t bytes = 0;  // of the collective taken up last
  Phase phase = Phase::starting;
  std::uint8_t waiting = 0;  // not 0: the computing thread waits for other ranks
  char what[94] = {};        // "all_reduce of 12 f32 (gradients, bucket 3)"
};

enum class Failure : std::uint8_t {
  own,        // this rank alone knows of it: an exception
  shared,     // every rank comes to the same text: a disagreement
  suspected,  // may well be the consequence of another rank's end: an error of MPI or NCCL
};

struct Verdict {
  std::vector<int> culprits;  // empty: nobody in particular
  std::string text;           // names them
};

class Judge {
 public:
  struct Limits {
    std::chrono::milliseconds limit = std::chrono::seconds(30);  // of standing still
    // Of not being heard; twice as long for a process of this machine that is not stopped: it may
    // wait for a core.
    std::chrono::milliseconds silence = std::chrono::seconds(10);
  };

  struct Rank {
    RankState state;
    bool heard = false;   // since the start
    bool gone = false;    // its connection ended
    bool left = false;    // it said goodbye
    bool failed = false;  // it said so
    Failure failure = Failure::own;
    std::string why;
    Clock::time_point heard_at, failed_at;
    Clock::time_point progressed_at;  // ticks, phase, or an end of waiting
    Clock::time_point moved_at;       // collectives
    Clock::time_point joined_at, waiting_at;
  };
  // What the system says of a rank's process: 'T' for stopped, 0 when nothing is known.
  using ProcessState = std::function<char(int rank)>;

  Judge(int size, Limits limits, Clock::time_point now);
  // places[r]: "host a, pid 12", for the texts.
  std::vector<std::string> places;
  ProcessState process_state;

  void hear(const RankState& state, Clock::time_point now);
  void lose(int rank, Clock::time_point now);
  void leave(int rank);
  void fail(int rank, Failure failure, std::string why, Clock::time_point now);
  // The judging process itself was away: silence and standstill count from now.
  void rest(Clock::time_point now);

  // Of all ranks; for the one that hears all.
  std::optional<Verdict> verdict(Clock::time_point now) const;
  // Of one rank, whether it is gone or silent for longer by `patience`; for those who hear only it.
  std::optional<Verdict> verdict_on(int rank, Clock::time_point now,
                                    std::chrono::milliseconds patience) const;
  // Once per collective: someone waits a third of the limit for a rank that does go on.
  std::vector<std::string> warnings(Clock::time_point now);

  bool all_left_but(int rank) const;
  const Rank& rank(int r) const { return ranks_[static_cast<std::size_t>(r)]; }
  // A line per rank: the last that is known of it. Of many ranks, the culprits and a few more.
  std::string table(Clock::time_point now, const std::vector<int>& culprits) const;

 private:
  bool live(const Rank& r) const { return !r.gone && !r.left; }
  std::optional<Verdict> dead(Clock::time_point now) const;
  std::optional<Verdict> silent(Clock::time_point now) const;
  std::optional<Verdict> stuck(Clock::time_point now) const;
  std::optional<Verdict> locked(Clock::time_point now) const;
  std::string named(int r) const;
  std::string silence_text(int r, Clock::time_point now) const;
  char state_of(int r) const { return process_state ? process_state(r) : '\0'; }
  bool is_silent(int r, Clock::time_point now) const;
  bool answers(const Rank& r, Clock::time_point now) const;

  Limits limits_;
  std::vector<Rank> ranks_;
  std::uint64_t warned_ = 0;
};

}  // namespace reprise::distributed

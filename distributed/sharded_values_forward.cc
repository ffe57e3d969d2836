// Gathers of forwards: a list that all ranks go along, and what one of them asks for besides.
#include <algorithm>

#include "distributed/hash.h"
#include "distributed/sharded_values.h"

namespace reprise::distributed {
namespace {

constexpr int kIdleForwards = 2;

// `base`, and what only `other` has before what follows it there.
std::vector<std::size_t> merged(std::vector<std::size_t> base,
                                const std::vector<std::size_t>& other) {
  auto at = base.end();
  for (std::size_t i = other.size(); i-- > 0;) {
    const auto found = std::ranges::find(base, other[i]);
    at = found != base.end() ? found : base.insert(at, other[i]);
  }
  return base;
}

}  // namespace

// Whether this rank is likely to read it later in this forward.
bool ShardedValues::foreseen(std::size_t unit) const {
  return std::find(foreseen_.begin() + static_cast<std::ptrdiff_t>(next_), foreseen_.end(), unit) !=
         foreseen_.end();
}

void ShardedValues::release_unneeded(std::size_t reading, bool wait) {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    const State& state = states_[u];
    if (u != reading && here(u) && !state.stays && !foreseen(u) &&
        (wait || state.resident || state.pending.done())) {
      release(u);
    }
  }
}

void ShardedValues::read_in_forward(std::size_t unit) {
  next_ = find_next(unit, foreseen_);
  current_ = unit;
  seen_.push_back(unit);
  states_[unit].read = true;
  release_unneeded(unit, false);
  while (!here(unit)) {
    advance(unit);
  }
  make_resident(unit);
  look_ahead();
}

// The next of the list is sent for, unless one is under way or waits to be read.
void ShardedValues::look_ahead() {
  if (flight_) {
    if (!flight_->exchange.done()) {
      return;
    }
    settle_flight();
  }
  for (std::size_t u = 0; u < states_.size(); ++u) {
    const State& state = states_[u];
    if (here(u) && !state.resident && (foreseen(u) || !state.pending.done())) {
      return;
    }
  }
  if (list_at_ < list_.size()) {
    start_flight(kNone, true);
  }
}

GatherWords ShardedValues::words_of_forward(std::size_t wanted) const {
  GatherWords words(states_.size());
  words.set(runs_ || gradients_.has_accumulated() ? GatherWords::runs : GatherWords::joins);
  if (!runs_) {
    words.set(GatherWords::joins);
  }
  if (wanted != kNone) {
    words.want(wanted);
  }
  return words;
}

// One gather on, or more, towards `wanted`.
void ShardedValues::advance(std::size_t wanted) {
  if (flight_) {
    settle_flight();
    return;
  }
  const auto rest = list_.begin() + static_cast<std::ptrdiff_t>(list_at_);
  const bool comes = std::find(rest, list_.end(), wanted) != list_.end();
  if (list_at_ < list_.size()) {
    start_flight(comes ? kNone : wanted, false);
    return;
  }
  // The list is at its end: the others answer when they have come there.
  GatherWords words = words_of_forward(wanted);
  words.exchange(communicator_, "end of a forward").wait();
  gather_wanted(words, wanted);
}

void ShardedValues::start_flight(std::size_t wanted, bool ahead) {
  flight_.emplace(Flight{words_of_forward(wanted), {}});
  flight_->exchange = flight_->words.exchange(communicator_, "gathers of a forward");
  const std::size_t unit = list_[list_at_++];
  states_[unit].gathered = true;
  gathered_.push_back(unit);
  if (here(unit)) {
    take_part(unit);
  } else {
    launch(unit, ahead);
  }
}

void ShardedValues::settle_flight() {
  flight_->exchange.wait();
  const GatherWords words = flight_->words;
  flight_.reset();
  others_run_ = words.has(GatherWords::runs);
  gather_wanted(words, current_);
}

// What ranks have asked for. The first time in a forward all keep it: it was not foreseen, so it is
// not known who will read it.
void ShardedValues::gather_wanted(const GatherWords& words, std::size_t reading) {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (!words.wanted(u)) {
      continue;
    }
    State& state = states_[u];
    const bool first = !std::exchange(state.gathered, true);
    if (first) {
      gathered_.push_back(u);
      state.stays = runs_;
    }
    if (here(u) || !(state.stays || u == reading)) {
      take_part(u);
    } else {
      launch(u, false);
    }
  }
}

std::uint64_t ShardedValues::hash_of_reads() const {
  Hash hash;
  for (const std::size_t u : seen_) {
    hash.add(u);
  }
  return hash.value();
}

void ShardedValues::reset_forward() {
  for (State& state : states_) {
    state.read = state.gathered = state.stays = false;
  }
  gathered_.clear();
  seen_.clear();
  list_at_ = next_ = 0;
  runs_ = true;
}

// What was gathered for others, or not read after all.
void ShardedValues::release_unread() {
  for (std::size_t u = 0; u < states_.size(); ++u) {
    if (here(u) && !states_[u].resident) {
      release(u);
    }
  }
}

// To the end of the list, then until nobody asks for more. Absent when no rank has a forward.
std::optional<GatherWords> ShardedValues::finish_forward(AfterForward kind, std::uint64_t plan) {
  current_ = kNone;
  others_run_ = runs_;
  bool first = true;
  while (flight_ || list_at_ < list_.size()) {
    if (!flight_) {
      start_flight(kNone, false);
    }
    settle_flight();
    release_unread();
    if (std::exchange(first, false) && !others_run_) {
      reset_forward();
      return {};
    }
  }
  for (;;) {
    GatherWords words = words_of_forward(kNone);
    if (runs_) {
      words.set(kind);
      words.set_hash(GatherWords::Of::plan, plan);
      words.set_hash(GatherWords::Of::order, hash_of_reads());
    }
    for (std::size_t u = 0; u < states_.size(); ++u) {
      if (states_[u].read) {
        words.mark(u);
      }
    }
    words.exchange(communicator_, "end of a forward").wait();
    gather_wanted(words, kNone);
    release_unread();
    if (words.any_wanted()) {
      continue;
    }
    if (words.has(GatherWords::runs)) {
      (void)kind_of(words);
      renew_list(words);
    }
    reset_forward();
    return words.has(GatherWords::runs) ? std::optional(words) : std::nullopt;
  }
}

// What comes next on all ranks. While one accumulates, those that are to reduce wait for it.
// Gradients that only ranks without data have are reduced.
AfterForward ShardedValues::kind_of(const GatherWords& words) const {
  const bool sweeps = words.has(GatherWords::accumulates) || words.has(GatherWords::reduces);
  if (words.has(GatherWords::stops) && sweeps) {
    const std::string why =
        "[sharding] ranks disagree after a forward: some end it, others go on with a backward";
    communicator_.disagree(why);
    throw CommunicatorError(why);
  }
  if (words.has(GatherWords::stops)) {
    return GatherWords::stops;
  }
  return words.has(GatherWords::accumulates) ? GatherWords::accumulates : GatherWords::reduces;
}

// The order of the ranks' reads, where all have the same; else that of the gathers.
void ShardedValues::renew_list(const GatherWords& words) {
  const bool same = words.same(GatherWords::Of::order) && !words.has(GatherWords::joins);
  std::vector<std::size_t> base;
  for (const std::size_t u : same ? seen_ : gathered_) {
    if (std::ranges::find(base, u) == base.end()) {
      base.push_back(u);
    }
  }
  list_ = merged(std::move(base), list_);
  for (std::size_t u = 0; u < states_.size(); ++u) {
    State& state = states_[u];
    state.idle_forwards = words.marked(u) ? 0 : state.idle_forwards + 1;
    if (state.idle_forwards >= kIdleForwards) {
      std::erase(list_, u);
    }
  }
  if (!seen_.empty()) {
    foreseen_ = seen_;  // the next forward is likely to be the same
  }
}

void ShardedValues::end_forward() {
  over_ = true;
  sweeping_ = in_step_ = false;
  for (State& state : states_) {
    state.still.clear();
  }
  (void)finish_forward(GatherWords::stops, 0);
  release_all();
}

std::optional<AfterForward> ShardedValues::join_forward() {
  runs_ = false;
  const std::optional<GatherWords> words = finish_forward(GatherWords::stops, 0);
  if (!words) {
    return {};
  }
  const AfterForward kind = kind_of(*words);
  in_step_ = kind != GatherWords::stops;
  over_ = !in_step_;
  return kind;
}

}  // namespace reprise::distributed

#include "distributed/judge.h"

#include <algorithm>

#include <fmt/format.h>

namespace reprise::distributed {
namespace {

double seconds(Clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

std::string doing(const RankState& s) {
  return s.step > 0 ? fmt::format("{} of step {}", name(s.phase), s.step)
                    : std::string(name(s.phase));
}

std::string collective(const RankState& s) {
  return fmt::format("collective {} ({}, {} bytes)", s.joined, s.what, s.bytes);
}

// A suspicion waits so long for a better explanation.
constexpr std::chrono::milliseconds kSuspicion(1500);
constexpr int kManyRanks = 16;

}  // namespace

Judge::Judge(int size, Limits limits, Clock::time_point now)
    : places(static_cast<std::size_t>(size)),
      limits_(limits),
      ranks_(static_cast<std::size_t>(size)) {
  for (int r = 0; r < size; ++r) {
    ranks_[static_cast<std::size_t>(r)].state.rank = r;
  }
  rest(now);
}

void Judge::rest(Clock::time_point now) {
  for (Rank& r : ranks_) {
    r.heard_at = r.progressed_at = r.moved_at = r.joined_at = r.waiting_at = now;
  }
}

void Judge::hear(const RankState& state, Clock::time_point now) {
  Rank& r = ranks_[static_cast<std::size_t>(state.rank)];
  const RankState& before = r.state;
  if (state.ticks != before.ticks || state.phase != before.phase || state.step != before.step ||
      state.waiting != before.waiting) {
    r.progressed_at = now;
  }
  if (state.joined != before.joined || state.completed != before.completed ||
      state.transfers != before.transfers) {
    r.moved_at = now;
  }
  if (state.joined != before.joined) {
    r.joined_at = now;
  }
  if (state.waiting != 0 && before.waiting == 0) {
    r.waiting_at = now;
  }
  r.state = state;
  r.heard = true;
  r.heard_at = now;
}

void Judge::lose(int rank, Clock::time_point) {
  ranks_[static_cast<std::size_t>(rank)].gone = true;
}

void Judge::leave(int rank) {
  ranks_[static_cast<std::size_t>(rank)].left = true;
}

void Judge::fail(int rank, Failure failure, std::string why, Clock::time_point now) {
  Rank& r = ranks_[static_cast<std::size_t>(rank)];
  if (!r.failed) {
    r.failed = true;
    r.failure = failure;
    r.why = std::move(why);
    r.failed_at = now;
  }
}

std::string Judge::named(int r) const {
  const std::string& place = places[static_cast<std::size_t>(r)];
  return place.empty() ? fmt::format("rank {}", r) : fmt::format("rank {} ({})", r, place);
}

std::optional<Verdict> Judge::verdict(Clock::time_point now) const {
  for (const Rank& r : ranks_) {
    if (r.failed && r.failure == Failure::shared) {
      return Verdict{{}, r.why};
    }
  }
  for (const Rank& r : ranks_) {
    if (r.failed && r.failure == Failure::own) {
      return Verdict{
          {r.state.rank},
          fmt::format("{} failed in {}: {}", named(r.state.rank), doing(r.state), r.why)};
    }
  }
  for (const auto rule : {&Judge::dead, &Judge::silent}) {
    if (std::optional<Verdict> found = (this->*rule)(now)) {
      return found;
    }
  }
  for (const Rank& r : ranks_) {
    if (r.failed && now - r.failed_at > kSuspicion) {
      return Verdict{{}, fmt::format("{} reports: {}", named(r.state.rank), r.why)};
    }
  }
  for (const auto rule : {&Judge::stuck, &Judge::locked}) {
    if (std::optional<Verdict> found = (this->*rule)(now)) {
      return found;
    }
  }
  return std::nullopt;
}

std::optional<Verdict> Judge::verdict_on(int rank, Clock::time_point now,
                                         std::chrono::milliseconds patience) const {
  const Rank& r = ranks_[static_cast<std::size_t>(rank)];
  if (r.left) {
    return std::nullopt;
  }
  if (r.gone && now - r.heard_at > patience) {
    return Verdict{{rank}, named(rank) + " ended without finishing"};
  }
  if (!r.gone && is_silent(rank, now - patience)) {
    return Verdict{{rank}, silence_text(rank, now)};
  }
  return std::nullopt;
}

std::optional<Verdict> Judge::dead(Clock::time_point) const {
  Verdict v;
  for (const Rank& r : ranks_) {
    if (r.gone && !r.left) {
      v.culprits.push_back(r.state.rank);
      v.text += fmt::format("{}{} ended without finishing, in {}", v.text.empty() ? "" : "; ",
                            named(r.state.rank), doing(r.state));
    }
  }
  return v.culprits.empty() ? std::nullopt : std::optional(v);
}

std::string Judge::silence_text(int r, Clock::time_point now) const {
  const Rank& rank = ranks_[static_cast<std::size_t>(r)];
  const char state = state_of(r);
  const char* what = state == 'T'   ? "; its process is stopped (state T)"
                     : state == 'D' ? "; its process waits for a device (state D)"
                     : state == 't' ? "; its process is stopped by a debugger (state t)"
                                    : "";
  return fmt::format("{} does not answer for {:.1f} s, last in {}{}", named(r),
                     seconds(now - rank.heard_at), doing(rank.state), what);
}

bool Judge::is_silent(int r, Clock::time_point now) const {
  const Clock::duration silence = now - rank(r).heard_at;
  if (silence <= limits_.silence) {
    return false;
  }
  const char state = state_of(r);
  const bool runs = state == 'R' || state == 'S' || state == 'D';
  return silence > (runs ? 2 : 1) * limits_.silence;
}

// What a rank does not do any more can only be known of one that is heard: else it is on its way to
// be silent, and that is what will be said.
bool Judge::answers(const Rank& r, Clock::time_point now) const {
  return now - r.heard_at <= limits_.silence / 2;
}

std::optional<Verdict> Judge::silent(Clock::time_point now) const {
  Verdict v;
  for (const Rank& r : ranks_) {
    if (live(r) && is_silent(r.state.rank, now)) {
      v.culprits.push_back(r.state.rank);
      v.text += (v.text.empty() ? "" : "; ") + silence_text(r.state.rank, now);
    }
  }
  return v.culprits.empty() ? std::nullopt : std::optional(v);
}

std::optional<Verdict> Judge::stuck(Clock::time_point now) const {
  for (const Rank& r : ranks_) {
    if (live(r) && r.state.waiting == 0 && answers(r, now) &&
        now - r.progressed_at > limits_.limit) {
      return Verdict{{r.state.rank},
                     fmt::format("{} makes no progress for {:.1f} s in {}; {}", named(r.state.rank),
                                 seconds(now - r.progressed_at), doing(r.state),
                                 r.state.joined > r.state.completed
                                     ? "it is in " + collective(r.state)
                                     : fmt::format("its last collective is {}", r.state.joined))};
    }
  }
  return std::nullopt;
}

// Everybody waits, and nothing has moved for the limit.
std::optional<Verdict> Judge::locked(Clock::time_point now) const {
  const Rank* last = nullptr;
  std::uint64_t most = 0;
  for (const Rank& r : ranks_) {
    if (!live(r)) {
      continue;
    }
    const Clock::time_point since = std::max({r.moved_at, r.waiting_at, r.progressed_at});
    if (r.state.waiting == 0 || !answers(r, now) || now - since <= limits_.limit) {
      return std::nullopt;
    }
    most = std::max(most, r.state.joined);
    if (last == nullptr || r.state.completed < last->state.completed ||
        (r.state.completed == last->state.completed && r.state.joined < last->state.joined)) {
      last = &r;
    }
  }
  if (last == nullptr) {
    return std::nullopt;
  }
  Verdict v;
  for (const Rank& r : ranks_) {
    if (live(r) && r.state.joined < most) {
      v.culprits.push_back(r.state.rank);
    }
  }
  if (last->state.phase == Phase::ending && last->state.completed == last->state.joined) {
    v.text =
        fmt::format("the end of the job does not complete within {:.1f} s", seconds(limits_.limit));
  } else if (v.culprits.empty()) {
    v.text = fmt::format("{} does not complete within {:.1f} s, though every rank has joined it",
                         collective(last->state), seconds(limits_.limit));
  } else {
    v.text =
        fmt::format("every rank waits since {:.1f} s, {} in {}, others in collective {}",
                    seconds(limits_.limit), named(last->state.rank), collective(last->state), most);
  }
  return v;
}

std::vector<std::string> Judge::warnings(Clock::time_point now) {
  const Clock::duration patience = limits_.limit / 3;
  const Rank* waiting = nullptr;
  for (const Rank& r : ranks_) {
    if (live(r) && r.state.waiting != 0 && r.state.joined > std::max(warned_, r.state.completed) &&
        now - std::max(r.joined_at, r.waiting_at) > patience &&
        (waiting == nullptr || r.state.joined > waiting->state.joined)) {
      waiting = &r;
    }
  }
  std::vector<std::string> result;
  if (waiting == nullptr) {
    return result;
  }
  for (const Rank& r : ranks_) {
    if (live(r) && r.state.joined < waiting->state.joined && now - r.progressed_at < patience &&
        now - r.heard_at < patience) {
      result.push_back(fmt::format("{} is slow: rank {} waits {:.1f} s for it in {}; it is in {}",
                                   named(r.state.rank), waiting->state.rank,
                                   seconds(now - std::max(waiting->joined_at, waiting->waiting_at)),
                                   collective(waiting->state), doing(r.state)));
    }
  }
  if (!result.empty()) {
    warned_ = waiting->state.joined;
  }
  return result;
}

bool Judge::all_left_but(int rank) const {
  return std::ranges::all_of(ranks_, [&](const Rank& r) { return r.left || r.state.rank == rank; });
}

std::string Judge::table(Clock::time_point now, const std::vector<int>& culprits) const {
  std::string text;
  int shown = 0;
  for (const Rank& r : ranks_) {
    const bool culprit = std::ranges::find(culprits, r.state.rank) != culprits.end();
    if (!culprit && shown >= kManyRanks) {
      continue;
    }
    ++shown;
    const RankState& s = r.state;
    if (!r.heard) {
      text += fmt::format("  rank {}: nothing is known of it here\n", s.rank);
      continue;
    }
    text += fmt::format("  rank {}: {}", s.rank, doing(s));
    if (s.joined > s.completed) {
      text += fmt::format(", {} in {}", s.waiting != 0 ? "waits" : "computes", collective(s));
    }
    text += fmt::format("; {} of {} collectives complete; ", s.completed, s.launched);
    text += r.gone || r.left ? "gone\n"
                             : fmt::format("heard {:.1f} s ago\n", seconds(now - r.heard_at));
  }
  if (shown < static_cast<int>(ranks_.size())) {
    text += fmt::format("  and {} ranks more\n", ranks_.size() - static_cast<std::size_t>(shown));
  }
  return text;
}

}  // namespace reprise::distributed

#include "distributed/watchdog.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "distributed/disagreement.h"

namespace reprise::distributed {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kSignalPatience(300);   // for the culprit's connection to end
constexpr milliseconds kClosePatience(700);    // for the others to end by themselves
constexpr milliseconds kAbortPatience(2000);   // of a rank that failed, for rank 0's verdict
constexpr milliseconds kParentPatience(4000);  // for the launcher to end
constexpr milliseconds kPublishPause(2);
constexpr milliseconds kOthersPatience(1000);  // of a rank, who judges rank 0 after those before it
constexpr int kManyRanks = 64, kFewRanks = 8;

// One call, so that lines of several ranks do not mix.
void print(const std::string& text) {
  for (std::string_view rest = text; !rest.empty();) {
    const ssize_t n = write(STDERR_FILENO, rest.data(), rest.size());
    if (n <= 0) {
      return;
    }
    rest.remove_prefix(static_cast<std::size_t>(n));
  }
}

// What was printed and not yet written, as far as it can be written at once.
void flush_output() {
  pollfd one{STDOUT_FILENO, POLLOUT, 0};
  if (poll(&one, 1, 0) == 1 && (one.revents & POLLOUT) != 0 && ftrylockfile(stdout) == 0) {
    std::fflush(stdout);
    funlockfile(stdout);
  }
}

sigset_t taken_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT}) {
    struct sigaction now {};
    if (sigaction(signal, nullptr, &now) == 0 && now.sa_handler == SIG_DFL) {
      sigaddset(&set, signal);
    }
  }
  return set;
}

std::string place_of(const Card& card) {
  return fmt::format("host {}, pid {}", card.host, card.pid);
}

absl::StatusOr<std::vector<Card>> exchange_cards(int size, const Card& mine,
                                                 const GatherBytes& gather) {
  const std::string all = gather({reinterpret_cast<const char*>(&mine), sizeof mine});
  std::vector<Card> cards(static_cast<std::size_t>(size));
  ensure(all.size() == sizeof(Card) * cards.size(), "watchdog: {} bytes of cards for {} ranks",
         all.size(), size);
  std::memcpy(cards.data(), all.data(), all.size());
  std::vector<std::string> versions;
  for (const Card& card : cards) {
    // Another format: of the fields only the first means the same.
    versions.push_back(card.format == Card::kFormat
                           ? fmt::format("version {}", card.version)
                           : fmt::format("a version with cards of format {:#x}", card.format));
  }
  if (const std::string text = disagreement(versions); !text.empty()) {
    return absl::FailedPreconditionError(
        fmt::format("[watchdog] ranks disagree at the start: library: {}", text));
  }
  return cards;
}

}  // namespace

sigset_t Watchdog::block_signals() {
  const sigset_t set = taken_signals();
  sigset_t before;
  pthread_sigmask(SIG_BLOCK, &set, &before);
  return before;
}

Watchdog::Watchdog(int rank, int size, WatchdogOptions options)
    : rank_(rank),
      size_(size),
      options_(std::move(options)),
      progress_(options_.progress != nullptr ? *options_.progress : progress()),
      judge_(size, options_.limits, Clock::now()) {}

absl::StatusOr<std::unique_ptr<Watchdog>> Watchdog::start(int rank, int size,
                                                          WatchdogOptions options,
                                                          const GatherBytes& gather) {
  std::unique_ptr<Watchdog> dog(new Watchdog(rank, size, std::move(options)));
  const Clock::time_point deadline = Clock::now() + dog->options_.start_limit;
  auto plane = ControlPlane::open(rank, size);
  Card mine;
  if (plane.ok()) {
    dog->plane_ = *std::move(plane);
    mine = dog->plane_->card();
  }
  copy_text(mine.version, dog->options_.version);
  // Also when this rank cannot listen: the others must not wait for its card.
  const absl::StatusOr<std::vector<Card>> cards = exchange_cards(size, mine, gather);
  if (!cards.ok()) {
    return cards.status();
  }
  if (!plane.ok()) {
    return plane.status();
  }
  if (absl::Status status = dog->plane_->connect(*cards, deadline); !status.ok()) {
    return status;
  }
  for (int r = 0; r < size; ++r) {
    const Card& card = (*cards)[static_cast<std::size_t>(r)];
    const bool near = std::strcmp(card.machine, mine.machine) == 0;
    dog->judge_.places[static_cast<std::size_t>(r)] = place_of(card);
    dog->pids_.push_back(near ? card.pid : 0);
    if (near && r != rank) {
      dog->neighbours_.push_back({r, ProcessHandle(card.pid)});
    }
  }
  dog->judge_.process_state = [pids = dog->pids_](int r) {
    const pid_t pid = pids[static_cast<std::size_t>(r)];
    return pid > 0 ? process_state(pid) : '\0';
  };
  if (dog->options_.reap_parent) {
    dog->parent_ = ProcessHandle(launcher_pid());
  }
  if (!dog->options_.run_folder.empty()) {
    dog->run_file_ = RunFile::open(dog->options_.run_folder, rank, place_of(mine));
    if (dog->run_file_ != nullptr) {
      dog->run_file_->write(RunFile::End::running);
    }
  }
  dog->wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (dog->options_.signals) {
    const sigset_t set = taken_signals();
    dog->signals_ = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  }
  dog->mine_.rank = rank;
  dog->mine_.pid = getpid();
  dog->judge_.rest(Clock::now());
  dog->thread_ = std::thread([at = dog.get()] { at->run(); });
  return dog;
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
  for (const int file : {wake_, signals_}) {
    if (file >= 0) {
      close(file);
    }
  }
}

void Watchdog::wake() const {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_, &one, sizeof one);
}

RankState Watchdog::compose() const {
  RankState state = mine_;
  state.step = progress_.step();
  state.ticks = progress_.ticks();
  state.phase = progress_.phase();
  state.waiting = progress_.waiting() ? 1 : 0;
  return state;
}

Message Watchdog::message(Message::Kind kind) const {
  Message message;
  message.kind = kind;
  message.state = compose();
  return message;
}

// With the lock held.
void Watchdog::tell() const {
  if (run_file_ != nullptr) {
    run_file_->write(compose());
  }
}

void Watchdog::launched() {
  const std::lock_guard lock(mutex_);
  ++mine_.launched;
  tell();
}

void Watchdog::join(std::string_view what, std::int64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    mine_.joined = mine_.completed + 1;
    mine_.launched = std::max(mine_.launched, mine_.joined);
    mine_.bytes = bytes;
    copy_text(mine_.what, what);
    tell();
  }
  publish();
}

void Watchdog::moved() {
  const std::lock_guard lock(mutex_);
  ++mine_.transfers;
}

void Watchdog::complete() {
  const std::lock_guard lock(mutex_);
  mine_.completed = mine_.joined;
  tell();
}

void Watchdog::publish() {
  // Ranks 0 and 1 would have to tell everybody; their own words are not the last of them.
  if (rank_ < 2 && size_ > kFewRanks) {
    return;
  }
  Message beat;
  {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    if (over_ || publish_later_) {
      return;
    }
    if (now - published_at_ < kPublishPause) {
      publish_later_ = true;
    } else {
      published_at_ = now;
      beat = message(Message::Kind::beat);
    }
  }
  if (beat.state.pid == 0) {
    wake();
  } else {
    plane_->send(beat);
  }
}

std::string Watchdog::verdict() const {
  const std::lock_guard lock(mutex_);
  return verdict_;
}

void Watchdog::fail(Failure failure, const std::string& why) {
  Message told;
  {
    const std::lock_guard lock(mutex_);
    if (over_) {
      return;
    }
    judge_.fail(rank_, failure, why, Clock::now());
    if (run_file_ != nullptr && failure != Failure::suspected) {
      tell();
      run_file_->write(RunFile::End::failed, why);
    }
    told = message(Message::Kind::failed);
    told.failure = failure;
    copy_text(told.text, why);
  }
  plane_->send(told);
  wake();
}

void Watchdog::fail_and_end(Failure failure, const std::string& why) {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  fail(failure, why);
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, kAbortPatience, [&] { return over_; });
  lock.unlock();
  if (options_.end == nullptr) {
    std::this_thread::sleep_for(kAbortPatience);  // the watchdog's thread ends the process
    print(fmt::format("reprise: rank {} failed: {}\n", rank_, why));
  }
  end_process();
}

void Watchdog::goodbye() {
  Message last;
  {
    const std::lock_guard lock(mutex_);
    if (over_) {
      return;
    }
    said_goodbye_ = true;
    judge_.leave(rank_);
    last = message(Message::Kind::goodbye);
    if (run_file_ != nullptr) {
      run_file_->write(RunFile::End::finished);
    }
  }
  plane_->send(last);
  wake();
  std::unique_lock lock(mutex_);
  if (rank_ == 0) {
    changed_.wait(lock, [&] { return everybody_left_ || over_; });
  }
  stopping_ = true;
  lock.unlock();
  wake();
  thread_.join();
}

void Watchdog::run() {
  const milliseconds beat =
      std::min(milliseconds(size_ > kManyRanks ? 1000 : 250), options_.limits.silence / 4);
  Clock::time_point next_beat = Clock::now(), last_turn = next_beat;
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      if (publish_later_) {
        next_beat = std::min(next_beat, published_at_ + kPublishPause);
      }
    }
    const auto until = std::chrono::ceil<milliseconds>(next_beat - Clock::now());
    const std::array<int, 2> also{wake_, signals_};
    const auto events =
        plane_->receive(std::min(until, beat), std::span(also.data(), signals_ >= 0 ? 2 : 1));
    std::uint64_t wakes = 0;
    [[maybe_unused]] const ssize_t n = read(wake_, &wakes, sizeof wakes);
    take_signal();
    const Clock::time_point now = Clock::now();
    if (now >= next_beat) {
      next_beat = now + beat;
      Message mine;
      {
        const std::lock_guard lock(mutex_);
        mine = message(Message::Kind::beat);
        publish_later_ = false;
        published_at_ = now;
        tell();
      }
      plane_->send(mine);
    }
    {
      const std::lock_guard lock(mutex_);
      // Stopped, or starved: what the others did meanwhile is not known yet.
      if (now - last_turn > std::max(4 * beat, options_.limits.silence / 2)) {
        judge_.rest(now);
      }
      judge_.hear(compose(), now);
    }
    last_turn = now;
    for (const ControlPlane::Event& event : events) {
      handle(event, now);
    }
    judge(now);
    end_by_signal(now);
    const std::lock_guard lock(mutex_);
    if (stopping_ || over_) {
      return;
    }
  }
}

void Watchdog::handle(const ControlPlane::Event& event, Clock::time_point now) {
  const Message& m = event.message;
  std::optional<Verdict> told;
  {
    const std::lock_guard lock(mutex_);
    if (event.closed) {
      judge_.lose(event.rank, now);
      return;
    }
    switch (m.kind) {
      case Message::Kind::beat:
        judge_.hear(m.state, now);
        break;
      case Message::Kind::goodbye:
        judge_.hear(m.state, now);
        judge_.leave(event.rank);
        if (m.text[0] != 0) {  // not of its own will
          judge_.fail(event.rank, Failure::suspected, m.text, now);
        }
        everybody_left_ = judge_.all_left_but(rank_);
        changed_.notify_all();
        break;
      case Message::Kind::failed:
        judge_.hear(m.state, now);
        judge_.fail(event.rank, m.failure, m.text, now);
        break;
      case Message::Kind::verdict:
        told = Verdict{{}, m.text};
        if (m.culprit >= 0) {
          told->culprits.push_back(m.culprit);
        }
        break;
      case Message::Kind::hello:
        break;
    }
  }
  if (told && !over_) {
    // Who is stopped does not end by itself; rank 0 sees only its own machine.
    for (const Neighbour& neighbour : neighbours_) {
      const pid_t pid = pids_[static_cast<std::size_t>(neighbour.rank)];
      if (std::ranges::find(told->culprits, neighbour.rank) != told->culprits.end() &&
          options_.end == nullptr && process_state(pid) == 'T') {
        kill(neighbour);
      }
    }
    execute(told->text, false);
  }
}

void Watchdog::judge(Clock::time_point now) {
  std::optional<Verdict> found;
  std::vector<std::string> warnings;
  std::string table;
  {
    const std::lock_guard lock(mutex_);
    if (over_) {
      return;
    }
    if (rank_ == 0) {
      found = judge_.verdict(now);
      warnings = judge_.warnings(now);
    } else if (!said_goodbye_) {
      found = judge_.verdict_on(0, now, std::min(rank_ - 1, kFewRanks) * kOthersPatience);
    }
    if (found) {
      table = judge_.table(now, found->culprits);
    }
  }
  for (const std::string& warning : warnings) {
    print("reprise: warning: " + warning + "\n");
  }
  if (!found) {
    return;
  }
  if (rank_ < kFewRanks) {
    print("reprise: " + found->text + "\n" + table);
  }
  Message order;
  order.kind = Message::Kind::verdict;
  order.state.rank = rank_;
  order.culprit = found->culprits.empty() ? -1 : found->culprits.front();
  copy_text(order.text, found->text);
  plane_->send(order);
  execute(found->text, true);
}

void Watchdog::execute(const std::string& why, bool issuer) {
  bool own = false;
  {
    const std::lock_guard lock(mutex_);
    verdict_ = why;
    over_ = true;
    own = judge_.rank(rank_).failed && !ending_;
    if (run_file_ != nullptr) {
      run_file_->write(RunFile::End::told, why);
    }
  }
  changed_.notify_all();
  if (options_.on_verdict) {
    options_.on_verdict(why);
  }
  if (options_.end) {
    options_.end(why);
    return;
  }
  flush_output();
  if (!issuer) {
    // An exception under way may still say more.
    std::this_thread::sleep_for(own ? kSignalPatience : milliseconds(0));
    end_process();
  }
  const Clock::time_point end = Clock::now() + kClosePatience;
  auto left = [&] {
    return std::ranges::any_of(neighbours_,
                               [&](const Neighbour& n) { return plane_->connected(n.rank); });
  };
  while (left() && Clock::now() < end) {
    plane_->receive(milliseconds(20), {});
  }
  for (const Neighbour& neighbour : neighbours_) {
    kill(neighbour);
  }
  end_process();
}

void Watchdog::kill(const Neighbour& neighbour) const {
  const char state = process_state(pids_[static_cast<std::size_t>(neighbour.rank)]);
  // One whose connection has ended ends by itself, though it may not be gone yet.
  if (run_file_ != nullptr && (state == 'T' || plane_->connected(neighbour.rank))) {
    mark_killed(options_.run_folder, neighbour.rank);
  }
  neighbour.process.kill();
}

void Watchdog::end_process() {
  leave_reaper(parent_, kParentPatience);
  _exit(kEndedByWatchdog);
}

void Watchdog::take_signal() {
  signalfd_siginfo info{};
  if (signals_ < 0 || signalled_at_ || read(signals_, &info, sizeof info) != sizeof info) {
    return;
  }
  signalled_at_ = Clock::now();
  signal_ = static_cast<int>(info.ssi_signo);
  Message last;
  {
    const std::lock_guard lock(mutex_);
    last = message(Message::Kind::goodbye);
    copy_text(last.text,
              fmt::format("it was ended by signal {} ({})", signal_, strsignal(signal_)));
    judge_.leave(rank_);
    if (run_file_ != nullptr) {
      run_file_->write(RunFile::End::signalled);
    }
  }
  plane_->send(last);
}

void Watchdog::end_by_signal(Clock::time_point now) {
  if (signalled_at_ && now - *signalled_at_ > kSignalPatience) {
    flush_output();
    _exit(128 + signal_);
  }
}

}  // namespace reprise::distributed

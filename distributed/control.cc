#include "distributed/control.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <random>
#include <type_traits>
#include <utility>

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace reprise::distributed {
namespace {

static_assert(std::is_trivially_copyable_v<Message> && std::is_trivially_copyable_v<Card>);

absl::Status system_error(const char* what) {
  return absl::ErrnoToStatus(errno, fmt::format("[control] {}", what));
}

// Equal for processes that can see each other: one boot of one kernel, one space of pids.
std::string machine() {
  std::string boot = "?";
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char space[48] = {};
  const ssize_t n = readlink("/proc/self/ns/pid", space, sizeof space - 1);
  return boot + " " + (n > 0 ? space : "?");
}

// Those of this machine that others may reach, IPv4 first.
std::string addresses() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) {
    return {};
  }
  std::string text;
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* at = list; at != nullptr; at = at->ifa_next) {
      if (at->ifa_addr == nullptr || at->ifa_addr->sa_family != family ||
          (at->ifa_flags & IFF_LOOPBACK) != 0 || (at->ifa_flags & IFF_UP) == 0) {
        continue;
      }
      char number[NI_MAXHOST] = {};
      const auto length =
          static_cast<socklen_t>(family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
      if (getnameinfo(at->ifa_addr, length, number, sizeof number, nullptr, 0, NI_NUMERICHOST) !=
              0 ||
          std::strchr(number, '%') != nullptr) {  // of one link only
        continue;
      }
      if (text.size() + std::strlen(number) + 2 < sizeof(Card::addresses)) {
        text += (text.empty() ? "" : " ") + std::string(number);
      }
    }
  }
  freeifaddrs(list);
  return text;
}

int milliseconds_until(Clock::time_point deadline) {
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, 1'000'000));
}

bool wait_for(int socket, short events, Clock::time_point deadline) {
  while (true) {
    pollfd one{socket, events, 0};
    const int ready = poll(&one, 1, milliseconds_until(deadline));
    if (ready > 0) {
      return true;
    }
    if (ready == 0 || errno != EINTR) {
      return false;
    }
  }
}

void make_ready(int socket) {
  const int on = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK);
}

int dial(const std::string& address, std::uint32_t port, Clock::time_point deadline) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
    return -1;
  }
  const int socket = ::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  bool connected = false;
  if (socket >= 0) {
    connected = ::connect(socket, found->ai_addr, found->ai_addrlen) == 0;
    if (!connected && errno == EINPROGRESS) {
      int error = 1;
      socklen_t length = sizeof error;
      connected = wait_for(socket, POLLOUT, deadline) &&
                  getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0;
    }
    if (connected) {
      make_ready(socket);
    } else {
      close(socket);
    }
  }
  freeaddrinfo(found);
  return connected ? socket : -1;
}

// Waits for the whole message.
bool read_message(int socket, Message& message, Clock::time_point deadline) {
  std::size_t got = 0;
  while (got < sizeof message) {
    const ssize_t n =
        recv(socket, reinterpret_cast<char*>(&message) + got, sizeof message - got, 0);
    if (n > 0) {
      got += static_cast<std::size_t>(n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR) ||
               !wait_for(socket, POLLIN, deadline)) {
      return false;
    }
  }
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ControlPlane>> ControlPlane::open(int rank, int size) {
  std::unique_ptr<ControlPlane> plane(new ControlPlane(rank, size));
  Card& card = plane->card_;
  card.pid = getpid();
  std::random_device random;
  card.token = (std::uint64_t{random()} << 32) ^ random();
  char host[256] = "?";
  gethostname(host, sizeof host - 1);
  copy_text(card.host, host);
  copy_text(card.machine, machine());
  if (rank < std::min(2, size - 1)) {
    if (absl::Status status = plane->listen(); !status.ok()) {
      return status;
    }
  }
  return plane;
}

ControlPlane::~ControlPlane() {
  for (const Link& link : links_) {
    close(link.socket);
  }
  if (listener_ >= 0) {
    close(listener_);
  }
}

absl::Status ControlPlane::listen() {
  // IPv6 takes IPv4 as well, where the kernel has it.
  sockaddr_in6 six{};
  six.sin6_family = AF_INET6;
  sockaddr_in four{};
  four.sin_family = AF_INET;
  listener_ = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int off = 0;
  if (listener_ >= 0 &&
      (setsockopt(listener_, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off) != 0 ||
       bind(listener_, reinterpret_cast<const sockaddr*>(&six), sizeof six) != 0)) {
    close(std::exchange(listener_, -1));
  }
  if (listener_ < 0) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener_ < 0 ||
        bind(listener_, reinterpret_cast<const sockaddr*>(&four), sizeof four) != 0) {
      return system_error("cannot make a socket");
    }
  }
  sockaddr_storage bound{};
  socklen_t length = sizeof bound;
  if (::listen(listener_, std::max(128, size_)) != 0 ||
      getsockname(listener_, reinterpret_cast<sockaddr*>(&bound), &length) != 0) {
    return system_error("cannot listen");
  }
  // Both kinds of address have the port at the same place.
  card_.port = ntohs(reinterpret_cast<const sockaddr_in*>(&bound)->sin_port);
  copy_text(card_.addresses, addresses());
  return absl::OkStatus();
}

absl::Status ControlPlane::connect(std::span<const Card> cards, Clock::time_point deadline) {
  for (int to = 0; to < std::min(2, rank_); ++to) {
    const Card& card = cards[static_cast<std::size_t>(to)];
    const bool same = std::strcmp(card.machine, card_.machine) == 0;
    if (absl::Status status = connect_to(to, card, same, deadline); !status.ok()) {
      return status;
    }
  }
  return listener_ >= 0 ? accept_all(cards, deadline) : absl::OkStatus();
}

absl::Status ControlPlane::connect_to(int rank, const Card& card, bool same_machine,
                                      Clock::time_point deadline) {
  std::vector<std::string> candidates;
  if (same_machine) {
    candidates = {"127.0.0.1", "::1"};
  }
  for (std::string_view rest = card.addresses; !rest.empty();) {
    const std::size_t end = std::min(rest.find(' '), rest.size());
    candidates.emplace_back(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  // An address may be of a network that is not ours, and then never answers.
  do {
    for (const std::string& address : candidates) {
      const int socket = dial(address, card.port,
                              std::min(deadline, Clock::now() + std::chrono::milliseconds(1500)));
      if (socket < 0) {
        continue;
      }
      Message hello;
      hello.kind = Message::Kind::hello;
      hello.token = card.token;
      hello.state.rank = rank_;
      const std::lock_guard lock(mutex_);
      Link& link = links_.emplace_back(Link{rank, socket, {}, {}});
      link.out.append(reinterpret_cast<const char*>(&hello), sizeof hello);
      flush(link);
      return absl::OkStatus();
    }
  } while (Clock::now() < deadline);
  return absl::DeadlineExceededError(
      fmt::format("[control] rank {} cannot reach rank {} on {} (port {} of {})", rank_, rank,
                  card.host, card.port, card.addresses[0] == 0 ? "no address" : card.addresses));
}

absl::Status ControlPlane::accept_all(std::span<const Card> cards, Clock::time_point deadline) {
  const int expected = size_ - 1 - rank_;
  int here = 0;
  std::vector<bool> came(static_cast<std::size_t>(size_));
  while (here < expected) {
    if (!wait_for(listener_, POLLIN, deadline)) {
      std::string missing;
      for (int r = rank_ + 1; r < size_; ++r) {
        if (!came[static_cast<std::size_t>(r)]) {
          missing += fmt::format("{}{} on {}", missing.empty() ? "" : ", ", r,
                                 cards[static_cast<std::size_t>(r)].host);
        }
      }
      return absl::DeadlineExceededError(
          fmt::format("[control] rank {} was not reached by rank {}", rank_, missing));
    }
    const int socket = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (socket < 0) {
      continue;
    }
    Message hello;
    const bool known =
        read_message(socket, hello, std::min(deadline, Clock::now() + std::chrono::seconds(2))) &&
        hello.kind == Message::Kind::hello && hello.token == card_.token &&
        hello.state.rank > rank_ && hello.state.rank < size_ &&
        !came[static_cast<std::size_t>(hello.state.rank)];
    if (!known) {  // a stranger
      close(socket);
      continue;
    }
    came[static_cast<std::size_t>(hello.state.rank)] = true;
    ++here;
    make_ready(socket);
    const std::lock_guard lock(mutex_);
    links_.push_back(Link{hello.state.rank, socket, {}, {}});
  }
  return absl::OkStatus();
}

void ControlPlane::send(const Message& message) {
  // A peer that does not read for long misses what is in between, not the end of a message.
  constexpr std::size_t kMost = 64 * sizeof(Message);
  const std::lock_guard lock(mutex_);
  for (Link& link : links_) {
    if (link.socket >= 0 && (link.out.size() < kMost || message.kind != Message::Kind::beat)) {
      link.out.append(reinterpret_cast<const char*>(&message), sizeof message);
      flush(link);
    }
  }
}

void ControlPlane::flush(Link& link) {
  while (!link.out.empty()) {
    const ssize_t n = ::send(link.socket, link.out.data(), link.out.size(), MSG_NOSIGNAL);
    if (n > 0) {
      link.out.erase(0, static_cast<std::size_t>(n));
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else {
      if (n < 0 && errno != EAGAIN) {
        link.out.clear();  // the reading side learns of the end
      }
      return;
    }
  }
}

bool ControlPlane::connected(int rank) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(
      links_, [&](const Link& link) { return link.rank == rank && link.socket >= 0; });
}

// Returns whether the link goes on.
bool ControlPlane::read(Link& link, std::vector<Event>& events) {
  char buffer[8192];
  bool open = true;
  while (true) {
    const ssize_t n = recv(link.socket, buffer, sizeof buffer, 0);
    if (n > 0) {
      link.in.append(buffer, static_cast<std::size_t>(n));
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else {
      open = n < 0 && errno == EAGAIN;
      break;
    }
  }
  std::size_t begin = 0;
  for (; link.in.size() - begin >= sizeof(Message); begin += sizeof(Message)) {
    Event& event = events.emplace_back();
    event.rank = link.rank;
    std::memcpy(&event.message, link.in.data() + begin, sizeof(Message));
    event.message.state.rank = link.rank;
    event.message.state.phase = std::min(event.message.state.phase, Phase::ending);
    event.message.state.what[sizeof event.message.state.what - 1] = 0;
    event.message.text[sizeof event.message.text - 1] = 0;
  }
  link.in.erase(0, begin);
  return open;
}

std::vector<ControlPlane::Event> ControlPlane::receive(std::chrono::milliseconds wait,
                                                       std::span<const int> also) {
  std::vector<pollfd> waits;
  for (const int file : also) {
    waits.push_back({file, POLLIN, 0});
  }
  {
    const std::lock_guard lock(mutex_);
    for (const Link& link : links_) {
      if (link.socket >= 0) {
        const int events = link.out.empty() ? POLLIN : POLLIN | POLLOUT;
        waits.push_back({link.socket, static_cast<short>(events), 0});
      }
    }
  }
  poll(waits.data(), waits.size(), static_cast<int>(std::max<std::int64_t>(0, wait.count())));
  std::vector<Event> events;
  const std::lock_guard lock(mutex_);
  for (Link& link : links_) {
    if (link.socket < 0) {
      continue;
    }
    flush(link);
    if (!read(link, events)) {
      close(std::exchange(link.socket, -1));
      Event& event = events.emplace_back();
      event.rank = link.rank;
      event.closed = true;
    }
  }
  return events;
}

}  // namespace reprise::distributed

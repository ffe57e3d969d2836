// Connections between the ranks of a job besides those of the collectives: TCP, a star with rank 0
// in its middle and a second one around rank 1, so that the end of either is seen by somebody.
// Needs no service; carries messages of one size.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "distributed/communicator.h"
#include "distributed/judge.h"

namespace reprise::distributed {

// What a rank hands to all others before there is a connection. Bytes, of one size everywhere.
struct Card {
  static constexpr std::uint32_t kFormat = 0x52435031;
  std::uint32_t format = kFormat;  // of what follows
  std::int32_t pid = 0;
  std::uint64_t token = 0;  // who connects must know it
  std::uint32_t port = 0;   // 0: does not listen
  char version[92] = {};    // of this library
  char host[64] = {};
  char machine[128] = {};    // equal where processes see each other's pids
  char addresses[256] = {};  // numeric, with blanks between
};

// The fixed-size text `to` = `from`, cut if it is too long.
template <std::size_t N>
void copy_text(char (&to)[N], std::string_view from) {
  const std::size_t n = from.copy(to, N - 1);
  to[n] = 0;
}

struct Message {
  enum class Kind : std::uint32_t { hello, beat, goodbye, failed, verdict };
  Kind kind = Kind::beat;
  Failure failure = Failure::own;
  std::uint64_t token = 0;  // of hello
  RankState state;
  std::int32_t culprit = -1;  // of a verdict
  char text[700] = {};        // of a failure, a verdict
};

class ControlPlane {
 public:
  // Ranks 0 and 1 listen from now on. Internal, with the system's word, when that cannot be.
  static absl::StatusOr<std::unique_ptr<ControlPlane>> open(int rank, int size);
  ~ControlPlane();
  ControlPlane(const ControlPlane&) = delete;

  // Of this rank; its version is still to be filled in.
  const Card& card() const { return card_; }
  // Connects all; cards[r] is rank r's. DeadlineExceeded names who is missing.
  absl::Status connect(std::span<const Card> cards, Clock::time_point deadline);

  // To those who are connected with this rank: 0 and 1 with everyone, the others with these two.
  // From any thread; never waits: what does not fit goes out with a later call.
  void send(const Message& message);

  struct Event {
    int rank = -1;
    bool closed = false;  // its connection ended; else:
    Message message;
  };
  // What came, at the latest after `wait`, or when one of `also` is readable. On one thread.
  std::vector<Event> receive(std::chrono::milliseconds wait, std::span<const int> also);
  bool connected(int rank) const;

 private:
  struct Link {
    int rank = -1, socket = -1;
    std::string in, out;
  };
  ControlPlane(int rank, int size) : rank_(rank), size_(size) {}
  absl::Status listen();
  absl::Status accept_all(std::span<const Card> cards, Clock::time_point deadline);
  absl::Status connect_to(int rank, const Card& card, bool same_machine,
                          Clock::time_point deadline);
  void flush(Link& link);
  bool read(Link& link, std::vector<Event>& events);

  const int rank_, size_;
  Card card_;
  int listener_ = -1;
  mutable std::mutex mutex_;  // of the links
  std::vector<Link> links_;
};

}  // namespace reprise::distributed

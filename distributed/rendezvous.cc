#include "distributed/rendezvous.h"

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

namespace reprise::distributed {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kMagic = 0x31455349'52504552;  // "REPRISE1"
constexpr auto kPause = std::chrono::milliseconds(5);

struct Join {
  std::uint64_t magic = kMagic, number = 0;
  std::int32_t rank = 0, size = 0;
};
// With what follows it in its file.
struct Joined : Join {
  std::string bytes;
};

std::uint64_t own_number() {
  std::random_device source;
  return (static_cast<std::uint64_t>(source()) << 32 | source()) | 1;
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Readers see the whole file or none.
absl::Status write(const std::string& path, std::string_view text) {
  const std::string temporary = fmt::format("{}.{}.part", path, getpid());
  auto failed = [&] {
    const int code = errno;
    ::unlink(temporary.c_str());
    return absl::UnavailableError(fmt::format("{}: {}", path, std::strerror(code)));
  };
  const int file = ::open(temporary.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0) {
    return failed();
  }
  const bool written =
      ::write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
      ::fsync(file) == 0;
  if (!written) {
    const int code = errno;
    ::close(file);
    errno = code;
    return failed();
  }
  if (::close(file) != 0 || ::rename(temporary.c_str(), path.c_str()) != 0) {
    return failed();
  }
  return absl::OkStatus();
}

template <class T>
std::string_view bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

class Meeting {
 public:
  // `mine` of each rank travels to rank 0; with it, what rank 0 answers is all of them.
  Meeting(const RendezvousOptions& options, std::span<std::byte> bytes, std::string_view mine = {})
      : options_(options),
        bytes_(bytes),
        mine_(mine),
        end_(Clock::now() + options.limit),
        answer_(options.folder + "/answer") {}

  absl::Status ask() {
    const std::string mine = join_path(options_.rank);
    const Join join{kMagic, own_number(), options_.rank, options_.size};
    if (absl::Status status = write(mine, std::string(bytes_of(join)) + std::string(mine_));
        !status.ok()) {
      return status;
    }
    while (true) {
      absl::Status status = take(join.number);
      if (status.code() != absl::StatusCode::kNotFound) {
        ::unlink(mine.c_str());
        return status;
      }
      if (Clock::now() > end_) {
        ::unlink(mine.c_str());
        return late("rank 0");
      }
      std::this_thread::sleep_for(kPause);
    }
  }

  absl::Status answer() {
    ::unlink(answer_.c_str());  // an earlier job's
    put(0, mine_);
    std::vector<std::uint64_t> answered;
    while (true) {
      std::vector<std::uint64_t> numbers(static_cast<std::size_t>(options_.size));
      std::vector<std::string> missing;
      for (int r = 1; r < options_.size; ++r) {
        const std::optional<Joined> join = read_join(r);
        if (!join) {
          missing.push_back(std::to_string(r));
        } else if (join->size != options_.size) {  // or an earlier job's file: not yet an error
          missing.push_back(fmt::format("{} (it was started as one of {} ranks)", r, join->size));
        } else {
          numbers[static_cast<std::size_t>(r)] = join->number;
          put(r, join->bytes);
        }
      }
      if (!answered.empty() && std::ssize(missing) == options_.size - 1) {
        ::unlink(answer_.c_str());
        return absl::OkStatus();
      }
      if (answered.empty() ? missing.empty() : changed(answered, numbers)) {
        if (absl::Status status = write_answer(numbers); !status.ok()) {
          return status;
        }
        answered = numbers;
      }
      if (Clock::now() > end_) {
        return late(answered.empty() ? fmt::format("rank {}", fmt::join(missing, ", "))
                                     : "a rank that had left a file");
      }
      std::this_thread::sleep_for(kPause);
    }
  }

 private:
  std::string join_path(int rank) const { return fmt::format("{}/join.{}", options_.folder, rank); }

  std::optional<Joined> read_join(int rank) const {
    const std::string text = read(join_path(rank));
    Join join;
    if (text.size() != sizeof join + mine_.size()) {
      return std::nullopt;
    }
    std::memcpy(&join, text.data(), sizeof join);
    return join.magic == kMagic && join.rank == rank
               ? std::optional(Joined{join, text.substr(sizeof join)})
               : std::nullopt;
  }

  void put(int rank, std::string_view bytes) {
    if (!bytes.empty()) {
      std::memcpy(bytes_.data() + static_cast<std::size_t>(rank) * bytes.size(), bytes.data(),
                  bytes.size());
    }
  }

  // A rank's file was an earlier job's, and now is this one's: it has to be answered again.
  static bool changed(std::vector<std::uint64_t>& answered,
                      const std::vector<std::uint64_t>& numbers) {
    bool again = false;
    for (std::size_t r = 0; r < numbers.size(); ++r) {
      again = again || (numbers[r] != 0 && numbers[r] != answered[r]);
    }
    return again;
  }

  // Magic, the numbers by rank, the bytes.
  absl::Status write_answer(const std::vector<std::uint64_t>& numbers) const {
    std::string text(bytes_of(kMagic));
    text.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof numbers[0]);
    text.append(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
    return write(answer_, text);
  }

  absl::Status take(std::uint64_t number) {
    const std::string text = read(answer_);
    const std::size_t head = (1 + static_cast<std::size_t>(options_.size)) * sizeof number;
    std::uint64_t magic = 0, answered = 0;
    const std::size_t at = (1 + static_cast<std::size_t>(options_.rank)) * sizeof number;
    if (text.size() != head + bytes_.size()) {
      return absl::NotFoundError("");
    }
    std::memcpy(&magic, text.data(), sizeof magic);
    std::memcpy(&answered, text.data() + at, sizeof answered);
    if (magic != kMagic || answered != number) {
      return absl::NotFoundError("");
    }
    std::memcpy(bytes_.data(), text.data() + head, bytes_.size());
    return absl::OkStatus();
  }

  absl::Status late(const std::string& who) const {
    return absl::DeadlineExceededError(
        fmt::format("{}: {} did not come to the rendezvous of {} ranks within {:.1f} s of rank {}",
                    options_.folder, who, options_.size,
                    std::chrono::duration<double>(options_.limit).count(), options_.rank));
  }

  const RendezvousOptions& options_;
  const std::span<std::byte> bytes_;
  const std::string_view mine_;
  const Clock::time_point end_;
  const std::string answer_;
};

}  // namespace

namespace {

absl::Status meet(const RendezvousOptions& options, std::span<std::byte> bytes,
                  std::string_view mine) {
  std::error_code error;
  std::filesystem::create_directories(options.folder, error);
  if (error) {
    return absl::UnavailableError(fmt::format("{}: {}", options.folder, error.message()));
  }
  if (options.size == 1) {
    return absl::OkStatus();
  }
  Meeting meeting(options, bytes, mine);
  return options.rank == 0 ? meeting.answer() : meeting.ask();
}

}  // namespace

absl::Status rendezvous(const RendezvousOptions& options, std::span<std::byte> bytes) {
  return meet(options, bytes, {});
}

absl::Status rendezvous_of_all(const RendezvousOptions& options, std::string_view mine,
                               std::string& all) {
  all.assign(mine.size() * static_cast<std::size_t>(options.size), 0);
  mine.copy(all.data(), mine.size());  // of one rank
  return meet(options, std::as_writable_bytes(std::span(all)), mine);
}

}  // namespace reprise::distributed

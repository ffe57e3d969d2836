// Collectives over MPI's non-blocking point-to-point calls, all made by one thread.
#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include "core/progress.h"
#include "distributed/backoff.h"
#include "distributed/comm_queue.h"
#include "distributed/communicator.h"
#include "distributed/header.h"
#include "distributed/processes.h"
#include "distributed/rank_tree.h"
#include "distributed/run_folder.h"
#include "distributed/watchdog.h"

namespace reprise::distributed {
namespace {

constexpr int kPayloadTag = 2;
// Bounds the buffers of a collective, and keeps MPI's int counts in range.
constexpr std::int64_t kPieceBytes = std::int64_t{32} << 20;

void check(int code, const char* call) {
  if (code != MPI_SUCCESS) {
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw CommunicatorError(fmt::format("[communicator] {}: {}", call, text));
  }
}

struct Transfer {
  MPI_Request request = MPI_REQUEST_NULL;
  int peer = -1;               // -1: all ranks take part
  std::int64_t expected = -1;  // bytes to receive
};

class Engine {
 public:
  explicit Engine(const ConnectOptions& options) : options_(options) {}

  int rank = 0, size = 1;

  void start() {
    int provided = MPI_THREAD_SINGLE;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
    check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
    if (provided < MPI_THREAD_FUNNELED) {
      throw CommunicatorError("[communicator] this MPI does not support MPI_THREAD_FUNNELED");
    }
    if (options_.expected_size != 0 && options_.expected_size != size) {
      throw CommunicatorError(fmt::format(
          "[communicator] the launcher started {} ranks, MPI knows of {}: the launcher is not the "
          "one of this program's MPI ({})",
          options_.expected_size, size, mpi_library()));
    }
    check(MPI_Comm_dup(MPI_COMM_WORLD, &control_), "MPI_Comm_dup");
    check(MPI_Comm_dup(MPI_COMM_WORLD, &payload_), "MPI_Comm_dup");
    MPI_Comm_set_errhandler(control_, MPI_ERRORS_RETURN);
    MPI_Comm_set_errhandler(payload_, MPI_ERRORS_RETURN);
    start_watchdog();
  }

  void run(Collective& collective) {
    what_ = to_string(collective);
    dog_->join(what_, collective.in.defined() ? collective.in.bytes() : 0);
    ++sequence_;
    try {
      if (options_.checked || collective.kind == Collective::Kind::barrier) {
        compare_headers(collective);
      }
      switch (collective.kind) {
        case Collective::Kind::all_reduce:
          all_reduce(collective);
          break;
        case Collective::Kind::reduce_scatter:
          reduce_scatter(collective);
          break;
        case Collective::Kind::all_gather:
          all_gather(collective);
          break;
        case Collective::Kind::broadcast:
          broadcast(collective);
          break;
        case Collective::Kind::agree:
          agree(collective);
          break;
        case Collective::Kind::barrier:
          break;  // everybody's header was seen
      }
    } catch (const std::exception& e) {
      leave_behind(collective);
      dog_->fail(failure_, e.what());
      throw;
    }
    dog_->complete();
  }

  Watchdog* watchdog() { return dog_.get(); }

  void finalize() {
    scratch_ = Tensor();
    check(MPI_Comm_free(&payload_), "MPI_Comm_free");
    check(MPI_Comm_free(&control_), "MPI_Comm_free");
    check(MPI_Finalize(), "MPI_Finalize");
  }

 private:
  void start_watchdog() {
    WatchdogOptions options;
    options.limits.limit = options_.limit;
    options.limits.silence = std::min(options_.silence, options_.limit);
    options.start_limit = options_.start_limit;
    options.version = options_.version;
    options.run_folder = options_.run_folder;
    options.on_verdict = [this](const std::string&) { stopped_ = true; };
    auto dog = Watchdog::start(rank, size, options, [this](std::string_view mine) {
      std::string all(mine.size() * static_cast<std::size_t>(size), 0);
      gather(mine.data(), all.data(), mine.size());
      return all;
    });
    if (!dog.ok()) {
      throw CommunicatorError(std::string(dog.status().message()));
    }
    dog_ = *std::move(dog);
  }

  void gather(const void* mine, void* all, std::size_t bytes) {
    const auto count = static_cast<int>(bytes);
    check(MPI_Iallgather(mine, count, MPI_BYTE, all, count, MPI_BYTE, control_,
                         &open_.emplace_back().request),
          "MPI_Iallgather");
    complete();
  }

  // The or of all hashes and the or of their complements are complements of each other only when
  // all are equal. Every rank's collective begins with this one, whatever it is, so that these fit
  // together also when the collectives do not.
  void compare_headers(const Collective& c) {
    header_ = header_of(c, sequence_, rank);
    const std::uint64_t hash = hash_of(header_);
    hashes_ = {hash, ~hash};
    check(MPI_Iallreduce(MPI_IN_PLACE, hashes_.data(), 2, MPI_UINT64_T, MPI_BOR, control_,
                         &open_.emplace_back().request),
          "MPI_Iallreduce");
    complete();
    if (hashes_[0] == ~hashes_[1]) {
      return;
    }
    headers_.assign(static_cast<std::size_t>(size), Header{});
    gather(&header_, headers_.data(), sizeof header_);
    failure_ = Failure::shared;
    throw CommunicatorError(fmt::format("[communicator] ranks disagree at collective {} ({}): {}",
                                        sequence_, what_, explain(headers_)));
  }

  void send(const void* data, std::int64_t bytes, int peer, int tag, MPI_Comm comm) {
    if (bytes == 0) {
      return;
    }
    Transfer& transfer = open_.emplace_back();
    transfer.peer = peer;
    check(MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, comm, &transfer.request),
          "MPI_Isend");
  }

  void receive(void* data, std::int64_t bytes, int peer, int tag, MPI_Comm comm) {
    if (bytes == 0) {
      return;
    }
    Transfer& transfer = open_.emplace_back();
    transfer.peer = peer;
    transfer.expected = bytes;
    check(MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, comm, &transfer.request),
          "MPI_Irecv");
  }

  // All open transfers. Whether they take too long is for the watchdog to say.
  void complete() {
    Backoff backoff;
    while (true) {
      const std::size_t before = open_.size();
      std::erase_if(open_, [&](Transfer& transfer) { return test(transfer); });
      if (open_.size() != before) {
        dog_moved();
      }
      if (open_.empty()) {
        return;
      }
      if (stopped_) {
        throw CommunicatorError(fmt::format("[communicator] collective {} ({}) was given up: {}",
                                            sequence_, what_, dog_->verdict()));
      }
      backoff.pause();
    }
  }

  void dog_moved() {
    if (dog_ != nullptr) {  // not while it starts
      dog_->moved();
    }
  }

  bool test(Transfer& transfer) {
    int done = 0;
    MPI_Status status;
    const int code = MPI_Test(&transfer.request, &done, &status);
    if (code != MPI_SUCCESS) {
      const int peer = transfer.peer;
      try {
        check(code, "MPI_Test");
      } catch (const CommunicatorError& e) {
        throw CommunicatorError(fmt::format("{}, with rank {} in collective {} ({})", e.what(),
                                            peer, sequence_, what_));
      }
    }
    if (done != 0 && transfer.expected >= 0) {
      int bytes = 0;
      check(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count");
      if (bytes != transfer.expected) {
        throw CommunicatorError(
            fmt::format("[communicator] rank {} sent {} bytes, expected {}, in collective {} ({})",
                        transfer.peer, bytes, transfer.expected, sequence_, what_));
      }
    }
    return done != 0;
  }

  // Sends everybody its addends (rank r's lie at `part(r)`, `bytes[r]` long), receives the others'
  // addends for this rank, and adds them up into `out`.
  template <class Part>
  void add_up(const Part& part, const std::vector<std::int64_t>& bytes, void* out, DType dtype,
              Reduce reduce) {
    const auto self = static_cast<std::size_t>(rank);
    const std::int64_t mine = bytes[self];
    if (!scratch_.defined() || scratch_.bytes() < mine * (size - 1)) {
      scratch_ = Tensor();
      scratch_ =
          Tensor::empty({mine * (size - 1) / 8 + 1}, DType::i64, cpu, MemoryKind::communication);
    }
    char* buffer = static_cast<char*>(scratch_.raw());
    std::vector<const void*> parts;
    for (int r = 0, slot = 0; r < size; ++r) {
      if (r == rank) {
        parts.push_back(part(r));
        continue;
      }
      char* to = buffer + mine * slot++;
      parts.push_back(to);
      receive(to, mine, r, kPayloadTag, payload_);
    }
    for (int r = 0; r < size; ++r) {
      if (r != rank) {
        send(part(r), bytes[static_cast<std::size_t>(r)], r, kPayloadTag, payload_);
      }
    }
    complete();
    reduce_tree(parts, out, mine / static_cast<std::int64_t>(size_bytes(dtype)), dtype, reduce);
  }

  void all_reduce(Collective& c) {
    char* data = static_cast<char*>(raw(c.in));
    const auto width = static_cast<std::int64_t>(size_bytes(c.in.dtype()));
    const std::int64_t step = kPieceBytes / width;
    for (std::int64_t begin = 0; begin < c.in.numel(); begin += step) {
      const std::int64_t count = std::min(step, c.in.numel() - begin);
      std::vector<std::int64_t> bytes;
      for (int r = 0; r < size; ++r) {
        const auto [first, last] = slice_of(count, r, size);
        bytes.push_back((last - first) * width);
      }
      auto slice = [&](int r) { return data + (begin + slice_of(count, r, size).first) * width; };
      add_up(slice, bytes, slice(rank), c.in.dtype(), c.reduce);
      for (int r = 0; r < size; ++r) {
        if (r != rank) {
          receive(slice(r), bytes[static_cast<std::size_t>(r)], r, kPayloadTag, payload_);
        }
      }
      for (int r = 0; r < size; ++r) {
        if (r != rank) {
          send(slice(rank), bytes[static_cast<std::size_t>(rank)], r, kPayloadTag, payload_);
        }
      }
      complete();
    }
  }

  void reduce_scatter(Collective& c) {
    char* in = static_cast<char*>(raw(c.in));
    char* out = static_cast<char*>(raw(c.out));
    const auto width = static_cast<std::int64_t>(size_bytes(c.in.dtype()));
    const std::int64_t part = c.out.numel();
    // The addends of all ranks are in memory at a time.
    const std::int64_t step = std::max<std::int64_t>(1, kPieceBytes / width / size);
    for (std::int64_t begin = 0; begin < part; begin += step) {
      const std::int64_t bytes = std::min(step, part - begin) * width;
      add_up([&](int r) { return in + (r * part + begin) * width; },
             std::vector<std::int64_t>(static_cast<std::size_t>(size), bytes), out + begin * width,
             c.in.dtype(), c.reduce);
    }
  }

  void all_gather(Collective& c) {
    char* in = static_cast<char*>(raw(c.in));
    char* out = static_cast<char*>(raw(c.out));
    const std::int64_t part = c.in.bytes();
    if (part > 0 && out + rank * part != in) {
      std::memmove(out + rank * part, in, static_cast<std::size_t>(part));
    }
    for (std::int64_t begin = 0; begin < part; begin += kPieceBytes) {
      const std::int64_t bytes = std::min(kPieceBytes, part - begin);
      for (int r = 0; r < size; ++r) {
        if (r != rank) {
          receive(out + r * part + begin, bytes, r, kPayloadTag, payload_);
        }
      }
      for (int r = 0; r < size; ++r) {
        if (r != rank) {
          send(in + begin, bytes, r, kPayloadTag, payload_);
        }
      }
      complete();
    }
  }

  void broadcast(Collective& c) {
    char* data = static_cast<char*>(raw(c.in));
    for (std::int64_t begin = 0; begin < c.in.bytes(); begin += kPieceBytes) {
      const std::int64_t bytes = std::min(kPieceBytes, c.in.bytes() - begin);
      for (int r = 0; r < size; ++r) {
        if (rank == c.root && r != rank) {
          send(data + begin, bytes, r, kPayloadTag, payload_);
        }
      }
      if (rank != c.root) {
        receive(data + begin, bytes, c.root, kPayloadTag, payload_);
      }
      complete();
    }
  }

  void agree(Collective& c) {
    if (c.in.numel() > std::numeric_limits<int>::max()) {
      throw CommunicatorError(fmt::format("[agree] too many words: {}", c.in.numel()));
    }
    if (c.in.numel() > 0) {
      check(MPI_Iallreduce(MPI_IN_PLACE, c.in.raw(), static_cast<int>(c.in.numel()), MPI_INT64_T,
                           MPI_BOR, control_, &open_.emplace_back().request),
            "MPI_Iallreduce");
      complete();
    }
  }

  static void* raw(const Tensor& data) { return data.numel() == 0 ? nullptr : data.raw(); }

  // Messages may still be under way: what they read and write must stay.
  void leave_behind(Collective& collective) {
    struct Left {
      Collective collective;
      Tensor scratch;
      std::vector<Transfer> open;
    };
    static std::vector<Left*>& left = *new std::vector<Left*>;
    left.push_back(new Left{collective, scratch_, std::move(open_)});
    open_.clear();
    scratch_ = Tensor();
  }

  const ConnectOptions options_;
  MPI_Comm control_ = MPI_COMM_NULL, payload_ = MPI_COMM_NULL;
  std::vector<Transfer> open_;
  Header header_;
  std::array<std::uint64_t, 2> hashes_{};
  std::vector<Header> headers_;
  Tensor scratch_;
  std::uint64_t sequence_ = 0;
  std::string what_;
  Failure failure_ = Failure::suspected;  // what an error of MPI means
  std::atomic<bool> stopped_ = false;
  std::unique_ptr<Watchdog> dog_;  // last: its thread calls back
};

class MpiCommunicator final : public Communicator {
 public:
  explicit MpiCommunicator(const ConnectOptions& options)
      : options_(options),
        signals_(Watchdog::block_signals()),
        engine_(std::make_shared<Engine>(options)),
        exceptions_(std::uncaught_exceptions()) {}

  ~MpiCommunicator() override {
    if (!closed_ && std::uncaught_exceptions() > exceptions_) {
      // Without waiting: who catches the exception may still say what it was.
      closed_ = true;
      engine_->watchdog()->fail(Failure::own, "an exception left it");
      static auto& left = *new std::vector<std::shared_ptr<Engine>>;
      left.push_back(engine_);
      queue_.finish(std::chrono::milliseconds(0));
      return;
    }
    try {
      close();
    } catch (const Error&) {  // said by the collective that failed, or not to be said here
    }
    pthread_sigmask(SIG_SETMASK, &signals_, nullptr);
  }

  absl::Status connect() {
    std::unique_ptr<RunFile> file;
    if (!options_.run_folder.empty() && options_.expected_rank >= 0) {
      file = RunFile::open(options_.run_folder, options_.expected_rank,
                           fmt::format("pid {}", getpid()));
    }
    const absl::Status status = connect_within_limit();
    if (!status.ok() && file != nullptr) {
      file->write(RunFile::End::refused);
    }
    return status;
  }

  int rank() const override { return engine_->rank; }
  int size() const override { return engine_->size; }

  Pending start(Collective collective) override {
    if (closed_) {
      return Pending::finished("[communicator] it is closed");
    }
    engine_->watchdog()->launched();
    return queue_.push([engine = engine_, c = std::move(collective)]() mutable { engine->run(c); });
  }

  void abort(std::string why) override { end(Failure::own, why); }
  void disagree(std::string why) override { end(Failure::shared, why); }

  void close() override {
    if (std::exchange(closed_, true)) {
      return;
    }
    progress().enter(Phase::ending);
    progress().begin_wait();
    const Pending done = queue_.push([engine = engine_] {
      Collective end;
      end.tag.what = "end of the job";
      engine->run(end);
      engine->finalize();
    });
    queue_.finish(std::chrono::hours(24));  // the watchdog ends the process before
    progress().end_wait();
    done.wait();
    engine_->watchdog()->goodbye();
  }

 private:
  absl::Status connect_within_limit() {
    const Pending started = queue_.push([engine = engine_] { engine->start(); });
    const Clock::time_point end = Clock::now() + options_.start_limit;
    while (!started.done() && Clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!started.done()) {
      closed_ = true;
      queue_.finish(std::chrono::milliseconds(0));
      return absl::DeadlineExceededError(fmt::format(
          "[communicator] MPI did not start within {:.1f} s: {}",
          std::chrono::duration<double>(options_.start_limit).count(), stopped_siblings()));
    }
    try {
      started.wait();
    } catch (const Error& e) {
      closed_ = true;
      return absl::InternalError(e.what());
    }
    return absl::OkStatus();
  }

  void end(Failure failure, const std::string& why) {
    if (!closed_) {
      std::fflush(stdout);
      engine_->watchdog()->fail_and_end(failure, why);
    }
  }

  const ConnectOptions options_;
  const sigset_t signals_;  // blocked before there was a thread
  const std::shared_ptr<Engine> engine_;
  CommQueue queue_;
  const int exceptions_;
  bool closed_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> connect_mpi(const ConnectOptions& options) {
  static std::atomic<bool> connected = false;
  if (connected.exchange(true)) {
    return absl::FailedPreconditionError("MPI can be started only once in a process");
  }
  auto communicator = std::make_unique<MpiCommunicator>(options);
  if (const absl::Status status = communicator->connect(); !status.ok()) {
    return status;
  }
  return communicator;
}

std::string mpi_library() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);  // may be called before MPI_Init
  return std::string(text, static_cast<std::size_t>(length));
}

}  // namespace reprise::distributed

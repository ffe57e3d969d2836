// Collectives over MPI's non-blocking point-to-point calls, all made by one thread.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <sched.h>
#include <time.h>

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include "distributed/comm_queue.h"
#include "distributed/communicator.h"
#include "distributed/disagreement.h"
#include "distributed/rank_tree.h"

namespace reprise::distributed {
namespace {

constexpr int kHeaderTag = 1, kPayloadTag = 2;
// Bounds the buffers of a collective, and keeps MPI's int counts in range.
constexpr std::int64_t kPieceBytes = std::int64_t{32} << 20;
constexpr std::int32_t kAborted = -1;

// Goes to every rank before the payload: a message into a receive that is too small writes past
// its end in some MPIs, so that lengths are compared first.
struct Header {
  std::uint64_t sequence = 0;
  std::int64_t count = 0;
  std::int32_t kind = 0, reduce = 0, dtype = 0, root = 0, bucket = 0, rank = 0;
  char what[40] = {};
  char text[256] = {};  // of an abort
};

void copy_text(char* to, std::size_t size, const std::string& from) {
  const std::size_t n = std::min(size - 1, from.size());
  std::memcpy(to, from.data(), n);
  to[n] = 0;
}

void check(int code, const char* call) {
  if (code != MPI_SUCCESS) {
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw CommunicatorError(fmt::format("[communicator] {}: {}", call, text));
  }
}

// Spins a little, then sleeps: a waiting thread must not take the core from the computing one.
class Backoff {
 public:
  void pause() {
    if (++tests_ <= 20) {
      sched_yield();
      return;
    }
    const bool long_wait = Clock::now() - start_ > std::chrono::milliseconds(10);
    const timespec time{0, long_wait ? 500'000 : 50'000};
    nanosleep(&time, nullptr);
  }

 private:
  int tests_ = 0;
  Clock::time_point start_ = Clock::now();
};

struct Transfer {
  MPI_Request request = MPI_REQUEST_NULL;
  int peer = -1;               // -1: all ranks take part
  std::int64_t expected = -1;  // bytes to receive
};

class Engine {
 public:
  explicit Engine(const ConnectOptions& options) : options_(options) {}

  int rank = 0, size = 1;

  // Waits become short: this rank goes down.
  void hurry() { hurried_ = true; }

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
  }

  void run(Collective& collective) {
    deadline_ = Clock::now() + options_.limit;
    ++sequence_;
    what_ = to_string(collective);
    try {
      exchange_headers(collective);
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
      if (!told_) {
        tell(e.what());
      }
      throw;
    }
  }

  // Every rank's next wait for this one ends with `why`.
  void tell(const std::string& why) {
    told_ = true;
    auto* header = new Header;  // never freed: nobody waits for the messages to leave
    header->kind = kAborted;
    header->rank = rank;
    header->sequence = sequence_;
    copy_text(header->text, sizeof header->text, why);
    std::vector<MPI_Request> requests;
    for (int r = 0; r < size; ++r) {
      if (r != rank) {
        MPI_Request request = MPI_REQUEST_NULL;
        MPI_Isend(header, sizeof *header, MPI_BYTE, r, kHeaderTag, control_, &request);
        requests.push_back(request);
      }
    }
    // A send that is not complete when it returns leaves only inside later calls.
    Backoff backoff;
    const auto end = Clock::now() + std::chrono::seconds(1);
    int sent = 0;
    while (sent == 0 && Clock::now() < end) {
      MPI_Testall(static_cast<int>(requests.size()), requests.data(), &sent, MPI_STATUSES_IGNORE);
      backoff.pause();
    }
  }

  void finalize() {
    scratch_ = Tensor();
    check(MPI_Comm_free(&payload_), "MPI_Comm_free");
    check(MPI_Comm_free(&control_), "MPI_Comm_free");
    check(MPI_Finalize(), "MPI_Finalize");
  }

 private:
  void exchange_headers(const Collective& c) {
    Header mine;
    mine.sequence = sequence_;
    mine.count = c.count();
    mine.kind = static_cast<std::int32_t>(c.kind);
    mine.reduce = static_cast<std::int32_t>(c.reduce);
    mine.dtype = static_cast<std::int32_t>(c.in.defined() ? c.in.dtype() : DType::f32);
    mine.root = c.root;
    mine.bucket = c.tag.bucket;
    mine.rank = rank;
    copy_text(mine.what, sizeof mine.what, c.tag.what);
    headers_.assign(static_cast<std::size_t>(size), Header{});
    headers_[static_cast<std::size_t>(rank)] = mine;
    for (int r = 0; r < size; ++r) {
      if (r != rank) {
        receive(&headers_[static_cast<std::size_t>(r)], sizeof(Header), r, kHeaderTag, control_);
      }
    }
    for (int r = 0; r < size; ++r) {
      if (r != rank) {
        send(&headers_[static_cast<std::size_t>(rank)], sizeof(Header), r, kHeaderTag, control_);
      }
    }
    complete("join");
    compare_headers();
  }

  void compare_headers() {
    auto expect_equal = [&](const char* field, auto&& value_of) {
      std::vector<std::string> values;
      for (const Header& header : headers_) {
        values.push_back(value_of(header));
      }
      if (const std::string text = disagreement(values); !text.empty()) {
        told_ = true;  // all see the same
        throw CommunicatorError(
            fmt::format("[communicator] ranks disagree at collective {} ({}): {}: {}", sequence_,
                        what_, field, text));
      }
    };
    auto number = [](auto x) { return std::to_string(x); };
    expect_equal("purpose", [](const Header& h) { return "\"" + std::string(h.what) + "\""; });
    expect_equal("operation", [](const Header& h) {
      return std::string(name(static_cast<Collective::Kind>(h.kind)));
    });
    expect_equal("bucket", [&](const Header& h) { return number(h.bucket); });
    expect_equal("dtype", [](const Header& h) {
      return std::string(reprise::name(static_cast<DType>(h.dtype)));
    });
    expect_equal("count", [&](const Header& h) { return number(h.count); });
    expect_equal("reduction", [](const Header& h) {
      return std::string(h.reduce == 0 ? "sum" : h.reduce == 1 ? "max" : "min");
    });
    expect_equal("root", [&](const Header& h) { return number(h.root); });
    expect_equal("sequence", [&](const Header& h) { return number(h.sequence); });
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

  // All open transfers; throws at the deadline, and when a header says that its rank gave up.
  void complete(const char* verb) {
    Backoff backoff;
    while (true) {
      std::erase_if(open_, [&](Transfer& transfer) { return test(transfer); });
      for (const Header& header : headers_) {
        if (header.kind == kAborted) {
          told_ = true;  // it told the others too
          throw CommunicatorError(fmt::format("[communicator] rank {} failed: {}", header.rank,
                                              static_cast<const char*>(header.text)));
        }
      }
      if (open_.empty()) {
        return;
      }
      const Clock::time_point now = Clock::now();
      if (now > deadline_ || (hurried_ && now > hurried_deadline())) {
        throw CommunicatorError(fmt::format(
            "[communicator] {} did not {} collective {} ({}) within {:.1f} s of rank {}", missing(),
            verb, sequence_, what_, std::chrono::duration<double>(options_.limit).count(), rank));
      }
      backoff.pause();
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

  std::string missing() const {
    std::vector<int> ranks;
    for (const Transfer& transfer : open_) {
      if (transfer.peer >= 0 && std::ranges::find(ranks, transfer.peer) == ranks.end()) {
        ranks.push_back(transfer.peer);
      }
    }
    if (ranks.empty()) {
      return "some rank";
    }
    std::ranges::sort(ranks);
    std::string text = ranks.size() == 1 ? "rank" : "ranks";
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      text += fmt::format("{} {}", i == 0 ? "" : ",", ranks[i]);
    }
    return text;
  }

  Clock::time_point hurried_deadline() {
    if (!hurried_at_) {
      hurried_at_ = Clock::now() + std::chrono::seconds(2);
    }
    return *hurried_at_;
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
    complete("finish");
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
      complete("finish");
    }
  }

  void reduce_scatter(Collective& c) {
    char* in = static_cast<char*>(raw(c.in));
    char* out = static_cast<char*>(raw(c.out));
    const auto width = static_cast<std::int64_t>(size_bytes(c.in.dtype()));
    const std::int64_t part = c.out.numel();
    const std::int64_t step = kPieceBytes / width;
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
      complete("finish");
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
      complete("finish");
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
      complete("finish");
    }
  }

  static void* raw(const Tensor& data) { return data.numel() == 0 ? nullptr : data.raw(); }

  // Messages may still be under way: what they read and write must stay.
  void leave_behind(Collective& collective) {
    struct Left {
      Collective collective;
      Tensor scratch;
      std::vector<Header> headers;
      std::vector<Transfer> open;
    };
    static std::vector<Left*>& left = *new std::vector<Left*>;
    left.push_back(new Left{collective, scratch_, std::move(headers_), std::move(open_)});
    headers_.clear();
    open_.clear();
    scratch_ = Tensor();
  }

  const ConnectOptions options_;
  MPI_Comm control_ = MPI_COMM_NULL, payload_ = MPI_COMM_NULL;
  std::vector<Transfer> open_;
  std::vector<Header> headers_;
  Tensor scratch_;
  std::uint64_t sequence_ = 0;
  std::string what_;
  Clock::time_point deadline_;
  std::optional<Clock::time_point> hurried_at_;
  std::atomic<bool> hurried_ = false;
  bool told_ = false;
};

class MpiCommunicator final : public Communicator {
 public:
  explicit MpiCommunicator(const ConnectOptions& options)
      : options_(options),
        engine_(std::make_shared<Engine>(options)),
        exceptions_(std::uncaught_exceptions()) {}

  ~MpiCommunicator() override {
    if (std::uncaught_exceptions() > exceptions_) {
      abort("it was left by an exception");
    }
    try {
      if (!closed_) {
        close();
      }
    } catch (const Error&) {  // said by the collective that failed, or not to be said here
    }
  }

  absl::Status connect() {
    const Pending started = queue_.push([engine = engine_] { engine->start(); });
    const Clock::time_point end = Clock::now() + options_.start_limit;
    while (!started.done() && Clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!started.done()) {
      closed_ = true;
      queue_.finish(std::chrono::milliseconds(0));
      return absl::DeadlineExceededError("[communicator] MPI did not start within the limit");
    }
    try {
      started.wait();
    } catch (const Error& e) {
      closed_ = true;
      return absl::InternalError(e.what());
    }
    return absl::OkStatus();
  }

  int rank() const override { return engine_->rank; }
  int size() const override { return engine_->size; }

  Pending start(Collective collective) override {
    if (closed_) {
      return Pending::finished("[communicator] it is closed");
    }
    return queue_.push([engine = engine_, c = std::move(collective)]() mutable { engine->run(c); });
  }

  void abort(std::string why) override {
    if (closed_ || std::exchange(aborted_, true)) {
      return;
    }
    engine_->hurry();
    queue_.push([engine = engine_, why = std::move(why)] {
      engine->tell(why);
      throw CommunicatorError(fmt::format("[communicator] rank {} failed: {}", engine->rank, why));
    });
  }

  void close() override {
    if (std::exchange(closed_, true)) {
      return;
    }
    const Pending done = queue_.push([engine = engine_] {
      Collective end;
      end.tag.what = "end of the job";
      engine->run(end);
      engine->finalize();
    });
    // MPI_Finalize waits without a limit of its own.
    const bool ended = queue_.finish(options_.limit + std::chrono::seconds(5));
    if (!ended) {
      throw CommunicatorError("[communicator] MPI did not end within the limit");
    }
    done.wait();
  }

 private:
  const ConnectOptions options_;
  const std::shared_ptr<Engine> engine_;
  CommQueue queue_;
  const int exceptions_;
  bool closed_ = false, aborted_ = false;
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

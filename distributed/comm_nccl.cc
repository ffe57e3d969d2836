// Collectives by NCCL, all calls made by one thread but those that mark the compute stream.
#include "distributed/comm_nccl.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/progress.h"
#include "distributed/backoff.h"
#include "distributed/comm_queue.h"
#include "distributed/header.h"
#include "distributed/rendezvous.h"

namespace reprise::distributed {
namespace {

using Event = NcclCalls::Event;

std::size_t bytes_of(const Tensor& data) {
  return static_cast<std::size_t>(data.bytes());
}

void* raw(const Tensor& data) {
  return data.numel() == 0 ? nullptr : data.raw();
}

double seconds(std::chrono::milliseconds time) {
  return std::chrono::duration<double>(time).count();
}

// Lives on the communication thread.
class Engine {
 public:
  Engine(const NcclOptions& options, std::unique_ptr<NcclCalls> calls)
      : calls(std::move(calls)), options_(options) {}

  const std::unique_ptr<NcclCalls> calls;

  // Ends what waits.
  void give_up(const std::string& why) {
    const std::lock_guard lock(mutex_);
    given_up_ = why;
    has_given_up_ = true;
  }

  // Before the thread that calls NCCL waits for the others.
  absl::Status watch() {
    WatchdogOptions watchdog = options_.watchdog;
    watchdog.limits.limit = options_.limit;
    watchdog.limits.silence = std::min(watchdog.limits.silence, options_.limit);
    watchdog.start_limit = options_.start_limit;
    watchdog.on_verdict = [this](const std::string& why) { give_up(why); };
    try {
      auto dog = Watchdog::start(options_.rank, options_.size, watchdog, options_.gather);
      if (!dog.ok()) {
        return dog.status();
      }
      dog_ = *std::move(dog);
    } catch (const Error& e) {
      return absl::InternalError(e.what());
    }
    return absl::OkStatus();
  }

  Watchdog* dog() { return dog_.get(); }

  void start(const NcclId& id) {
    starting_ = true;
    deadline_ = Clock::now() + options_.start_limit;
    limit_ = options_.start_limit;
    what_ = "start";
    guarded([&] {
      calls->use_device();
      stream_ = calls->make_stream();
      settle(calls->init(comm_, options_.size, id, options_.rank), "ncclCommInitRankConfig");
    });
    starting_ = false;
  }

  void run(Collective& collective, const Event& ready) {
    begin(collective);
    guarded([&] {
      if (options_.checked) {
        exchange_headers(collective);
      }
      perform(collective, ready);
    });
    if (dog_ != nullptr) {
      dog_->complete();
    }
  }

  // All ranks, when nothing is under way.
  void finish() {
    Collective end;
    end.tag.what = "end of the job";
    run(end, nullptr);
    guarded([&] {
      settle(calls->finalize(comm_), "ncclCommFinalize");
      const NcclResult code = calls->destroy(std::exchange(comm_, nullptr));
      if (code != NcclResult::success) {
        fail_with("ncclCommDestroy", code);
      }
    });
    release_buffers();
    calls->destroy_stream(std::exchange(stream_, nullptr));
  }

  // Instead of finish, once; what is under way ends.
  void abort() {
    if (comm_ != nullptr) {
      calls->use_device();
      calls->abort(std::exchange(comm_, nullptr));
    }
  }

 private:
  void begin(const Collective& collective) {
    deadline_ = Clock::now() + options_.limit;
    limit_ = options_.limit;
    ++sequence_;
    const std::string text = to_string(collective);
    what_ = fmt::format("collective {} ({})", sequence_, text);
    failure_ = Failure::suspected;
    if (dog_ != nullptr) {
      dog_->join(text, collective.in.defined() ? collective.in.bytes() : 0);
    }
    calls->use_device();
  }

  // After an error nothing can be said of the communicator but that it must be aborted: the other
  // calls may wait for ranks that do not come.
  template <class F>
  void guarded(F&& f) {
    try {
      f();
    } catch (const std::exception& e) {
      // First: the end of NCCL's connections looks like an end of this rank to the others.
      if (dog_ != nullptr) {
        dog_->fail(failure_, e.what());
      }
      abort();
      throw;
    }
  }

  void exchange_headers(const Collective& collective) {
    const Header mine = header_of(collective, sequence_, options_.rank);
    std::vector<Header> all(static_cast<std::size_t>(options_.size));
    static_assert(sizeof(Header) % sizeof(std::int64_t) == 0);
    over_buffers({Collective::Kind::all_gather, Reduce::sum, DType::i64, 0, &mine, all.data(),
                  sizeof mine / sizeof(std::int64_t)},
                 sizeof mine, all.size() * sizeof mine, "join");
    if (const std::string text = explain(all); !text.empty()) {
      failure_ = Failure::shared;
      throw CommunicatorError(fmt::format("[communicator] ranks disagree at {}: {}", what_, text));
    }
  }

  void perform(Collective& c, const Event& ready) {
    NcclOperation operation{c.kind, c.reduce, DType::i64, c.root};
    if (c.kind == Collective::Kind::barrier) {
      std::int64_t one = 1;
      operation.kind = Collective::Kind::all_reduce;
      operation.in = operation.out = &one;
      operation.count = 1;
      return over_buffers(operation, sizeof one, sizeof one, "finish");
    }
    if (c.kind == Collective::Kind::agree) {
      return agree(c.in);
    }
    const Tensor& out = c.out.defined() ? c.out : c.in;
    operation.dtype = c.in.dtype();
    operation.in = raw(c.in);
    operation.out = raw(out);
    operation.count = static_cast<std::size_t>(
        c.kind == Collective::Kind::reduce_scatter ? out.numel() : c.in.numel());
    if (ready == nullptr) {
      return over_buffers(operation, bytes_of(c.in), bytes_of(out), "finish");
    }
    if (operation.count > 0) {
      calls->wait_for(stream_, ready);
      enqueue(operation);
      complete("finish");
    }
  }

  // NCCL has no bitwise or.
  void agree(const Tensor& words) {
    const auto count = static_cast<std::size_t>(words.numel());
    const auto ranks = static_cast<std::size_t>(options_.size);
    std::vector<std::int64_t> all(count * ranks);
    over_buffers(
        {Collective::Kind::all_gather, Reduce::sum, DType::i64, 0, raw(words), all.data(), count},
        bytes_of(words), all.size() * sizeof all[0], "finish");
    for (std::size_t i = 0; i < count; ++i) {
      std::int64_t joined = 0;
      for (std::size_t r = 0; r < ranks; ++r) {
        joined |= all[r * count + i];
      }
      words.data<std::int64_t>()[i] = joined;
    }
  }

  // `in` and `out` of the operation are host memory.
  void over_buffers(NcclOperation operation, std::size_t in_bytes, std::size_t out_bytes,
                    const char* verb) {
    if (operation.count == 0) {
      return;
    }
    // Parts of 256 bytes: NCCL is slower where addresses are odd.
    const std::size_t in_room = (in_bytes + 255) / 256 * 256;
    grow_buffers(in_room + out_bytes);
    char* host = static_cast<char*>(pinned_);
    char* device = static_cast<char*>(buffer_);
    std::memcpy(host, operation.in, in_bytes);
    calls->copy(device, host, in_bytes, stream_);
    const bool in_place = operation.in == operation.out;
    void* to = const_cast<void*>(static_cast<const void*>(operation.out));
    const std::size_t at = in_place ? 0 : in_room;
    operation.in = device;
    operation.out = device + at;
    enqueue(operation);
    calls->copy(host + at, device + at, out_bytes, stream_);
    complete(verb);
    std::memcpy(to, host + at, out_bytes);
  }

  void grow_buffers(std::size_t bytes) {
    if (bytes <= buffer_bytes_) {
      return;
    }
    release_buffers();
    buffer_ = calls->allocate(bytes, stream_);
    pinned_ = calls->allocate_pinned(bytes);
    buffer_bytes_ = bytes;
  }

  // Only while nothing is under way.
  void release_buffers() {
    if (buffer_ != nullptr) {
      calls->free(std::exchange(buffer_, nullptr), stream_);
    }
    if (pinned_ != nullptr) {
      calls->free_pinned(std::exchange(pinned_, nullptr));
    }
    buffer_bytes_ = 0;
  }

  void enqueue(const NcclOperation& operation) {
    settle(calls->enqueue(operation, comm_, stream_), name(operation.kind));
  }

  // The communicator takes its next call when the last is no longer in progress.
  void settle(NcclResult code, std::string_view call) {
    Backoff backoff;
    while (code == NcclResult::in_progress) {
      expect_time("begin");
      backoff.pause();
      code = calls->state(comm_);
    }
    if (code != NcclResult::success) {
      fail_with(call, code);
    }
  }

  // What the stream holds.
  void complete(const char* verb) {
    const Event end = calls->mark(stream_);
    Backoff backoff;
    while (true) {
      const bool passed = calls->passed(end);
      const NcclResult code = calls->state(comm_);
      if (code != NcclResult::success && code != NcclResult::in_progress) {
        fail_with(verb, code);
      }
      if (passed) {
        if (dog_ != nullptr) {
          dog_->moved();
        }
        return;
      }
      expect_time(verb);
      backoff.pause();
    }
  }

  void expect_time(const char* verb) {
    if (has_given_up_) {
      const std::lock_guard lock(mutex_);
      throw CommunicatorError(
          fmt::format("[communicator] rank {} failed: {}", options_.rank, given_up_));
    }
    if (dog_ != nullptr && starting_) {
      progress().tick();  // it may take as long as start_limit says
    }
    if (Clock::now() > deadline_ && (dog_ == nullptr || starting_)) {
      throw CommunicatorError(
          fmt::format("[communicator] {} did not {} within {:.1f} s of rank {}; NCCL does not say "
                      "which of the {} ranks it waits for",
                      what_, verb, seconds(limit_), options_.rank, options_.size));
    }
  }

  [[noreturn]] void fail_with(std::string_view call, NcclResult code) {
    throw CommunicatorError(fmt::format(
        "[communicator] rank {}: {} in {}: {}{}", options_.rank, call, what_,
        calls->text(code, comm_),
        code == NcclResult::remote_error ? " (another rank ended or cannot be reached)" : ""));
  }

  const NcclOptions options_;
  NcclCalls::Comm comm_ = nullptr;
  NcclCalls::Stream stream_ = nullptr;
  void *buffer_ = nullptr, *pinned_ = nullptr;
  std::size_t buffer_bytes_ = 0;
  std::uint64_t sequence_ = 0;
  std::string what_;
  Clock::time_point deadline_;
  std::chrono::milliseconds limit_{};
  std::atomic<bool> has_given_up_ = false;
  std::mutex mutex_;
  std::string given_up_;
  bool starting_ = false;
  Failure failure_ = Failure::suspected;  // what an error means
  std::unique_ptr<Watchdog> dog_;         // last: its thread calls back
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(const NcclOptions& options, std::unique_ptr<NcclCalls> calls)
      : options_(options),
        signals_(blocked_signals(options)),
        engine_(std::make_shared<Engine>(options, std::move(calls))),
        exceptions_(std::uncaught_exceptions()) {}

  ~NcclCommunicator() override {
    if (std::uncaught_exceptions() > exceptions_) {
      if (!closed_ && engine_->dog() != nullptr) {
        // Without waiting: who catches the exception may still say what it was.
        closed_ = true;
        engine_->dog()->fail(Failure::own, "an exception left it");
        static auto& left = *new std::vector<std::shared_ptr<Engine>>;
        left.push_back(engine_);
        queue_.finish(std::chrono::milliseconds(0));
        return;
      }
      abort("it was left by an exception");
    }
    try {
      close();
    } catch (const Error&) {  // said by the collective that failed, or not to be said here
    }
    pthread_sigmask(SIG_SETMASK, &signals_, nullptr);
  }

  absl::Status connect(const NcclId& id) {
    if (options_.gather && options_.size > 1) {
      if (absl::Status status = engine_->watch(); !status.ok()) {
        closed_ = true;
        return status;
      }
    }
    try {
      queue_.push([engine = engine_, id] { engine->start(id); }).wait();
    } catch (const Error& e) {
      closed_ = true;
      return absl::InternalError(e.what());
    }
    return absl::OkStatus();
  }

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }
  bool takes(const Tensor& data) const override {
    return data.device().kind == DeviceKind::cpu || engine_->calls->on_device(data);
  }

  Pending start(Collective collective) override {
    if (closed_) {
      return Pending::finished("[communicator] it is closed");
    }
    Event ready;
    const bool on_device = collective.in.defined() && engine_->calls->on_device(collective.in);
    if (collective.out.defined() && engine_->calls->on_device(collective.out) != on_device) {
      fail(name(collective.kind), "in and out must be on the same device, got {} and {}",
           to_string(collective.in.device()), to_string(collective.out.device()));
    }
    if (on_device && collective.kind != Collective::Kind::agree) {
      ready = engine_->calls->mark_compute();
    }
    if (engine_->dog() != nullptr) {
      engine_->dog()->launched();
    }
    return queue_.push([engine = engine_, c = std::move(collective),
                        ready = std::move(ready)]() mutable { engine->run(c, ready); });
  }

  void abort(std::string why) override {
    if (!closed_ && engine_->dog() != nullptr) {
      std::fflush(stdout);
      engine_->dog()->fail_and_end(Failure::own, why);
    }
    if (closed_ || std::exchange(aborted_, true)) {
      return;
    }
    engine_->give_up(why);
    queue_.push([engine = engine_, rank = options_.rank, why = std::move(why)] {
      engine->abort();
      throw CommunicatorError(fmt::format("[communicator] rank {} failed: {}", rank, why));
    });
  }

  void disagree(std::string why) override {
    if (!closed_ && engine_->dog() != nullptr) {
      std::fflush(stdout);
      engine_->dog()->fail_and_end(Failure::shared, why);
    }
    abort(std::move(why));
  }

  void close() override {
    if (std::exchange(closed_, true)) {
      return;
    }
    if (engine_->dog() != nullptr) {
      progress().enter(Phase::ending);
      progress().begin_wait();
      const Pending ended = queue_.push([engine = engine_] { engine->finish(); });
      queue_.finish(std::chrono::hours(24));  // the watchdog ends the process before
      progress().end_wait();
      ended.wait();
      engine_->dog()->goodbye();
      return;
    }
    const Pending done = queue_.push([engine = engine_] { engine->finish(); });
    if (!queue_.finish(2 * options_.limit + std::chrono::seconds(5))) {
      throw CommunicatorError("[communicator] NCCL did not end within the limit");
    }
    done.wait();
  }

 private:
  // Before there is a thread, where the watchdog is to take them.
  static sigset_t blocked_signals(const NcclOptions& options) {
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, nullptr, &now);
    if (options.gather && options.watchdog.signals) {
      Watchdog::block_signals();
    }
    return options.mask.value_or(now);
  }

  const NcclOptions options_;
  const sigset_t signals_;
  const std::shared_ptr<Engine> engine_;
  CommQueue queue_;
  const int exceptions_;
  bool closed_ = false, aborted_ = false;
};

}  // namespace

NcclShare share_over_folder(std::string folder, int rank, int size,
                            std::chrono::milliseconds limit) {
  return [=](NcclId& id) {
    return rendezvous({folder, rank, size, limit}, std::as_writable_bytes(std::span(id)));
  };
}

GatherBytes gather_over_folder(std::string folder, int rank, int size,
                               std::chrono::milliseconds limit) {
  return [=](std::string_view mine) {
    std::string all;
    const absl::Status status =
        rendezvous_of_all({folder + "/cards", rank, size, limit}, mine, all);
    if (!status.ok()) {
      throw CommunicatorError(std::string(status.message()));
    }
    return all;
  };
}

GatherBytes gather_over(Communicator& carrier) {
  return [&carrier](std::string_view mine) {
    ensure(mine.size() % sizeof(std::int64_t) == 0, "gather_over: {} bytes", mine.size());
    const auto words = static_cast<std::int64_t>(mine.size() / sizeof(std::int64_t));
    const Tensor in = Tensor::zeros({words}, DType::i64, cpu, MemoryKind::communication);
    const Tensor out =
        Tensor::zeros({words * carrier.size()}, DType::i64, cpu, MemoryKind::communication);
    std::memcpy(in.raw(), mine.data(), mine.size());
    carrier.all_gather(in, out, {"cards of the ranks"}).wait();
    return std::string(static_cast<const char*>(out.raw()), static_cast<std::size_t>(out.bytes()));
  };
}

NcclShare share_over(Communicator& carrier) {
  return [&carrier](NcclId& id) {
    const Tensor words = Tensor::zeros({static_cast<std::int64_t>(id.size() / 8)}, DType::i64, cpu,
                                       MemoryKind::communication);
    std::memcpy(words.raw(), id.data(), id.size());
    try {
      carrier.broadcast(words, 0, {"NCCL's identifier"}).wait();
    } catch (const Error& e) {
      return absl::InternalError(e.what());
    }
    std::memcpy(id.data(), words.raw(), id.size());
    return absl::OkStatus();
  };
}

absl::StatusOr<NcclShare> nccl_share(const NcclOptions& options, Communicator* carrier) {
  const char* folder = std::getenv("REPRISE_RENDEZVOUS");
  if (folder != nullptr && *folder != 0) {
    return share_over_folder(folder, options.rank, options.size, options.start_limit);
  }
  if (carrier != nullptr) {
    return share_over(*carrier);
  }
  if (options.size == 1) {
    return NcclShare([](NcclId&) { return absl::OkStatus(); });
  }
  return absl::InvalidArgumentError(
      fmt::format("{} ranks need MPI, or a folder that all of them see in REPRISE_RENDEZVOUS, to "
                  "share NCCL's identifier",
                  options.size));
}

absl::StatusOr<std::unique_ptr<Communicator>> connect_nccl(const NcclOptions& options,
                                                           const NcclShare& share) {
  absl::StatusOr<std::unique_ptr<NcclCalls>> calls = nccl_library(options.device);
  if (!calls.ok()) {
    return calls.status();
  }
  return connect_nccl(options, share, *std::move(calls));
}

absl::StatusOr<std::unique_ptr<Communicator>> connect_nccl(const NcclOptions& options,
                                                           const NcclShare& share,
                                                           std::unique_ptr<NcclCalls> calls) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(
        fmt::format("rank must be one of {}, got {}", options.size, options.rank));
  }
  NcclId id{};
  if (options.rank == 0) {
    calls->use_device();
    if (const NcclResult code = calls->make_id(id); code != NcclResult::success) {
      return absl::InternalError("[communicator] ncclGetUniqueId: " + calls->text(code, nullptr));
    }
  }
  if (absl::Status status = share(id); !status.ok()) {
    return status;
  }
  auto communicator = std::make_unique<NcclCommunicator>(options, std::move(calls));
  if (absl::Status status = communicator->connect(id); !status.ok()) {
    return status;
  }
  return communicator;
}

}  // namespace reprise::distributed

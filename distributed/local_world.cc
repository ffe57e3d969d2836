#include "distributed/local_world.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "core/parallel.h"
#include "distributed/comm_queue.h"
#include "distributed/disagreement.h"
#include "distributed/rank_tree.h"

namespace reprise::distributed {
namespace {

// Where the ranks of one world meet: each brings its collective; the last to come does the work
// for all, while the others wait.
class Meeting {
 public:
  Meeting(int size, std::chrono::milliseconds limit)
      : limit_(limit), calls_(static_cast<std::size_t>(size)) {}

  int size() const { return static_cast<int>(calls_.size()); }

  void join(int rank, const Collective& collective) {
    std::unique_lock lock(mutex_);
    expect_going();
    calls_[static_cast<std::size_t>(rank)] = &collective;
    const std::uint64_t round = round_;
    if (++here_ == size()) {
      try {
        compare();
        work();
      } catch (const std::exception& e) {
        stop(e.what());  // the round does not end: nobody goes on
        throw;
      }
      calls_.assign(calls_.size(), nullptr);
      here_ = 0;
      ++round_;
      changed_.notify_all();
      return;
    }
    const bool met =
        changed_.wait_for(lock, limit_, [&] { return round_ != round || !error_.empty(); });
    if (!met) {
      stop(fmt::format(
          "[communicator] {} did not join collective {} ({}) within {:.1f} s of rank {}", missing(),
          round_ + 1, to_string(collective), std::chrono::duration<double>(limit_).count(), rank));
    }
    if (round_ == round) {  // nobody may look at this rank's tensors any more
      calls_[static_cast<std::size_t>(rank)] = nullptr;
      expect_going();
    }
  }

  void abort(int rank, const std::string& why) {
    const std::lock_guard lock(mutex_);
    stop(fmt::format("[communicator] rank {} failed: {}", rank, why));
  }

 private:
  void stop(std::string why) {
    if (error_.empty()) {
      error_ = std::move(why);
    }
    changed_.notify_all();
  }

  void expect_going() const {
    if (!error_.empty()) {
      throw CommunicatorError(error_);
    }
  }

  std::string missing() const {
    std::string text;
    int count = 0;
    for (std::size_t r = 0; r < calls_.size(); ++r) {
      if (calls_[r] == nullptr) {
        text += fmt::format("{}{}", count++ == 0 ? "" : ", ", r);
      }
    }
    return (count == 1 ? "rank " : "ranks ") + text;
  }

  void compare() const {
    auto expect_equal = [&](const char* field, auto&& value_of) {
      std::vector<std::string> values;
      for (const Collective* c : calls_) {
        values.push_back(value_of(*c));
      }
      if (const std::string text = disagreement(values); !text.empty()) {
        throw CommunicatorError(fmt::format(
            "[communicator] ranks disagree at collective {}: {}: {}", round_ + 1, field, text));
      }
    };
    auto dtype = [](const Collective& c) {
      return std::string(c.in.defined() ? reprise::name(c.in.dtype()) : "none");
    };
    expect_equal("purpose", [](const Collective& c) { return "\"" + c.tag.what + "\""; });
    expect_equal("operation", [](const Collective& c) { return std::string(name(c.kind)); });
    expect_equal("bucket", [](const Collective& c) { return std::to_string(c.tag.bucket); });
    expect_equal("dtype", dtype);
    expect_equal("count", [](const Collective& c) { return std::to_string(c.count()); });
    expect_equal("reduction",
                 [](const Collective& c) { return std::to_string(static_cast<int>(c.reduce)); });
    expect_equal("root", [](const Collective& c) { return std::to_string(c.root); });
  }

  // Byte `offset` of rank r's tensor.
  static char* at(const Tensor& t, std::int64_t offset = 0) {
    return t.numel() == 0 ? nullptr : static_cast<char*>(t.raw()) + offset;
  }

  void copy(char* to, const char* from, std::int64_t bytes) const {
    if (bytes > 0 && to != from) {
      std::memmove(to, from, static_cast<std::size_t>(bytes));
    }
  }

  void work() {
    const Collective& first = *calls_[0];
    switch (first.kind) {
      case Collective::Kind::all_reduce:
        all_reduce(first);
        break;
      case Collective::Kind::reduce_scatter:
        reduce_scatter(first);
        break;
      case Collective::Kind::all_gather:
        all_gather(first);
        break;
      case Collective::Kind::broadcast:
        for (const Collective* c : calls_) {
          copy(at(c->in), at(calls_[static_cast<std::size_t>(first.root)]->in), first.in.bytes());
        }
        break;
      case Collective::Kind::agree:
        agree(first);
        break;
      case Collective::Kind::barrier:
        break;
    }
  }

  void all_reduce(const Collective& first) {
    if (first.in.numel() == 0) {
      return;
    }
    std::vector<const void*> parts;
    for (const Collective* c : calls_) {
      parts.push_back(at(c->in));
    }
    reduce_tree(parts, at(first.in), first.in.numel(), first.in.dtype(), first.reduce);
    for (const Collective* c : calls_) {
      copy(at(c->in), at(first.in), first.in.bytes());
    }
  }

  // Into memory of its own: a rank's `out` may lie in its `in`, which others have still to read.
  void reduce_scatter(const Collective& first) {
    const std::int64_t bytes = first.out.bytes();
    if (bytes == 0) {
      return;
    }
    std::vector<char> sums(static_cast<std::size_t>(bytes * size()));
    for (int r = 0; r < size(); ++r) {
      std::vector<const void*> parts;
      for (const Collective* c : calls_) {
        parts.push_back(at(c->in, r * bytes));
      }
      reduce_tree(parts, sums.data() + r * bytes, first.out.numel(), first.in.dtype(),
                  first.reduce);
    }
    for (int r = 0; r < size(); ++r) {
      copy(at(calls_[static_cast<std::size_t>(r)]->out), sums.data() + r * bytes, bytes);
    }
  }

  // A rank's `in` may lie at its place in its `out`.
  void all_gather(const Collective& first) {
    const std::int64_t bytes = first.in.bytes();
    for (int r = 0; r < size(); ++r) {
      const Collective& c = *calls_[static_cast<std::size_t>(r)];
      copy(at(c.out, r * bytes), at(c.in), bytes);
    }
    for (int to = 0; to < size(); ++to) {
      for (int from = 0; from < size(); ++from) {
        copy(at(calls_[static_cast<std::size_t>(to)]->out, from * bytes),
             at(calls_[static_cast<std::size_t>(from)]->out, from * bytes), bytes);
      }
    }
  }

  void agree(const Collective& first) {
    for (std::int64_t i = 0; i < first.in.numel(); ++i) {
      std::int64_t word = 0;
      for (const Collective* c : calls_) {
        word |= c->in.data<std::int64_t>()[i];
      }
      for (const Collective* c : calls_) {
        c->in.data<std::int64_t>()[i] = word;
      }
    }
  }

  const std::chrono::milliseconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<const Collective*> calls_;  // of the round under way
  int here_ = 0;
  std::uint64_t round_ = 0;
  std::string error_;
};

class LocalRank final : public Communicator {
 public:
  LocalRank(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank), exceptions_(std::uncaught_exceptions()) {}

  ~LocalRank() override {
    if (std::uncaught_exceptions() > exceptions_) {
      abort("it was left by an exception");
    }
    try {
      if (!closed_) {
        close();
      }
    } catch (const Error&) {  // said by the collective that failed
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return meeting_->size(); }

  Pending start(Collective collective) override {
    if (closed_) {
      return Pending::finished("[communicator] it is closed");
    }
    return queue_.push(
        [meeting = meeting_, rank = rank_, c = std::move(collective)] { meeting->join(rank, c); });
  }

  void abort(std::string why) override {
    if (!closed_) {
      meeting_->abort(rank_, why);
    }
  }

  void close() override {
    if (closed_) {
      return;
    }
    const Pending end = barrier({"end of the job"});
    closed_ = true;
    end.wait();
  }

 private:
  const std::shared_ptr<Meeting> meeting_;
  const int rank_;
  CommQueue queue_;
  const int exceptions_;
  bool closed_ = false;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> local_world(int size, const LocalOptions& options) {
  if (size < 1) {
    fail("local_world", "size must be positive, got {}", size);
  }
  auto meeting = std::make_shared<Meeting>(size, options.limit);
  std::vector<std::unique_ptr<Communicator>> world;
  for (int r = 0; r < size; ++r) {
    world.push_back(std::make_unique<LocalRank>(meeting, r));
  }
  return world;
}

void run_ranks(int size, const std::function<void(Communicator&)>& body,
               const LocalOptions& options) {
  std::vector<std::unique_ptr<Communicator>> world = local_world(size, options);
  std::mutex mutex;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      std::unique_ptr<Communicator>& mine = world[static_cast<std::size_t>(r)];
      set_threads(options.threads);
      try {
        body(*mine);
        mine->close();
      } catch (const std::exception& e) {
        {
          const std::lock_guard lock(mutex);
          first = first ? first : std::current_exception();
        }
        mine->abort(e.what());
      } catch (...) {
        {
          const std::lock_guard lock(mutex);
          first = first ? first : std::current_exception();
        }
        mine->abort("exception of an unknown type");
      }
      mine.reset();
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (first) {
    std::rethrow_exception(first);
  }
}

}  // namespace reprise::distributed

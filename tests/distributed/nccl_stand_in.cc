#include "tests/distributed/nccl_stand_in.h"

#include <cstdlib>
#include <cstring>

#include "distributed/rank_tree.h"

namespace reprise::testing {
namespace {

using distributed::Collective;

constexpr auto kUnhandledCuda = static_cast<NcclResult>(1);
thread_local const void* device_of_thread = nullptr;

std::size_t bytes_of(const NcclOperation& o) {
  return o.count * size_bytes(o.dtype);
}

}  // namespace

std::vector<std::string> NcclFabric::violations() {
  const std::lock_guard lock(mutex_);
  return violations_;
}

std::vector<std::string> NcclFabric::calls_of(int rank) {
  const std::lock_guard lock(mutex_);
  return calls_[rank];
}

// As all ranks together would have it.
void NcclFabric::perform(Meeting& meeting, int size) {
  std::vector<const NcclOperation*> by_rank(static_cast<std::size_t>(size));
  for (const Arrival& arrival : meeting.arrivals) {
    by_rank[static_cast<std::size_t>(arrival.rank)] = &arrival.operation;
  }
  const NcclOperation& first = *by_rank[0];
  for (const NcclOperation* o : by_rank) {
    if (o->kind != first.kind || o->count != first.count || o->dtype != first.dtype ||
        o->reduce != first.reduce || o->root != first.root) {
      violations_.push_back("ranks enqueue different operations");
      return;  // never complete
    }
  }
  const std::size_t bytes = bytes_of(first);
  std::vector<std::vector<char>> outs;
  for (std::size_t r = 0; r < by_rank.size(); ++r) {
    std::vector<char> out(first.kind == Collective::Kind::all_gather ? bytes * by_rank.size()
                                                                     : bytes);
    std::vector<const void*> parts;
    for (const NcclOperation* o : by_rank) {
      const char* in = static_cast<const char*>(o->in);
      parts.push_back(first.kind == Collective::Kind::reduce_scatter ? in + r * bytes : in);
    }
    if (first.kind == Collective::Kind::broadcast) {
      std::memcpy(out.data(), parts[static_cast<std::size_t>(first.root)], bytes);
    } else if (first.kind == Collective::Kind::all_gather) {
      for (std::size_t p = 0; p < parts.size(); ++p) {
        std::memcpy(out.data() + p * bytes, parts[p], bytes);
      }
    } else {
      distributed::reduce_tree(parts, out.data(), static_cast<std::int64_t>(first.count),
                               first.dtype, first.reduce);
    }
    outs.push_back(std::move(out));
  }
  for (std::size_t r = 0; r < by_rank.size(); ++r) {
    std::memcpy(by_rank[r]->out, outs[r].data(), outs[r].size());
  }
  meeting.complete = true;
}

NcclStandIn::~NcclStandIn() {
  const std::lock_guard lock(fabric_->mutex_);
  if (alive_) {
    violation("the communicator is neither destroyed nor aborted");
  }
  for (auto* kept : {&memory_, &pinned_}) {
    for (const auto& [at, bytes] : *kept) {
      std::free(at);
    }
  }
}

void NcclStandIn::violation(const std::string& text) {
  fabric_->violations_.push_back(std::to_string(rank_) + ": " + text);
}

NcclResult NcclStandIn::enter(const char* call, const void* comm, bool must_be_idle) {
  fabric_->calls_[rank_].push_back(call);
  if (device_of_thread != this) {
    violation(std::string(call) + " on a thread without the device");
  }
  if (comm != this || !alive_) {
    violation(std::string(call) + " without a communicator");
  }
  if (must_be_idle && polls_left_ > 0) {
    violation(std::string(call) + " while the last call is in progress");
  }
  polls_left_ = options_.busy_polls;
  return options_.fail_call == call ? kUnhandledCuda : result();
}

NcclResult NcclStandIn::result() {
  return polls_left_ > 0 ? NcclResult::in_progress : NcclResult::success;
}

NcclResult NcclStandIn::make_id(NcclId& id) {
  const std::lock_guard lock(fabric_->mutex_);
  id.fill(fabric_->next_id_++);
  return options_.fail_call == "ncclGetUniqueId" ? kUnhandledCuda : NcclResult::success;
}

NcclResult NcclStandIn::init(Comm& comm, int size, const NcclId& id, int rank) {
  const std::lock_guard lock(fabric_->mutex_);
  rank_ = rank;
  size_ = size;
  comm = this;
  alive_ = true;
  job_ = &fabric_->jobs_[id];
  if (job_->size != 0 && job_->size != size) {
    violation("ranks give different sizes");
  }
  job_->size = size;
  if (!job_->joined.insert(rank).second) {
    violation("two ranks of one number");
  }
  const NcclResult code = enter("ncclCommInitRankConfig", comm, false);
  polls_left_ = std::max(polls_left_, 1);
  return code == NcclResult::success ? NcclResult::in_progress : code;
}

NcclResult NcclStandIn::state(Comm comm) {
  const std::lock_guard lock(fabric_->mutex_);
  if (comm != this || !alive_) {
    violation("ncclCommGetAsyncError without a communicator");
    return kUnhandledCuda;
  }
  advance();
  if (options_.fail_state_at >= 0 && enqueued_ > options_.fail_state_at) {
    return NcclResult::remote_error;
  }
  if (polls_left_ > 0 && std::ssize(job_->joined) == job_->size) {
    --polls_left_;
  }
  return result();
}

NcclResult NcclStandIn::enqueue(const NcclOperation& operation, Comm comm, Stream stream) {
  const std::lock_guard lock(fabric_->mutex_);
  const NcclResult code = enter(std::string(name(operation.kind)).c_str(), comm, true);
  if (code != NcclResult::success && code != NcclResult::in_progress) {
    return code;
  }
  ++enqueued_;
  const std::uint64_t number = meeting_++;
  give(stream, [this, operation, number, arrived = false]() mutable {
    NcclFabric::Meeting& meeting = job_->meetings[number];
    if (!arrived) {
      arrived = true;
      meeting.arrivals.push_back({operation, rank_});
      if (std::ssize(meeting.arrivals) == size_) {
        fabric_->perform(meeting, size_);
      }
    }
    return meeting.complete;
  });
  return code;
}

NcclResult NcclStandIn::finalize(Comm comm) {
  const std::lock_guard lock(fabric_->mutex_);
  return enter("ncclCommFinalize", comm, true);
}

NcclResult NcclStandIn::destroy(Comm comm) {
  const std::lock_guard lock(fabric_->mutex_);
  const NcclResult code = enter("ncclCommDestroy", comm, true);
  alive_ = false;
  return code == NcclResult::in_progress ? NcclResult::success : code;
}

NcclResult NcclStandIn::abort(Comm comm) {
  const std::lock_guard lock(fabric_->mutex_);
  enter("ncclCommAbort", comm, false);
  alive_ = false;
  line_.left.clear();
  return NcclResult::success;
}

std::string NcclStandIn::text(NcclResult result, Comm) {
  return result == NcclResult::remote_error ? "remote process exited" : "unhandled cuda error";
}

void NcclStandIn::use_device() {
  device_of_thread = this;
}

NcclCalls::Stream NcclStandIn::make_stream() {
  const std::lock_guard lock(fabric_->mutex_);
  if (std::exchange(has_stream_, true)) {
    violation("a second stream");
  }
  return &line_;
}

void NcclStandIn::destroy_stream(Stream stream) {
  const std::lock_guard lock(fabric_->mutex_);
  advance();  // memory is given back in order of the stream
  if (stream != &line_ || !std::exchange(has_stream_, false) || !line_.left.empty()) {
    violation("a stream destroyed that is not there or not done");
  }
  if (!memory_.empty() || !pinned_.empty()) {
    violation("memory is left");
  }
}

void NcclStandIn::give(const void* stream, std::function<bool()> work) {
  if (stream != &line_ || !has_stream_) {
    violation("work on a stream that is not there");
  }
  line_.left.push_back(std::move(work));
  ++line_.given;
}

void NcclStandIn::advance() {
  if (!computed_ && looks_++ >= options_.compute_polls) {
    computed_ = true;
    if (options_.compute) {
      options_.compute();
    }
  }
  while (!line_.left.empty() && line_.left.front()()) {
    line_.left.pop_front();
    ++line_.done;
  }
}

bool NcclStandIn::mark_passed(const Mark& mark) {
  return mark.compute ? computed_ : line_.done >= mark.position;
}

NcclCalls::Event NcclStandIn::mark_compute() {
  return std::make_shared<Mark>(Mark{true, 0});
}

NcclCalls::Event NcclStandIn::mark(Stream stream) {
  const std::lock_guard lock(fabric_->mutex_);
  if (stream != &line_) {
    violation("a mark on a stream that is not there");
  }
  return std::make_shared<Mark>(Mark{false, line_.given});
}

void NcclStandIn::wait_for(Stream stream, const Event& event) {
  const std::lock_guard lock(fabric_->mutex_);
  give(stream, [this, mark = *static_cast<const Mark*>(event.get())] { return mark_passed(mark); });
}

bool NcclStandIn::passed(const Event& event) {
  const std::lock_guard lock(fabric_->mutex_);
  advance();
  return mark_passed(*static_cast<const Mark*>(event.get()));
}

void* NcclStandIn::allocate(std::size_t bytes, Stream) {
  const std::lock_guard lock(fabric_->mutex_);
  void* at = std::malloc(bytes);
  memory_[at] = bytes;
  return at;
}

void NcclStandIn::free(void* at, Stream stream) {
  const std::lock_guard lock(fabric_->mutex_);
  give(stream, [this, at] {
    if (memory_.erase(at) == 0) {
      violation("memory given back that is not there");
    } else {
      std::free(at);
    }
    return true;
  });
}

void* NcclStandIn::allocate_pinned(std::size_t bytes) {
  const std::lock_guard lock(fabric_->mutex_);
  void* at = std::malloc(bytes);
  pinned_[at] = bytes;
  return at;
}

void NcclStandIn::free_pinned(void* at) {
  const std::lock_guard lock(fabric_->mutex_);
  if (!line_.left.empty() && line_.done + 1 < line_.given) {
    violation("pinned memory given back while work is under way");
  }
  if (pinned_.erase(at) == 0) {
    violation("pinned memory given back that is not there");
  }
  std::free(at);
}

void NcclStandIn::copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  const std::lock_guard lock(fabric_->mutex_);
  give(stream, [to, from, bytes] {
    std::memcpy(to, from, bytes);
    return true;
  });
}

}  // namespace reprise::testing

#include "distributed/communicator.h"

#include <algorithm>
#include <utility>

#include "core/progress.h"

namespace reprise::distributed {
namespace {

void check(const Communicator& communicator, std::string_view where, std::string_view which,
           const Tensor& data) {
  if (!data.defined()) {
    fail(where, "{} is undefined", which);
  }
  if (!communicator.takes(data)) {
    fail(where, "{} must be in memory that this communicator can use, got {}", which,
         to_string(data.device()));
  }
  if (!data.is_contiguous()) {
    fail(where, "{} must be contiguous: call contiguous()", which);
  }
}

void check_parts(const Communicator& communicator, std::string_view where,
                 std::string_view large_name, const Tensor& large, std::string_view small_name,
                 const Tensor& small) {
  const int size = communicator.size();
  check(communicator, where, large_name, large);
  check(communicator, where, small_name, small);
  if (large.dtype() != small.dtype()) {
    fail(where, "{} must be {} as {}, got {}", small_name, name(large.dtype()), large_name,
         name(small.dtype()));
  }
  if (large.numel() != small.numel() * size) {
    fail(where, "{} must have {} ranks * {} elements = {}, got {}", large_name, size, small.numel(),
         small.numel() * size, large.numel());
  }
}

}  // namespace

Pending Pending::finished(std::string error) {
  auto state = std::make_shared<State>();
  state->done = true;
  state->error = std::move(error);
  state->started = state->finished = Clock::now();
  return Pending(std::move(state));
}

bool Pending::done() const {
  if (state_ == nullptr) {
    return true;
  }
  const std::lock_guard lock(state_->mutex);
  return state_->done;
}

void Pending::wait() const {
  if (state_ == nullptr) {
    return;
  }
  std::unique_lock lock(state_->mutex);
  if (!state_->done) {
    progress().begin_wait();
    state_->changed.wait(lock, [&] { return state_->done; });
    progress().end_wait();
  }
  if (!state_->error.empty()) {
    throw CommunicatorError(state_->error);
  }
}

Clock::time_point Pending::started_at() const {
  const std::lock_guard lock(state_->mutex);
  return state_->started;
}

Clock::time_point Pending::finished_at() const {
  const std::lock_guard lock(state_->mutex);
  return state_->finished;
}

std::string_view name(Collective::Kind kind) {
  switch (kind) {
    case Collective::Kind::all_reduce:
      return "all_reduce";
    case Collective::Kind::reduce_scatter:
      return "reduce_scatter";
    case Collective::Kind::all_gather:
      return "all_gather";
    case Collective::Kind::broadcast:
      return "broadcast";
    case Collective::Kind::agree:
      return "agree";
    case Collective::Kind::barrier:
      return "barrier";
  }
  return "?";
}

std::string to_string(const Collective& collective) {
  std::string text(name(collective.kind));
  if (collective.in.defined()) {
    text += fmt::format(" of {} {}", collective.in.numel(), name(collective.in.dtype()));
  }
  text += " (" + collective.tag.what;
  if (collective.tag.bucket >= 0) {
    text += fmt::format(", bucket {}", collective.tag.bucket);
  }
  return text + ")";
}

Pending Communicator::all_reduce(const Tensor& data, Reduce reduce, Tag tag) {
  check(*this, "all_reduce", "data", data);
  return start({Collective::Kind::all_reduce, reduce, 0, data, {}, std::move(tag)});
}

Pending Communicator::reduce_scatter(const Tensor& in, const Tensor& out, Reduce reduce, Tag tag) {
  check_parts(*this, "reduce_scatter", "in", in, "out", out);
  return start({Collective::Kind::reduce_scatter, reduce, 0, in, out, std::move(tag)});
}

Pending Communicator::all_gather(const Tensor& in, const Tensor& out, Tag tag) {
  check_parts(*this, "all_gather", "out", out, "in", in);
  return start({Collective::Kind::all_gather, Reduce::sum, 0, in, out, std::move(tag)});
}

Pending Communicator::broadcast(const Tensor& data, int root, Tag tag) {
  check(*this, "broadcast", "data", data);
  if (root < 0 || root >= size()) {
    fail("broadcast", "root must be a rank of {}, got {}", size(), root);
  }
  return start({Collective::Kind::broadcast, Reduce::sum, root, data, {}, std::move(tag)});
}

Pending Communicator::agree(const Tensor& words, Tag tag) {
  check(*this, "agree", "words", words);
  if (words.device().kind == DeviceKind::cuda) {
    fail("agree", "words must be in host memory, got {}", to_string(words.device()));
  }
  if (words.dtype() != DType::i64) {
    fail("agree", "words must be i64, got {}", name(words.dtype()));
  }
  return start({Collective::Kind::agree, Reduce::sum, 0, words, {}, std::move(tag)});
}

Pending Communicator::barrier(Tag tag) {
  return start({Collective::Kind::barrier, Reduce::sum, 0, {}, {}, std::move(tag)});
}

std::string library_version() {
  const std::string mpi = mpi_library();
  return "Reprise " REPRISE_VERSION + (mpi.empty() ? std::string() : ", " + mpi.substr(0, 60));
}

double all_reduce_value(Communicator& communicator, double value, Reduce reduce, std::string what) {
  const Tensor data = Tensor::full({1}, DType::f64, value, cpu, MemoryKind::communication);
  communicator.all_reduce(data, reduce, {std::move(what)}).wait();
  return data.item<double>();
}

}  // namespace reprise::distributed

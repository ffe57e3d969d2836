// Communicator: the ranks of one job and the collectives between them.
//
// Every rank calls the same collectives in the same order. A call checks its arguments, puts the
// work at the end of a queue and returns; the tensors' elements must not be touched until the
// handle is done. Collectives run one after the other, in order, on a thread of their own.
//
//   Pending sum = communicator.all_reduce(bucket, Reduce::sum, {"gradients", 3});
//   ...
//   sum.wait();
//
// Sums: one fixed binary tree over rank numbers, ((0+1)+(2+3))+..., in f32 for f32 and bf16 (bf16
// is rounded once, at the end). So the result does not depend on timing or on how tensors are cut
// into calls, and is the same on all ranks, bit for bit. i32 and i64 wrap around.
//
// Errors: the caller's mistakes throw Error at once. What goes wrong between ranks (they disagree
// about the collective, one has failed, is gone, or makes no progress within the limit, MPI reports
// an error) ends the job: one message that names rank and collective, exit code 86 on every rank
// (watchdog.h). wait() throws CommunicatorError meanwhile. Nothing waits for ever.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include <absl/status/statusor.h>

#include "core/tensor.h"

namespace reprise::distributed {

using Clock = std::chrono::steady_clock;

class CommunicatorError : public Error {
  using Error::Error;
};

enum class Reduce : std::uint8_t { sum, max, min };

// Names a collective in errors; part of what ranks must agree on.
struct Tag {
  std::string what;  // the first 39 characters count
  int bucket = -1;
};

// A handle to a collective under way. Copies refer to the same one.
class Pending {
 public:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    std::string error;  // empty: it went well
    Clock::time_point started, finished;
  };
  Pending() = default;  // nothing under way
  explicit Pending(std::shared_ptr<State> state) : state_(std::move(state)) {}
  // Done already, with this error if not empty.
  static Pending finished(std::string error = {});

  bool valid() const { return state_ != nullptr; }
  bool done() const;
  // Returns when done; throws CommunicatorError.
  void wait() const;
  // Once done: when the collective was taken from the queue, and when it was complete.
  Clock::time_point started_at() const;
  Clock::time_point finished_at() const;

 private:
  std::shared_ptr<State> state_;
};

struct Collective {
  enum class Kind : std::uint8_t {
    all_reduce,
    reduce_scatter,
    all_gather,
    broadcast,
    agree,
    barrier
  };
  Kind kind = Kind::barrier;
  Reduce reduce = Reduce::sum;
  int root = 0;
  Tensor in, out;  // all_reduce, broadcast, agree: `in`, in place
  Tag tag;

  std::int64_t count() const { return in.defined() ? in.numel() : 0; }
};
std::string_view name(Collective::Kind kind);
// "all_reduce of 12 f32 (gradients, bucket 3)".
std::string to_string(const Collective& collective);

class Communicator {
 public:
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Tensors: contiguous, in memory that takes() says; f32, bf16, f64, i32, i64.
  // data[i] = reduction over ranks of data[i].
  Pending all_reduce(const Tensor& data, Reduce reduce, Tag tag);
  // out = part rank() of the reduction of `in`, which has size() parts of out's size.
  Pending reduce_scatter(const Tensor& in, const Tensor& out, Reduce reduce, Tag tag);
  // Part r of `out` = `in` of rank r.
  Pending all_gather(const Tensor& in, const Tensor& out, Tag tag);
  // data = data of rank root.
  Pending broadcast(const Tensor& data, int root, Tag tag);
  // words[i] = bitwise or over ranks; i64, in host memory.
  Pending agree(const Tensor& words, Tag tag);
  // Done when every rank has called it.
  Pending barrier(Tag tag);

  // Whether collectives can be given this tensor's memory: of the host, unless said otherwise.
  virtual bool takes(const Tensor& data) const { return data.device().kind != DeviceKind::cuda; }

  // This rank cannot go on. With other ranks: the job ends, this process included, within two
  // seconds and with a message that has this text; does not return. Alone: every later collective
  // throws CommunicatorError with it.
  virtual void abort(std::string why) = 0;
  // The same for what every rank finds at the same time, with the same text: none is to blame.
  virtual void disagree(std::string why) { abort(std::move(why)); }
  // Waits for all ranks and ends the engine; throws CommunicatorError. The destructor calls it and
  // swallows errors; when an exception is under way it ends the job instead, but waits for nothing.
  virtual void close() = 0;

  // The work behind the calls above, whose arguments are checked by now.
  virtual Pending start(Collective collective) = 0;
};

// reduction over ranks of one number; waits.
double all_reduce_value(Communicator& communicator, double value, Reduce reduce, std::string what);

// "Reprise 0.1.0, Open MPI v4.1.4, ..."
std::string library_version();

struct ConnectOptions {
  int expected_size = 0,
      expected_rank = -1;  // as the launcher's environment says; 0, -1: not known
  // A rank that makes no progress for so long, and does not wait for others, ends the job; so does
  // a collective that all ranks have joined. Work that does not count (core/progress.h) must be
  // shorter.
  std::chrono::milliseconds limit = std::chrono::seconds(30);
  // So does a rank that is not heard for so long (at most `limit`): stopped, or out of reach.
  std::chrono::milliseconds silence = std::chrono::seconds(10);
  // So does a start: it waits for processes to be launched, which a busy machine does slowly.
  std::chrono::milliseconds start_limit = std::chrono::seconds(120);
  // Compare what every collective is before its payload moves. Without it only the agreement that
  // opens a step and barriers are compared.
  bool checked = true;
  std::string version = library_version();  // must be equal on all ranks
  std::string run_folder;                   // see run_folder.h; empty: none
};

// One process: every collective is done at once.
std::unique_ptr<Communicator> world_of_one();
// The ranks that mpirun started. Once in the life of a process. FailedPrecondition when this build
// has no MPI or it was connected before; Internal when MPI does not start, or as another size.
absl::StatusOr<std::unique_ptr<Communicator>> connect_mpi(const ConnectOptions& options);
// "Open MPI v4.1.4, ..." as compiled in; empty without MPI.
std::string mpi_library();

}  // namespace reprise::distributed

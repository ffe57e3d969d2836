// NCCL and CUDA without either: ranks are threads of one process, streams are lists of what is to
// be done, worked off when somebody asks how far they are. What NCCL does not allow is written down
// as a violation.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "distributed/nccl_calls.h"

namespace reprise::testing {

using distributed::Communicator;
using distributed::NcclCalls;
using distributed::NcclId;
using distributed::NcclOperation;
using distributed::NcclResult;

// What the ranks of a job share.
class NcclFabric {
 public:
  std::vector<std::string> violations();
  // "all_reduce", "ncclCommAbort", ... in order, of one rank.
  std::vector<std::string> calls_of(int rank);

 private:
  friend class NcclStandIn;
  struct Arrival {
    NcclOperation operation;
    int rank;
  };
  struct Meeting {
    std::vector<Arrival> arrivals;
    bool complete = false;
  };
  struct Job {
    int size = 0;
    std::set<int> joined;
    std::map<std::uint64_t, Meeting> meetings;
  };
  void perform(Meeting& meeting, int size);

  std::mutex mutex_;
  std::map<NcclId, Job> jobs_;
  std::map<int, std::vector<std::string>> calls_;
  std::vector<std::string> violations_;
  char next_id_ = 1;
};

class NcclStandIn final : public NcclCalls {
 public:
  struct Options {
    int busy_polls = 0;      // each call is in progress for so many looks at the state
    bool on_device = true;   // whether tensors (of the host, here) count as device memory
    std::string fail_call;   // this call fails, as NCCL's unhandled CUDA error
    int fail_state_at = -1;  // the state is a remote error from this enqueued operation on
    // What the compute stream has yet to do, done when the compute stream is first asked after
    // `compute_polls` looks at a stream.
    std::function<void()> compute;
    int compute_polls = 0;
  };
  NcclStandIn(std::shared_ptr<NcclFabric> fabric, Options options)
      : fabric_(std::move(fabric)), options_(std::move(options)) {}
  ~NcclStandIn() override;

  NcclResult make_id(NcclId& id) override;
  NcclResult init(Comm& comm, int size, const NcclId& id, int rank) override;
  NcclResult state(Comm comm) override;
  NcclResult enqueue(const NcclOperation& operation, Comm comm, Stream stream) override;
  NcclResult finalize(Comm comm) override;
  NcclResult destroy(Comm comm) override;
  NcclResult abort(Comm comm) override;
  std::string text(NcclResult result, Comm comm) override;
  void use_device() override;
  bool on_device(const Tensor&) override { return options_.on_device; }
  Stream make_stream() override;
  void destroy_stream(Stream stream) override;
  Event mark_compute() override;
  Event mark(Stream stream) override;
  void wait_for(Stream stream, const Event& event) override;
  bool passed(const Event& event) override;
  void* allocate(std::size_t bytes, Stream stream) override;
  void free(void* at, Stream stream) override;
  void* allocate_pinned(std::size_t bytes) override;
  void free_pinned(void* at) override;
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override;

 private:
  struct Mark {
    bool compute = false;
    std::uint64_t position = 0;  // of its stream
  };
  struct Line {
    std::deque<std::function<bool()>> left;  // each says whether it is done
    std::uint64_t given = 0, done = 0;
  };
  bool mark_passed(const Mark& mark);
  void advance();
  void violation(const std::string& text);
  // Notes the call; what NCCL must answer before it does anything.
  NcclResult enter(const char* call, const void* comm, bool must_be_idle);
  NcclResult result();
  void give(const void* stream, std::function<bool()> work);

  const std::shared_ptr<NcclFabric> fabric_;
  const Options options_;
  NcclFabric::Job* job_ = nullptr;
  int rank_ = -1, size_ = 0;
  bool alive_ = false;  // the communicator
  int polls_left_ = 0, enqueued_ = 0;
  std::uint64_t meeting_ = 0;
  Line line_;
  bool has_stream_ = false, computed_ = false;
  int looks_ = 0;
  std::map<void*, std::size_t> memory_, pinned_;
};

}  // namespace reprise::testing

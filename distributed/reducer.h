// Reducer: gradients become the mean over ranks while backward still runs.
//
//   Reducer reducer(communicator, trainable_parameters);     // on all ranks
//   ...
//   for all micro-batches but the last:
//     reducer.accumulate(loss);                              // sums, no communication
//   reducer.backward(loss);                                  // reduces; gradients are final
//   optimizer.step();
//
// Gradients live in buckets, laid out in the order in which the first sweep makes them ready (rank
// 0's order, if ranks differ). A bucket is launched when its last parameter is ready, in the order
// of the buckets, in every sweep including the first. It makes no difference how often a parameter
// is used, or whether segments are replayed: ready means that the tape has counted to zero.
//
// Ranks may take different branches. A parameter that no rank used since the last reduction keeps
// its gradient, or stays without; one that some rank used gets zeros from the others. A change of
// what is trainable (on all ranks) makes new buckets.
//
// Errors: ranks that differ in parameters, dtypes, settings or steps throw CommunicatorError on all
// ranks before any gradient is sent; it names the first difference. A parameter that is not ready
// exactly once throws InternalError; a reached one that the reducer does not have throws Error.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "autograd/tape.h"
#include "distributed/buckets.h"
#include "distributed/communicator.h"

namespace reprise::distributed {

struct ReducerOptions {
  BucketOptions buckets;
  double divisor = 0;  // of the sums over ranks; 0: the number of ranks
};

// What happened in a reduction, in order of time.
struct ReducerEvent {
  enum class Kind : std::uint8_t {
    plan,      // backward is about to begin
    ready,     // parameter `index` of the reducer's list
    launch,    // bucket `index`
    complete,  // bucket `index`
    swept,     // backward has ended
  };
  Kind kind = Kind::plan;
  std::int64_t sequence = 0;
  std::size_t index = 0;
  Clock::time_point time;
};

class Reducer {
 public:
  // The communicator and the parameters must outlive the reducer. Throws Error for a parameter
  // that is there twice. A collective: all ranks make theirs with the same list and options.
  Reducer(Communicator& communicator, std::vector<Parameter*> parameters,
          ReducerOptions options = {});
  Reducer(const Reducer&) = delete;
  ~Reducer();

  // Backward whose gradients are reduced; on return they are final. When it throws, the other ranks
  // are told (Communicator::abort).
  void backward(std::span<const Variable> losses, BackwardOptions options = {});
  void backward(const Variable& loss, BackwardOptions options = {});
  // Backward of a micro-batch that is not the last of its step.
  void accumulate(std::span<const Variable> losses, BackwardOptions options = {});
  void accumulate(const Variable& loss, BackwardOptions options = {});

  // The same in parts, for a caller that runs backward itself: attach(options), backward(losses,
  // options), finish(). Callbacks that are set in the options already run too.
  void attach(BackwardOptions& options);
  void finish();
  void attach_accumulation(BackwardOptions& options);

  const std::vector<Parameter*>& parameters() const { return parameters_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  std::int64_t steps() const { return step_; }
  // Of the last reduction.
  const std::vector<ReducerEvent>& events() const { return events_; }

 private:
  struct BucketState {
    Tensor data;
    std::size_t left = 0;  // parameters not ready yet
    Pending pending;
  };
  struct ParameterState {
    std::size_t bucket = 0, slot = 0;
    bool active = false;   // trainable when the buckets were made
    bool touched = false;  // by a sweep since the last reduction
    bool reduced = false;  // its gradient is what the last reduction left
    bool used = false;     // in this reduction, by this rank
    int expected = 0, ready = 0;
    Tensor before;  // its gradient, when nobody may have used it
  };
  enum class Phase : std::uint8_t { idle, attached, sweeping };

  void begin(const Plan& plan);
  void note_uses(const Plan& plan);
  void ensure_layout(const Plan& plan);
  void bind_buckets(std::span<const std::int32_t> order);
  void start_agreement();
  void finish_agreement();
  void contribute_unused();
  void became_ready(Parameter& p);
  void launch_ready();
  void settle(std::size_t i, double divisor);
  void collect_events();
  void log(ReducerEvent::Kind kind, std::size_t index);
  std::size_t index_of(const Parameter& p) const;
  Tensor slot_of(std::size_t i) const;
  bool used_anywhere(std::size_t i) const;
  std::string signature(std::size_t i) const;
  std::uint64_t signatures_hash() const;
  std::uint64_t state_hash() const;
  [[noreturn]] void explain(const char* when);

  Communicator& communicator_;
  const std::vector<Parameter*> parameters_;
  const ReducerOptions options_;
  std::unordered_map<const Parameter*, std::size_t> index_;
  std::vector<ParameterState> states_;
  std::vector<Bucket> buckets_;
  std::vector<BucketState> bucket_states_;
  std::optional<std::uint64_t> layout_signature_;
  std::size_t next_bucket_ = 0;
  std::size_t ready_count_ = 0, active_count_ = 0;
  Tensor words_;  // state hash, its complement, a bit per used parameter
  Pending agreement_;
  bool agreed_ = false;
  Phase phase_ = Phase::idle;
  std::int64_t step_ = 0;
  std::vector<ReducerEvent> events_;
};

}  // namespace reprise::distributed

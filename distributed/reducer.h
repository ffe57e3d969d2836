// Reducer: gradients become the mean over ranks while backward still runs.
//
//   Reducer reducer(communicator, trainable_parameters);     // on all ranks
//   ...
//   for all micro-batches but the last:
//     reducer.accumulate(loss);                              // sums, no communication
//   reducer.backward(loss);                                  // reduces; gradients are final
//   nn::clip_global_norm(reducer.parameters(), 1.0);         // the same bits on every rank
//   optimizer.step();
//
// Gradients live in buckets, laid out in the order in which the first sweep makes them ready. A
// bucket is launched when its last parameter is ready, in the order of the buckets, in every sweep
// including the first. It makes no difference how often a parameter is used, or whether segments
// are replayed: ready means that the tape has counted to zero. Nothing is copied, but for a
// gradient that is there and that the losses of this rank do not reach.
//
// Ranks may take different branches: a layout holds every trainable parameter, so any agreed one
// fits any plan. When the lowest live rank's plan has been another than the layout's twice in a row
// its order is taken over, before the next step; orders are kept by plan. A parameter that no rank
// used since the last reduction keeps its gradient, or stays without; one that some rank used gets
// zeros from the others. A change of what is trainable (on all ranks) makes new buckets.
//
// Micro-batches are summed: scale each loss (BackwardOptions::scale) by what it counts, or let the
// tokens be counted: with Mean::tokens the losses are sums over tokens, add_tokens(n) says for each
// micro-batch how many, and gradients are divided by the number over all ranks and micro-batches
// (by 1 if there are none).
//
// Uneven data: a rank that has run out calls join() instead of backward() until that is false.
//
//   while (true) {
//     if (data.next(batch)) reducer.backward(model.loss(batch)); else if (!reducer.join()) break;
//     optimizer.step();                                      // on every rank, with the same bits
//   }
//
// Shards: with `shards` = V the global batch is V fixed shards, rank r of N has shards [rV/N,
// (r+1)V/N), each its own micro-batch, and gradients are added in one binary tree over shard
// numbers (distributed/shard_sums.h): every N that divides V gives the same bits. It takes more
// memory: shard_bytes().
//
// Errors: ranks that differ in parameters, dtypes, settings or steps throw CommunicatorError
// on all ranks before any gradient is sent; it names the first difference. A parameter that is not
// ready exactly once, or a bucket that is not launched once and complete, throws InternalError that
// names the parameter, its expected and seen counts and the records that contribute. A parameter
// that the losses reach and the reducer does not have throws Error.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd/tape.h"
#include "distributed/buckets.h"
#include "distributed/communicator.h"
#include "distributed/shard_sums.h"

namespace reprise::distributed {

enum class Mean : std::uint8_t {
  ranks,   // by the number of ranks, or of shards
  tokens,  // by what add_tokens() counted, over all ranks
};

struct ReducerOptions {
  BucketOptions buckets;
  Mean mean = Mean::ranks;
  double divisor = 0;  // of the sums over ranks, whatever `mean` says; 0: as `mean` says
  // With Mean::ranks, ranks that have run out of data do not count: the first world's size or the
  // live one divides.
  bool divide_by_live = true;
  // Buckets of f32 travel as bf16: added in f32 and rounded once, half the bytes.
  bool compress = false;
  int shards = 0;  // of the global batch, a multiple of the ranks; 0: none
};

// What happened in a reduction, in order of time.
struct ReducerEvent {
  enum class Kind : std::uint8_t {
    plan,      // backward is about to begin
    ready,     // parameter `index` of the reducer's list
    launch,    // bucket `index`
    complete,  // bucket `index`
    update,    // bucket `index`: the early update has run
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
  // that is there twice, gradients that are neither f32 nor bf16, and options that do not fit
  // together. A collective: all ranks make theirs with the same list and options.
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
  // For Mean::tokens: those of a micro-batch, before its backward() or accumulate().
  void add_tokens(std::int64_t count);
  // For a rank that has run out of data, instead of backward(): takes part in the reduction with
  // zeros, and gets the same gradients as the others. False, with nothing reduced, when all ranks
  // have run out.
  bool join();

  // From now on `update` is called with the parameters of each bucket, during backward(), once
  // their gradients are final and no record that may still run or be replayed reads their values:
  // an optimizer's update that needs no other gradients gives the same bits as after backward().
  // Called on the thread of backward(); the gradients may be zeroed in it. Values that another tape
  // has read must not be updated: its backward would throw. An empty function ends it.
  void update_early(std::function<void(std::span<Parameter* const>)> update);

  // The same in parts, for a caller that runs backward itself: attach(options), backward(losses,
  // options), finish(). Callbacks that are set in the options already run too.
  void attach(BackwardOptions& options);
  void finish();
  // For micro-batches that are not the last: attach_accumulation(options), backward(losses,
  // options), finish_accumulation().
  void attach_accumulation(BackwardOptions& options);
  void finish_accumulation();

  const std::vector<Parameter*>& parameters() const { return parameters_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  std::int64_t steps() const { return step_; }
  // Of the last reduction.
  const std::vector<ReducerEvent>& events() const { return events_; }
  std::int64_t tokens() const { return tokens_; }  // over all ranks
  int live() const { return live_; }               // ranks that had data
  bool plans_differed() const { return plans_differed_; }
  // How often an order was taken over from another plan, since the start.
  std::int64_t reorders() const { return reorders_; }
  // What shards cost beyond the gradients themselves, at most so far.
  std::int64_t shard_bytes() const;

 private:
  struct BucketState {
    Tensor data;
    Tensor sent;           // what travels when it is not `data`: compressed, or nodes of shards
    Tensor gathered;       // nodes of all ranks
    std::size_t left = 0;  // parameters not ready yet
    std::size_t read = 0;  // parameters whose values may still be read
    int launches = 0;
    bool settled = false;
    Pending pending;
  };
  struct ParameterState {
    std::size_t bucket = 0, slot = 0;
    bool active = false;     // trainable when the buckets were made
    bool touched = false;    // by a sweep since the last reduction
    bool reduced = false;    // its gradient is what the last reduction left
    bool used = false;       // in this reduction, by this rank
    bool planned = false;    // in this sweep's plan
    bool read_last = false;  // its value is not read any more
    bool carried = false;    // it had a reduced gradient before this step's first sweep
    int expected = 0, ready = 0;
    Tensor before;  // its gradient, when nobody may have used it
  };
  enum class Phase : std::uint8_t { idle, attached, attached_accumulation, sweeping };
  // Of an agreement. What comes first has the same length whatever the parameters are.
  struct RankWord {
    bool done = false;
    std::int64_t tokens = 0;
    std::uint64_t plan = 0;
  };

  // reducer.cc
  void begin(const Plan& plan);
  void start_reduction(bool done);
  void note_uses(const Plan& plan);
  void contribute_unused();
  void became_ready(Parameter& p);
  void count_ready(std::size_t i);
  void not_read_any_more(Parameter& p);
  void launch_ready();
  void launch(std::size_t b);
  void settle(std::size_t b);
  void settle_parameter(std::size_t i, double divisor);
  void update_what_can_be();
  void update(std::size_t b);
  double divisor() const;
  void expect_all_ready() const;
  void finish_reduction();
  void collect_events();
  void log(ReducerEvent::Kind kind, std::size_t index);
  std::size_t index_of(const Parameter& p) const;
  Tensor slot_of(std::size_t i) const;
  std::string describe(std::size_t i) const;
  void expect_idle() const;
  template <class F>
  void guarded(F&& f);

  // reducer_layout.cc
  bool ensure_layout(const Plan* plan);
  void bind_buckets(std::span<const std::int32_t> order);
  std::vector<Tensor> make_set() const;
  std::vector<std::int32_t> order_of(const Plan* plan) const;
  std::uint64_t plan_hash(const Plan& plan) const;
  void remember_order(std::uint64_t plan, std::vector<std::int32_t> order);
  void choose_order();

  // reducer_shards.cc
  void expect_shard(bool last) const;
  void store_shard();
  void launch_shards(std::size_t b);
  void settle_shards(std::size_t b);
  ShardPlaces shard_places() const { return {options_.shards, communicator_.size()}; }
  int next_shard() const { return shard_places().shard(communicator_.rank(), shards_done_); }

  // reducer_agreement.cc
  void start_agreement(bool done);
  void finish_agreement();
  RankWord rank_word(int rank) const;
  int lead() const;  // the lowest rank with data; -1: none
  bool used_anywhere(std::size_t i) const;
  std::string signature(std::size_t i) const;
  std::uint64_t signatures_hash();
  std::uint64_t state_hash();
  std::uint64_t layout_hash() const;
  [[noreturn]] void explain(const std::string& when);

  Communicator& communicator_;
  const std::vector<Parameter*> parameters_;
  const ReducerOptions options_;
  std::unordered_map<const Parameter*, std::size_t> index_;
  std::vector<ParameterState> states_;
  std::function<void(std::span<Parameter* const>)> update_;

  std::vector<Bucket> buckets_;
  std::vector<BucketState> bucket_states_;
  std::optional<std::uint64_t> layout_signature_;
  std::uint64_t layout_plan_ = 0;  // whose order the layout has
  std::map<std::uint64_t, std::vector<std::int32_t>> orders_;
  std::uint64_t last_lead_plan_ = 0;
  std::vector<std::int32_t> next_order_;  // to be taken over before the next step; empty: none
  std::vector<char> signature_key_;       // what signatures_hash() was computed of
  std::uint64_t signature_value_ = 0;

  // Of the step under way.
  std::vector<Contribution> contributions_;
  std::vector<std::int32_t> plan_order_;
  std::uint64_t plan_ = 0;
  std::size_t next_bucket_ = 0, next_update_ = 0;
  std::size_t ready_count_ = 0, active_count_ = 0;
  std::int64_t own_tokens_ = 0;
  bool tokens_counted_ = false;
  int shards_done_ = 0;
  ShardSums shard_sums_;
  std::int64_t shard_sets_ = 0, gathered_bytes_ = 0;
  Tensor words_;
  Pending agreement_;
  bool agreed_ = false;
  bool made_ = false;  // the constructor's agreement is over

  Phase phase_ = Phase::idle;
  std::int64_t step_ = 0, tokens_ = 0, reorders_ = 0;
  int live_ = 0;
  bool plans_differed_ = false;
  std::vector<ReducerEvent> events_;
};

}  // namespace reprise::distributed

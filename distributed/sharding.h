// Sharding: what is the same on all ranks is kept once, a slice on each rank.
//
//   ForwardReads reads = record_reads(meta_model.parameters(), [&] { meta_model.loss(meta_batch);
//   }); Sharding sharding(communicator, model.parameters(), reads, {.stage = 3});   // on all ranks
//   nn::AdamW optimizer(sharding.shards());
//   for (;;) {
//     sharding.zero_gradients();
//     sharding.accumulate(model.loss(first));      // micro-batches but the last, if any
//     sharding.backward(model.loss(last));
//     optimizer.step(rate, nn::clip_coefficient(sharding.global_norm(), 1.0));
//     sharding.updated();
//   }
//
// Stage 1 cuts the optimizer's state, stage 2 the gradients too, stage 3 the values too. Bytes of a
// rank of N, for P parameters of v bytes with gradients of g bytes and s bytes of state:
//
//   unsharded   P (v + g + s)
//   stage 1     P (v + g + s / N)
//   stage 2     P (v + g / N + s / N) + gradients of at most two units
//   stage 3     P (v + g + s) / N     + values and gradients of at most two units each
//
// and padding (distributed/shard_units.h). A weight that is read at both ends of a forward stays in
// between; under segments nested by halves a sweep keeps what an outer replay has gathered until
// its last read. Micro-batches that only accumulate keep whole gradients.
//
// The result has the bits of an unsharded run on as many ranks (distributed/reducer.h), of its
// losses, values, optimizer states and norm: every element is summed over ranks in the same tree,
// and the norm in the same chunks. Adapters: what is frozen is gathered at stage 3 and never has a
// gradient; at the other stages it is left as it is.
//
// The parameters' gradients are gone after backward at stages 2 and 3: those of shards() count. At
// stage 3 their values are there for a Variable only; Tensors of them (Parameter::value()) have a
// layout and no elements outside of an op.
//
// Ranks may use different parameters and take different branches at every stage
// (distributed/sharded_values.h says what that costs at stage 3), may have more or fewer
// micro-batches, and may run out of data: join(). At stage 3 the caller's own collectives belong
// after backward(), accumulate() or end_forward(), of which every forward needs one.
//
// Errors: the caller's mistakes throw Error; ranks that differ in parameters, reads, stage or step
// throw CommunicatorError.
//
// Source of the stages: Rajbhandari, Rasley, Ruwase, He, "ZeRO: memory optimizations toward
// training trillion parameter models", SC 2020.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "autograd/tape.h"
#include "distributed/communicator.h"
#include "distributed/reducer.h"
#include "distributed/shard_units.h"
#include "distributed/sharded_gradients.h"
#include "distributed/sharded_values.h"

namespace reprise::distributed {

struct ShardingOptions {
  int stage = 3;
  // As of an unsharded run, with its bits. Buckets are of stage 1; at the others units are.
  ReducerOptions reduction = {};
  // Stage 3, segments in segments: a unit that a sweep does not read again before so many others
  // goes, and is gathered again. 0: it stays from its first read to its last, gathered once. An
  // outer replay then has the values of all that it runs through.
  std::size_t gather_again = 0;
};

class Sharding final : public ParameterHost {
 public:
  // A part of a parameter that this rank has: [first, first + values.numel()) in row-major order.
  struct Part {
    std::int64_t first = 0;
    Tensor values;  // [n]; shares the shard's memory
  };

  // `parameters`: all of a model, frozen ones too, the same list on all ranks; they, their values
  // and the communicator must outlive this. `reads` may be empty: then parameters are units of
  // kind and nothing is gathered ahead in the first forward. The values are taken from the
  // parameters; those without elements are to be written through parts_of().
  Sharding(Communicator& communicator, std::vector<Parameter*> parameters,
           const ForwardReads& reads, const ShardingOptions& options = {});
  // The parameters have no gradients from then on, and at stage 3 no values.
  ~Sharding() override;

  // What this rank's optimizer steps: parts of the trainable parameters, flat, of their names.
  const std::vector<Parameter*>& shards() const { return shards_; }
  // After the optimizer's step: what the ranks have updated reaches all of them.
  void updated();
  void zero_gradients();
  // nn::global_norm of the gradients of all shards of all ranks. A collective at stages 2 and 3.
  // Throws Error with an early update, which would come before a clip by it.
  double global_norm();

  // As those of Reducer.
  void backward(const Variable& loss, BackwardOptions options = {});
  void accumulate(const Variable& loss, BackwardOptions options = {});
  void add_tokens(std::int64_t count);
  bool join();
  // As Reducer's, of the shards of this rank: those of a unit, at stage 1 of a bucket, as soon as
  // their gradients are final and nothing reads the values on any rank. updated() belongs after
  // backward() all the same. Where ranks' sweeps differ at stage 3 it is called at the end.
  void update_early(std::function<void(std::span<Parameter* const>)> update);
  // The same in parts, for a caller that runs backward itself.
  void attach(BackwardOptions& options);
  void finish();
  void attach_accumulation(BackwardOptions& options);
  void finish_accumulation();
  // After a forward without a backward, on all ranks: at stage 3 a collective. Lets go of what was
  // gathered.
  void end_forward();

  int stage() const { return options_.stage; }
  const std::vector<ShardUnit>& units() const { return units_; }
  const std::vector<Parameter*>& parameters() const { return parameters_; }
  // Of a parameter whose values are cut (stage 3) or that is updated in parts (trainable): what
  // this rank has of it. Not sharded: nothing.
  std::vector<Part> parts_of(const Parameter& p) const;
  bool is_sharded(const Parameter& p) const { return slots_.contains(&p); }
  // After parts were written from outside, on all ranks.
  void values_written();
  // The whole value on all ranks, of MemoryKind::workspace. A collective.
  Tensor gathered(const Parameter& p) const;
  // The whole gradient after backward(); undefined when no rank has used the parameter. A
  // collective.
  Tensor gathered_gradient(const Parameter& p) const;
  // The same of anything that is cut as `p` is: `own` is this rank's part of it, undefined where
  // parts_of(p) is empty. A collective at every stage.
  Tensor assembled(const Parameter& p, const Tensor& own, DType dtype) const;
  // Stage 3: since the last clear_gathers().
  std::span<const GatherEvent> gathers() const;
  void clear_gathers();
  // Stages 2 and 3: units whose gradients the last reduction has sent, in order.
  std::span<const std::size_t> scattered() const;

  void before_read(const Parameter& p) override;
  Tensor gradient_storage(const Parameter& p) override;

 private:
  struct Place {
    std::size_t unit, slot;
  };
  struct Shard {
    std::unique_ptr<Parameter> parameter;
    std::size_t source = 0;  // number of the parameter it is of
    std::size_t unit = 0;
    std::int64_t at = 0;     // in the unit's shard
    std::int64_t first = 0;  // in the parameter
  };
  void agree_on_layout() const;
  void hold_whole_values();
  void make_shards();
  void hook(BackwardOptions& options, bool reduce);
  void bind_shard_gradients();
  void bind_gradient_of(const Shard& shard);
  void begin(const Plan& plan, bool reduce);
  void end_reduction();
  void not_read_any_more(const Parameter& p);
  void update_what_can_be();
  void update_unit(std::size_t unit);
  bool join_sharded();
  template <class F>
  void guarded(F&& f);
  Tensor shard_values(std::size_t unit) const;
  bool used(std::size_t parameter) const;
  double norm_of_parts() const;

  Communicator& communicator_;
  const std::vector<Parameter*> parameters_;
  const ShardingOptions options_;
  std::vector<ShardUnit> units_;
  std::unordered_map<const Parameter*, Place> slots_;
  std::vector<Tensor> whole_;                    // stages 1 and 2: by unit, [N * slice]
  std::unique_ptr<ShardedValues> values_;        // stage 3
  std::unique_ptr<ShardedGradients> gradients_;  // stages 2 and 3
  std::unique_ptr<Reducer> reducer_;             // stage 1
  std::vector<Shard> owned_;
  std::vector<Parameter*> shards_;
  std::function<void(std::span<Parameter* const>)> update_;
  // Of an early update, by unit: parameters whose values may still be read; done.
  std::vector<std::size_t> reads_left_;
  std::vector<char> updated_early_;
  bool updates_ = false;  // in this sweep
  bool waits_ = false;    // stage 3: this rank's sweep was its last, others have more
};

}  // namespace reprise::distributed

// One model, one optimizer, one step after the other.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/philox.h"
#include "distributed/sharding.h"
#include "nn/models/model.h"
#include "nn/optimizer/adamw.h"

namespace reprise::train {

// Thrown for a loss that is not finite: the text names the step and the first op whose output is
// not. Also for gradients that are not: the step and the first parameter.
class Diverged : public Error {
  using Error::Error;
};

// Whether steps on a cuda device become launches of a graph.
enum class StepGraphs : std::uint8_t {
  off,
  on,
  // Where the first step shows that its ops are so small that giving them to the device takes
  // longer than doing them, and where nothing forbids it (sharding, hooks, texts that share a row).
  // What turns out to be impossible to capture goes on without.
  automatic,
};

struct TrainerOptions {
  nn::AdamWOptions adamw;
  double max_norm = 1.0;  // of all gradients together; 0: not clipped
  Policies policies;
  // On a cuda device: a step is captured into a graph of the device and launched, so that the host
  // gives it one call instead of one for each kernel (core/captured_step.h). Same bits. Of each
  // kind of step the first two are done one kernel after another, and the third is captured.
  // Batches of another shape, other micro-batches or another scale are another kind: done one
  // kernel after another, until three in a row make a graph in place of the one before. A batch's
  // tensors may be on the device or on the host; they are copied. Gradients are absent after a
  // step.
  StepGraphs graph = StepGraphs::off;
};

// Calls before and after each backward; empty: nothing.
struct SweepHooks {
  std::function<void(BackwardOptions&)> before;
  std::function<void()> after;
  // Instead of these around a micro-batch that is not the last of its step.
  std::function<void(BackwardOptions&)> before_accumulation;
  std::function<void()> after_accumulation;
  // Of the policy table, where gradients are cut: makes them absent; a digest of the whole ones.
  std::function<void()> zero_gradients;
  std::function<std::string()> digest;
  // Once, with the trainable parameters that the loss does not reach; empty: a line to standard
  // error.
  std::function<void(const std::vector<Parameter*>&)> unreached;
};

class Trainer {
 public:
  // The model's trainable parameters are the optimizer's, or with `sharding`, made of the model's
  // parameters, this rank's parts of them. `generator` feeds its dropout. All must outlive the
  // trainer. Throws Error when everything is frozen, and for a graph with sharding or off the
  // device.
  Trainer(nn::Model& model, Generator& generator, TrainerOptions options,
          distributed::Sharding* sharding = nullptr);

  // What happens around backward, for reduction over ranks.
  SweepHooks hooks;

  // Forward, backward, clip, update. With StepGraphs::on it throws Error for what cannot be
  // captured, such as a model that reads elements on the host. Returns the loss before the update;
  // 0 for a model on meta, where a step is a dry run with the same allocations. Throws Diverged
  // before anything is updated, and OutOfMemory, which says what every policy would take
  // (what_fits.h).
  double step(const nn::Batch& batch, double learning_rate);
  // Forward and backward only: gradients as they stand after the sweep.
  double forward_backward(const nn::Batch& batch);
  // The same with several micro-batches, whose gradients add up: each loss counts `scale`. Returns
  // the mean of the losses.
  double step(std::span<const nn::Batch> micro_batches, double learning_rate, double scale);
  double forward_backward(std::span<const nn::Batch> micro_batches, double scale);
  // Loss without gradients, in evaluation mode. Throws Diverged.
  double evaluate(const nn::Batch& batch);

  // What is trained, the optimizer's state, the step and dropout's place in its random numbers, in
  // a folder (distributed/sharded_state.h). A run that goes on from there, on any number of ranks,
  // does what one would that was not interrupted. Collectives.
  absl::Status save(const std::string& folder, distributed::Communicator& ranks);
  absl::Status resume(const std::string& folder, distributed::Communicator& ranks);

  std::int64_t steps() const { return steps_; }
  const std::vector<Parameter*>& parameters() const { return parameters_; }
  void set_policies(Policies policies);
  // After a change of the model that is none of its parameters' values (adapters switched): the
  // next steps make another graph.
  void forget_graph();
  // Steps that were launches of a graph, the capture's own among them.
  std::int64_t launches() const;
  const TapeReport& tape_report() const { return tape_.report(); }

 private:
  double explained(std::span<const nn::Batch> micro_batches, bool updates,
                   const std::function<double()>& step);
  double sweeps(std::span<const nn::Batch> micro_batches, double scale);
  double sweep(const nn::Batch& batch, double scale, bool last);
  BackwardOptions sweep_options(double scale);
  void report_unreached(const std::vector<Parameter*>& parameters);
  // The factor that clips the gradients.
  double clip_scale();
  [[noreturn]] void explain_gradients(double norm, std::string_view first) const;
  // train/trainer_graph.cc
  struct Graph;
  std::shared_ptr<Graph> make_graph() const;
  bool wants_graph(std::span<const nn::Batch> micro_batches);
  double plain_step(std::span<const nn::Batch> micro_batches, double learning_rate, double scale);
  double graph_step(std::span<const nn::Batch> micro_batches, double learning_rate, double scale);
  void record_step(double scale);
  double finite_loss(std::uint64_t first_offset);
  double global_norm();
  void zero_gradients();
  [[noreturn]] void explain_non_finite(const nn::Batch& batch, std::uint64_t first_offset,
                                       double loss, std::string_view when);

  nn::Model& model_;
  Generator& generator_;
  TrainerOptions options_;
  distributed::Sharding* const sharding_;
  std::vector<Parameter*> parameters_;
  nn::AdamW optimizer_;
  Tape tape_;
  std::int64_t steps_ = 0;
  bool unreached_reported_ = false;
  std::shared_ptr<Graph> graph_;  // null: without
};

}  // namespace reprise::train

// The AdamW optimizer over parameters.
//
//   nn::AdamW optimizer(model.trainable_parameters(), {.weight_decay = 0.01});
//   for (std::int64_t k = 0; k < steps; ++k) {
//     backward(model.loss(batch));
//     optimizer.step(schedule.at(k));
//     optimizer.zero_gradients();
//   }
//
// kernels/adamw.h has the formula.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd/parameter.h"
#include "core/tensor.h"

namespace reprise::nn {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;                // of parameters given without a group of their own
  std::optional<DType> state_dtype = {};  // of m and v, f32 or bf16; absent: the parameter's dtype
  bool master_weights = false;            // f32 copies of parameters that are not f32
};

class AdamW {
 public:
  struct Group {
    std::vector<Parameter*> parameters = {};
    double weight_decay = 0;
  };

  // The parameters must outlive the optimizer and have names, each a different one.
  explicit AdamW(std::vector<Parameter*> parameters, const AdamWOptions& options = {});
  explicit AdamW(std::span<const Group> groups, const AdamWOptions& options = {});

  // Updates every parameter that has a gradient; the others keep value, moments and step count.
  // `gradient_scale` multiplies the gradients on the way, as clip_coefficient gives it.
  // Throws Error, before anything is changed, when a gradient is stale, when a setting is not a
  // number in its range, or when a value was written by someone else after its master was made.
  void step(double learning_rate, double gradient_scale = 1);
  // The same for some of the parameters: any partition of them, in any order, gives the bits of one
  // step. Throws Error for one that is not the optimizer's.
  void step_some(std::span<Parameter* const> parameters, double learning_rate,
                 double gradient_scale = 1);
  void zero_gradients();

  // A step whose numbers lie in memory, so that it may be captured (core/captured_step.h):
  //
  //   scalars.copy_from(optimizer.next_scalars(learning_rate));    // before each launch
  //   optimizer.step_from(scalars);                                // in the step
  //   optimizer.advance();                                         // after each launch
  //
  // f32 [parameters, kernels::kAdamWScalars] in host memory, a row for each parameter. Throws Error
  // for a setting out of its range, and for a value written after its master was made.
  Tensor next_scalars(double learning_rate, double gradient_scale = 1) const;
  // step() by the rows of `scalars`, which is on the parameters' device and read when the kernels
  // run. A parameter whose gradient scale is NaN stays as it is: kernels::adamw_gradient_scale.
  void step_from(const Tensor& scalars);
  // Counts the step that step_from() took or will take at each launch.
  void advance();

  // The masters are copied from the values again, after somebody has written these.
  void reload_masters();

  // States of a parameter are made, of MemoryKind::optimizer, at its first step. Under "NAME.m",
  // "NAME.v", "NAME.step" (i64 []) and, with masters, "NAME.master": what a run needs to go on.
  // They share the optimizer's storage.
  std::vector<std::pair<std::string, Tensor>> state() const;
  // Copies what state() of an optimizer with the same options gave; parameters without entries
  // begin anew. Load the parameters before. Throws Error, before anything is changed, for entries
  // that are unknown, doubled, incomplete, or of another shape or dtype.
  void load_state(std::span<const std::pair<std::string, Tensor>> state);

  const std::vector<Parameter*>& parameters() const { return parameters_; }
  const AdamWOptions& options() const { return options_; }

 private:
  struct Slot {
    double decay = 0;
    std::int64_t step = 0;
    Tensor m, v, master;
    std::uint64_t version = 0;  // of the value that the master stands for
  };
  DType state_dtype(const Parameter& p) const;
  bool has_master(const Parameter& p) const;
  Slot fresh_slot(const Parameter& p, double decay) const;
  void step_slots(std::span<const std::size_t> which, double learning_rate, double gradient_scale);
  void expect_master_of_value(std::size_t i) const;

  AdamWOptions options_;
  std::vector<Parameter*> parameters_;
  std::vector<Slot> slots_;
  std::unordered_map<const Parameter*, std::size_t> index_;
  std::vector<std::size_t> in_memory_;  // those that step_from() updates
};

// Whether weight decay is left out by name: biases and norms, as Hugging Face's Trainer has it
// (names in lower case that hold "bias", "layernorm", "rmsnorm", "norm" between dots or ends, or
// end a part in
// "_norm"). Layer norms that are named otherwise (GPT-2's ln_1) must be told apart by the caller.
bool is_decay_excluded(std::string_view name);

// Two groups: those that decay by `weight_decay`, and the rest.
std::vector<AdamW::Group> decay_groups(std::span<Parameter* const> parameters, double weight_decay);

}  // namespace reprise::nn

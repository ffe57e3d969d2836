// Where the sweep puts gradients: of values on their cells, of parameters so that a failure leaves
// each untouched or complete. Internal to autograd.
#pragma once

#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

#include "autograd/op.h"
#include "autograd/sweep_plan.h"
#include "autograd/tape_state.h"

namespace reprise {

// The gradients of the parameters in one sweep.
class ParameterGradients {
 public:
  ParameterGradients(SweepPlan& plan, const BackwardOptions& options);
  // After a failure: gradients that were absent are absent again, the others complete or untouched
  // (or as before, with undo); all are stale. Ends the sweep's claim on the parameters otherwise.
  ~ParameterGradients();

  // Where a kernel may write the next contribution directly.
  Target target(Parameter& p);
  // The contribution is in target()'s tensor.
  void written(Parameter& p, const Tensor& tensor);
  // The contribution is in a buffer; `exclusive`: nobody else will look at it again.
  void add(Parameter& p, Tensor gradient, bool exclusive);
  // on_ready of the parameters that this sweep does not reach.
  void start();
  // Checks that all fired; the gradients stay.
  void finish();

 private:
  struct State {
    int left = 0;
    bool touched = false;
    bool had_gradient = false;
    Tensor sum;  // contributions of this sweep, where they must not go to the gradient yet
    Tensor undo;
  };
  State& touch(Parameter& p);
  void contributed(Parameter& p, State& state);
  void fire(Parameter& p);

  std::string describe(const Parameter& p) const;

  const SweepPlan& sweep_;
  const Plan& plan_;
  const BackwardOptions& options_;
  std::unordered_map<Parameter*, State> states_;
  std::size_t fired_ = 0;
  bool finished_ = false;
};

// Adds a contribution to the gradient of a value: the first is taken over, later ones are added,
// into a copy when somebody else has the buffer.
void add_gradient(Value& value, Tensor gradient);

}  // namespace reprise

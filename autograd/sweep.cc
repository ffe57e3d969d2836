// The sweep: one pass over the records, last to first.
#include <algorithm>
#include <optional>

#include "autograd/gradients.h"
#include "autograd/parameter_sweep.h"
#include "autograd/replay.h"
#include "autograd/sweep_plan.h"
#include "autograd/tape_state.h"
#include "core/progress.h"

namespace reprise {
namespace {

// What one record's backward sees, and where its results go once it has returned.
class SweepBackward final : public Backward {
 public:
  SweepBackward(const TapeState& tape, const Record& record, ParameterGradients& parameters)
      : tape_(tape), record_(record), parameters_(parameters) {}

  // Reads the saved values and takes the gradients off the outputs.
  void load(const std::vector<Value*>& ones) {
    const auto inputs = tape_.inputs(record_);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const bool saved = (record_.saved.inputs >> i & 1u) != 0;
      input_tensors_.push_back(inputs[i] == nullptr ? Tensor()
                               : saved              ? inputs[i]->read()
                                                    : inputs[i]->tensor);
    }
    const auto outputs = tape_.outputs(record_);
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      const bool saved = (record_.saved.outputs >> k & 1u) != 0;
      output_tensors_.push_back(saved ? outputs[k]->read() : outputs[k]->tensor);
      gradient_tensors_.push_back(std::move(outputs[k]->gradient));
      outputs[k]->gradient = Tensor();
      ones_ |= Mask{std::ranges::find(ones, outputs[k]) != ones.end()} << k;
    }
    inputs_ = input_tensors_;
    outputs_ = output_tensors_;
    gradients_ = gradient_tensors_;
    wanted_ = record_.gradients;
    results_.resize(inputs.size());
  }

  Cost cost() const {
    return record_.op->backward_cost(Call(inputs_, outputs_), record_.gradients);
  }

  Target into(std::size_t i, int reuse) override {
    Result& result = claim(i);
    Value& value = *tape_.inputs(record_)[i];
    Target target;
    if (claimed_before(i)) {
      target = {fresh(i), false};
    } else if (value.is_parameter() && dtype_of_gradient(i) != value.parameter->grad_dtype()) {
      target = {fresh(i), false};
    } else if (value.is_parameter()) {
      target = parameters_.target(*value.parameter);
      result.direct = true;
    } else if (value.gradient.defined()) {
      if (value.gradient.storage_references() > 1) {
        value.gradient = value.gradient.clone();
      }
      target = {value.gradient, true};
      result.direct = true;
    } else if (reuse >= 0 && reusable(static_cast<std::size_t>(reuse), value)) {
      const Tensor& taken = gradient_tensors_[static_cast<std::size_t>(reuse)];
      target = {taken.as_view(value.tensor.shape(), contiguous_strides(value.tensor.shape()),
                              taken.offset()),
                false};
    } else {
      target = {fresh(i), false};
    }
    result.tensor = target.tensor;
    return target;
  }

  void give(std::size_t i, Tensor gradient) override {
    const Value& value = *tape_.inputs(record_)[i];
    ensure(gradient.shape() == value.tensor.shape(),
           "{} gave a gradient of shape {} for an input of shape {}", record_.op->name(),
           to_string(gradient.shape()), to_string(value.tensor.shape()));
    claim(i).tensor = std::move(gradient);
  }

  // Hands the results over, in the order of the inputs; to be called before the saved values go.
  void commit() {
    inputs_ = outputs_ = {};
    input_tensors_.clear();
    output_tensors_.clear();
    gradient_tensors_.clear();
    for (std::size_t i = 0; i < results_.size(); ++i) {
      if (!wants(i)) {
        continue;
      }
      ensure(results_[i].tensor.defined(), "{} gave no gradient for its input {}",
             record_.op->name(), i);
      Value& value = *tape_.inputs(record_)[i];
      Tensor gradient = std::move(results_[i].tensor);
      if (value.is_parameter()) {
        if (results_[i].direct) {
          parameters_.written(*value.parameter, gradient);
        } else {
          const bool exclusive = give_up_saved(gradient);
          parameters_.add(*value.parameter, std::move(gradient), exclusive);
        }
      } else if (!results_[i].direct) {
        give_up_saved(gradient);
        add_gradient(value, std::move(gradient));
      }
    }
  }

 private:
  struct Result {
    Tensor tensor;
    bool direct = false;  // in its place already
  };

  Result& claim(std::size_t i) {
    ensure(wants(i), "{} has a gradient for input {}, which needs none", record_.op->name(), i);
    ensure(!results_[i].tensor.defined(), "{} has two gradients for input {}", record_.op->name(),
           i);
    return results_[i];
  }
  // The same value stands at two inputs of the record: the second must not write where the first
  // is still being written.
  bool claimed_before(std::size_t i) const {
    const auto inputs = tape_.inputs(record_);
    for (std::size_t j = 0; j < inputs.size(); ++j) {
      const bool same =
          inputs[j] == inputs[i] || (inputs[j] != nullptr && inputs[i]->is_parameter() &&
                                     inputs[j]->parameter == inputs[i]->parameter);
      if (j != i && same && results_[j].tensor.defined()) {
        return true;
      }
    }
    return false;
  }
  // In which the op can write it.
  DType dtype_of_gradient(std::size_t i) const {
    const Value& value = *tape_.inputs(record_)[i];
    const bool weight = value.is_parameter() && (record_.op->weights() >> i & 1u) != 0;
    return weight ? value.parameter->grad_dtype() : value.tensor.dtype();
  }
  Tensor fresh(std::size_t i) const {
    const Tensor& layout = tape_.inputs(record_)[i]->tensor;
    return Tensor::empty(layout.shape(), dtype_of_gradient(i), layout.device(),
                         MemoryKind::activations);
  }
  bool reusable(std::size_t k, const Value& value) const {
    const Tensor& g = gradient_tensors_[k];
    return g.defined() && g.storage_references() == 1 && g.dtype() == value.tensor.dtype() &&
           g.numel() == value.tensor.numel() && g.storage_bytes() == g.bytes();
  }
  // A saved value given as a gradient: when nobody needs the value any more its buffer changes
  // hands, else the gradient must be a copy. Returns whether the buffer is the gradient's alone.
  bool give_up_saved(Tensor& gradient) const {
    bool saved = false;
    tape_.each_saved(record_, [&](Value* v) {
      Value& root = *v->root;
      if (!root.is_parameter() && root.tensor.shares_storage(gradient)) {
        saved = true;
        if (root.handles == 0 && root.pend == 0 && root.need == 1 && root.producer >= 0) {
          root.tensor.drop_storage();
        } else {
          gradient = gradient.clone();
        }
      }
    });
    return gradient.storage_references() == 1;
  }

  const TapeState& tape_;
  const Record& record_;
  ParameterGradients& parameters_;
  std::vector<Tensor> input_tensors_, output_tensors_, gradient_tensors_;
  std::vector<Result> results_;
};

class Sweep {
 public:
  Sweep(TapeState& tape, std::span<const Variable> losses, std::span<const Variable> wrt,
        const BackwardOptions& options)
      : tape_(tape),
        options_(options),
        losses_(losses),
        wrt_(wrt),
        plan_(tape, losses, wrt, options),
        replay_(tape, plan_) {}

  std::vector<Tensor> run() {
    const PhaseScope phase(Phase::backward);
    tape_.report.pinned_bytes = tape_.pinned_bytes();
    announce();
    ParameterGradients parameters(plan_, options_);
    for (const Variable& loss : losses_) {
      tape_.bind(loss.value());  // a leaf that no op has read: its gradient is let go with the rest
    }
    auto& report = tape_.report;
    report.replay_flops = report.backward_flops = report.replayed_records = 0;
    report.restored_bytes = report.fetched_bytes = 0;
    tape_.sweeping = true;
    try {
      take_over_forward_needs();
      tape_.offload.begin_sweep(plan_);
      parameters.start();
      seed(parameters);
      announce_last_reads(plan_.never_read);
      for (auto r = static_cast<std::int32_t>(tape_.records().size()) - 1; r >= 0; --r) {
        step(r, parameters);
      }
      std::vector<Tensor> result = collect();
      check_drained();
      parameters.finish();
      tape_.sweeping = false;
      tape_.offload.end_sweep();
      if (!options_.keep) {
        tape_.reset();
      }
      return result;
    } catch (...) {
      tape_.sweeping = false;
      tape_.reset();
      throw;
    }
  }

 private:
  void announce() {
    if (!options_.on_plan) {
      return;
    }
    tape_.sweeping = true;
    try {
      options_.on_plan(plan_.plan);
    } catch (...) {
      tape_.sweeping = false;
      throw;
    }
    tape_.sweeping = false;
  }

  // The sweep's own needs come first, so that nothing is let go that it wants.
  void take_over_forward_needs() {
    for (Value* v : tape_.values()) {
      needs_before_.push_back(v->need);
    }
    plan_.each_wanted(-1, add_need);
    if (!options_.keep) {
      each_wanted(tape_, -1, drop_need);
    }
  }

  void seed(ParameterGradients& parameters) {
    for (std::size_t i = 0; i < losses_.size(); ++i) {
      Value* loss = losses_[i].value();
      const double scale = options_.scale.empty() ? 1.0 : options_.scale[i];
      Tensor one =
          Tensor::full(loss->tensor.shape(), loss->tensor.dtype(), scale, loss->tensor.device());
      if (loss->is_parameter()) {
        parameters.add(*loss->parameter, std::move(one), true);
        continue;
      }
      std::erase(ones_, loss);
      if (scale == 1.0 && !loss->gradient.defined()) {
        ones_.push_back(loss);
      }
      add_gradient(*loss, std::move(one));
    }
  }

  void step(std::int32_t r, ParameterGradients& parameters) {
    const auto& segments = tape_.segments();
    while (!entered_.empty() && r < segments[static_cast<std::size_t>(entered_.back())].first) {
      entered_.pop_back();
    }
    if (plan_.live[static_cast<std::size_t>(r)] != 0) {
      const Record& record = tape_.records()[static_cast<std::size_t>(r)];
      tape_.offload.step(r);
      for (std::int32_t s : tape_.path(record.segment)) {
        if (std::ranges::find(entered_, s) == entered_.end()) {
          tape_.offload.begin_replay(s, r);
          replay_.enter(s);
          tape_.offload.end_replay();
          entered_.push_back(s);
        }
      }
      backward(record, parameters);
      tape_.each_saved(record, drop_need);
    }
    if (options_.on_last_read) {
      announce_last_reads(plan_.last_reads[static_cast<std::size_t>(r)]);
    }
  }

  void announce_last_reads(const std::vector<Parameter*>& parameters) {
    for (Parameter* p : parameters) {
      Parameter::Sweep::read_last(*p);
      options_.on_last_read(*p);
    }
  }

  void backward(const Record& record, ParameterGradients& parameters) {
    for (const Variable& v : wrt_) {
      if (std::ranges::find(tape_.outputs(record), v.value()) != tape_.outputs(record).end()) {
        captured_.emplace_back(v.value(), v.value()->gradient);
      }
    }
    SweepBackward run(tape_, record, parameters);
    for (Value* v : tape_.inputs(record)) {
      if (v != nullptr && !ones_.empty()) {
        std::erase(ones_, v);  // it gets another contribution
      }
    }
    run.load(ones_);
    tape_.report.backward_flops += run.cost().flops;
    progress().tick();
    record.op->backward(run);
    run.commit();
  }

  std::vector<Tensor> collect() {
    std::vector<Tensor> result;
    for (const Variable& v : wrt_) {
      const auto it = std::ranges::find(captured_, v.value(), &std::pair<Value*, Tensor>::first);
      result.push_back(it != captured_.end() ? it->second : v.value()->gradient);
      if (result.back().defined() && result.back().storage_references() > 1) {
        result.back() = result.back().clone();
      }
    }
    captured_.clear();
    return result;
  }

  // Every use was given back, and nothing is resident without a handle.
  void check_drained() {
    std::size_t i = 0;
    for (Value* v : tape_.values()) {
      v->gradient = Tensor();
      // Leaves that a callback has made come after those that were counted.
      const std::int32_t before = options_.keep && i < needs_before_.size() ? needs_before_[i] : 0;
      ++i;
      ensure(v->need == before && v->pend == 0,
             "after the sweep a value of shape {} has {} uses and {} reads, expected {} and 0",
             to_string(v->tensor.shape()), v->need, v->pend, before);
      ensure(options_.keep || v->handles > 0 || !v->at_hand(),
             "after the sweep a value of shape {} is still resident", to_string(v->tensor.shape()));
    }
  }

  TapeState& tape_;
  const BackwardOptions& options_;
  std::span<const Variable> losses_, wrt_;
  SweepPlan plan_;
  Replay replay_;
  std::vector<std::int32_t> entered_;
  std::vector<std::int32_t> needs_before_;
  std::vector<Value*> ones_;
  std::vector<std::pair<Value*, Tensor>> captured_;
};

}  // namespace

std::vector<Tensor> grad(std::span<const Variable> losses, std::span<const Variable> wrt,
                         const BackwardOptions& options) {
  Tape* tape = Tape::current();
  if (tape == nullptr) {
    fail("backward", "no tape is current: make a Tape::Scope around forward and backward");
  }
  return Sweep(tape->state(), losses, wrt, options).run();
}

void backward(std::span<const Variable> losses, const BackwardOptions& options) {
  grad(losses, {}, options);
}

void backward(const Variable& loss, const BackwardOptions& options) {
  grad({&loss, 1}, {}, options);
}

}  // namespace reprise

#include "autograd/gradients.h"

#include <algorithm>
#include <utility>

#include "autograd/parameter_sweep.h"
#include "kernels/accumulate.h"

namespace reprise {

ParameterGradients::ParameterGradients(SweepPlan& plan, const BackwardOptions& options)
    : sweep_(plan), plan_(plan.plan), options_(options) {
  for (const Ready& ready : plan_.order) {
    Parameter& p = *ready.parameter;
    if (!Parameter::Sweep::begin(p)) {
      for (const auto& [claimed, state] : states_) {
        Parameter::Sweep::end(*claimed);
      }
      fail("backward", "parameter {} is in another sweep", p.name());
    }
    states_[&p] = {ready.expected, false, p.has_gradient(), {}, {}};
  }
}

ParameterGradients::~ParameterGradients() {
  for (auto& [p, state] : states_) {
    Parameter::Sweep::end(*p);
    if (finished_) {
      continue;
    }
    if (!state.had_gradient) {
      Parameter::Sweep::set_absent(*p);
    } else if (state.undo.defined()) {
      Parameter::Sweep::restore(*p, std::move(state.undo));
    }
    if (!options_.undo) {
      Parameter::Sweep::set_stale(*p);
    }
  }
}

ParameterGradients::State& ParameterGradients::touch(Parameter& p) {
  const auto it = states_.find(&p);
  if (it == states_.end() || it->second.left <= 0) {
    ensure(false, "parameter {} got a contribution that was not expected; {}", p.name(),
           describe(p));
  }
  State& state = it->second;
  if (!std::exchange(state.touched, true)) {
    if (!state.had_gradient) {
      Parameter::Sweep::bind_to_host(p);
    } else if (options_.undo) {
      state.undo = Parameter::Sweep::present(p).clone(MemoryKind::gradients);
    }
  }
  return state;
}

Target ParameterGradients::target(Parameter& p) {
  State& state = touch(p);
  if (state.had_gradient && state.left == 1 && !state.sum.defined()) {
    return {Parameter::Sweep::present(p), true};
  }
  if (state.sum.defined()) {
    return {state.sum, true};
  }
  if (state.had_gradient) {
    // Several contributions to a gradient that is there already: their sum is added at the end, so
    // that a failure in between leaves it untouched.
    return {Tensor::empty(p.shape(), p.grad_dtype(), p.value().device(), MemoryKind::gradients),
            false};
  }
  return {Parameter::Sweep::fresh(p), false};
}

void ParameterGradients::written(Parameter& p, const Tensor& tensor) {
  State& state = touch(p);
  if (!(state.had_gradient && tensor.shares_storage(Parameter::Sweep::present(p)))) {
    state.sum = tensor;
  }
  contributed(p, state);
}

void ParameterGradients::add(Parameter& p, Tensor gradient, bool exclusive) {
  State& state = touch(p);
  const bool direct = state.had_gradient && state.left == 1 && !state.sum.defined();
  if (direct) {
    kernels::accumulate(Parameter::Sweep::present(p), gradient);
  } else if (state.sum.defined()) {
    kernels::accumulate(state.sum, gradient);
  } else if (exclusive && !Parameter::Sweep::bound(p) && gradient.dtype() == p.grad_dtype() &&
             gradient.is_contiguous() && gradient.storage_bytes() == gradient.bytes()) {
    gradient.reclassify(MemoryKind::gradients);
    state.sum = std::move(gradient);
  } else {
    state.sum = target(p).tensor;
    kernels::cast(gradient, state.sum);
  }
  contributed(p, state);
}

void ParameterGradients::contributed(Parameter& p, State& state) {
  if (--state.left > 0) {
    return;
  }
  if (state.had_gradient) {
    if (state.sum.defined()) {
      kernels::accumulate(Parameter::Sweep::present(p), state.sum);
    }
  } else {
    Parameter::Sweep::set(p, state.sum);
  }
  state.sum = Tensor();
  fire(p);
}

// Whom the plan expects, and how much of it came.
std::string ParameterGradients::describe(const Parameter& p) const {
  const auto it = states_.find(const_cast<Parameter*>(&p));
  const std::vector<Contribution> all = sweep_.contributions();
  const auto expected =
      std::ranges::count(all, &p, [](const Contribution& c) { return c.parameter; });
  const auto seen = it == states_.end() ? 0 : expected - it->second.left;
  return fmt::format("expected {} and seen {} of {}", expected, seen, contributors(all, p));
}

void ParameterGradients::fire(Parameter& p) {
  if (fired_ >= plan_.order.size() || plan_.order[fired_].parameter != &p) {
    ensure(false, "parameter {} became ready out of the announced order, at place {}; {}", p.name(),
           fired_, describe(p));
  }
  ++fired_;
  Parameter::Sweep::ready(p);
  if (options_.on_ready) {
    options_.on_ready(p);
  }
}

void ParameterGradients::start() {
  for (const Ready& ready : plan_.order) {
    if (ready.expected > 0) {
      break;
    }
    fire(*ready.parameter);
  }
}

void ParameterGradients::finish() {
  if (fired_ != plan_.order.size()) {
    const Parameter& p = *plan_.order[fired_].parameter;
    ensure(false, "{} of {} parameters became ready; the first that did not is {}: {}", fired_,
           plan_.order.size(), p.name(), describe(p));
  }
  finished_ = true;
}

void add_gradient(Value& value, Tensor gradient) {
  if (!value.gradient.defined()) {
    value.gradient = gradient.contiguous();
    return;
  }
  if (value.gradient.storage_references() > 1) {
    value.gradient = value.gradient.clone();
  }
  kernels::accumulate(value.gradient, gradient);
}

}  // namespace reprise

#include "train/trainer.h"

#include <cmath>
#include <cstdio>
#include <utility>

#include <fmt/format.h>

#include "core/error.h"
#include "core/progress.h"
#include "nn/optimizer/clip.h"

namespace reprise::train {

Trainer::Trainer(nn::Model& model, Generator& generator, TrainerOptions options)
    : model_(model),
      generator_(generator),
      options_(std::move(options)),
      parameters_(model.trainable_parameters()),
      optimizer_(parameters_, options_.adamw) {
  if (parameters_.empty()) {
    fail("train", "the model has no trainable parameter: everything is frozen");
  }
  model_.train(generator_);
}

double Trainer::forward_backward(const nn::Batch& batch) {
  progress().begin_step(steps_ + 1);
  const PhaseScope phase(Phase::forward);
  for (Parameter* p : parameters_) {
    p->zero_gradient();
  }
  const std::uint64_t first_offset = generator_.next_offset;
  Tape::Scope scope(tape_, options_.policies);
  const Variable loss = model_.loss(batch);
  const double value = loss.tensor().is_meta() ? 0.0 : loss.tensor().item<float>();
  if (!std::isfinite(value)) {
    tape_.reset();
    explain_non_finite(batch, first_offset, value, fmt::format("at step {}", steps_ + 1));
  }
  BackwardOptions backward_options;
  backward_options.parameters = parameters_;
  backward_options.on_plan = [this](const Plan& plan) { report_unreached(plan.unreached); };
  if (hooks.before) {
    hooks.before(backward_options);
  }
  backward(loss, backward_options);
  if (hooks.after) {
    hooks.after();
  }
  return value;
}

double Trainer::step(const nn::Batch& batch, double learning_rate) {
  const double loss = forward_backward(batch);
  const PhaseScope phase(Phase::optimizer);
  optimizer_.step(learning_rate, clip_scale());
  ++steps_;
  return loss;
}

void Trainer::report_unreached(const std::vector<Parameter*>& parameters) {
  if (parameters.empty() || std::exchange(unreached_reported_, true)) {
    return;
  }
  if (hooks.unreached) {
    hooks.unreached(parameters);
    return;
  }
  std::vector<std::string_view> names;
  for (const Parameter* p : parameters) {
    names.push_back(p->name());
  }
  fmt::print(stderr, "reprise: warning: the loss does not reach {} trainable parameter{}: {}\n",
             names.size(), names.size() == 1 ? "" : "s", fmt::join(names, ", "));
}

double Trainer::clip_scale() {
  if (options_.max_norm <= 0 || parameters_.front()->value().is_meta()) {
    return 1;
  }
  const double norm = nn::global_norm(parameters_);
  if (std::isfinite(norm)) {
    return nn::clip_coefficient(norm, options_.max_norm);
  }
  std::string first = "none by itself, only their sum";
  for (Parameter* p : parameters_) {
    if (p->has_gradient() && !std::isfinite(nn::global_norm({&p, 1}))) {
      first = p->name();
      break;
    }
  }
  throw Diverged(
      fmt::format("[train] the norm of the gradients is {} at step {}; first parameter "
                  "with a non-finite gradient: {}",
                  norm, steps_ + 1, first));
}

double Trainer::evaluate(const nn::Batch& batch) {
  const PhaseScope phase(Phase::evaluation);
  model_.evaluate();
  const double loss = model_.loss(batch).tensor().item<float>();
  if (!std::isfinite(loss)) {
    Tape::Scope scope(tape_, options_.policies);
    explain_non_finite(batch, generator_.next_offset, loss,
                       fmt::format("in evaluation after {} steps", steps_));
  }
  model_.train(generator_);
  return loss;
}

// The same forward again, same random numbers, looking at every op's output.
void Trainer::explain_non_finite(const nn::Batch& batch, std::uint64_t first_offset, double loss,
                                 std::string_view when) {
  const std::uint64_t offset = std::exchange(generator_.next_offset, first_offset);
  tape_.check_finite(true);
  std::string first = "none when run again";
  try {
    (void)model_.loss(batch);
  } catch (const Error& error) {
    first = error.what();
  }
  tape_.check_finite(false);
  tape_.reset();
  generator_.next_offset = offset;
  throw Diverged(fmt::format("[train] the loss is {} {}; first op with a non-finite output: {}",
                             loss, when, first));
}

}  // namespace reprise::train

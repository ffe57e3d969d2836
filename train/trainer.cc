#include "train/trainer.h"

#include <cmath>
#include <cstdio>
#include <utility>

#include <fmt/format.h>

#include "core/error.h"
#include "core/out_of_memory.h"
#include "core/progress.h"
#include "distributed/sharded_state.h"
#include "nn/optimizer/clip.h"
#include "train/what_fits.h"

namespace reprise::train {

Trainer::Trainer(nn::Model& model, Generator& generator, TrainerOptions options,
                 distributed::Sharding* sharding)
    : model_(model),
      generator_(generator),
      options_(std::move(options)),
      sharding_(sharding),
      parameters_(model.trainable_parameters()),
      optimizer_(sharding != nullptr ? sharding->shards() : parameters_, options_.adamw) {
  if (parameters_.empty()) {
    fail("train", "the model has no trainable parameter: everything is frozen");
  }
  model_.train(generator_);
  if (options_.graph == StepGraphs::on) {
    graph_ = make_graph();
  }
}

void Trainer::zero_gradients() {
  if (sharding_ != nullptr) {
    sharding_->zero_gradients();
    return;
  }
  for (Parameter* p : parameters_) {
    p->zero_gradient();
  }
}

double Trainer::forward_backward(const nn::Batch& batch) {
  return forward_backward({&batch, 1}, 1);
}

double Trainer::forward_backward(std::span<const nn::Batch> micro_batches, double scale) {
  return explained(micro_batches, false, [&] { return sweeps(micro_batches, scale); });
}

// A device without memory for a step: says which policies would fit, too.
double Trainer::explained(std::span<const nn::Batch> micro_batches, bool updates,
                          const std::function<double()>& step) {
  try {
    return step();
  } catch (const OutOfMemory& error) {
    if (sharding_ != nullptr || error.device() != parameters_.front()->value().device()) {
      throw;
    }
    throw OutOfMemory(error.what() + what_fits(model_, options_, micro_batches,
                                               {updates, steps_ > 0}, error.available_bytes()),
                      error.device(), error.available_bytes());
  }
}

double Trainer::sweeps(std::span<const nn::Batch> micro_batches, double scale) {
  if (micro_batches.empty()) {
    fail("train", "a step needs at least one micro-batch");
  }
  progress().begin_step(steps_ + 1);
  const PhaseScope phase(Phase::forward);
  zero_gradients();
  double sum = 0;
  for (std::size_t i = 0; i < micro_batches.size(); ++i) {
    sum += sweep(micro_batches[i], scale, i + 1 == micro_batches.size());
  }
  return sum / static_cast<double>(micro_batches.size());
}

BackwardOptions Trainer::sweep_options(double scale) {
  BackwardOptions options;
  options.parameters = parameters_;
  options.on_plan = [this](const Plan& plan) { report_unreached(plan.unreached); };
  if (scale != 1) {
    options.scale = {scale};
  }
  return options;
}

double Trainer::sweep(const nn::Batch& batch, double scale, bool last) {
  const std::uint64_t first_offset = generator_.next_offset;
  Tape::Scope scope(tape_, options_.policies);
  const Variable loss = model_.loss(batch);
  const double value = loss.tensor().is_meta() ? 0.0 : loss.tensor().item<float>();
  if (!std::isfinite(value)) {
    tape_.reset();
    explain_non_finite(batch, first_offset, value, fmt::format("at step {}", steps_ + 1));
  }
  BackwardOptions backward_options = sweep_options(scale);
  const auto& before = last ? hooks.before : hooks.before_accumulation;
  const auto& after = last ? hooks.after : hooks.after_accumulation;
  if (before) {
    before(backward_options);
  }
  if (sharding_ == nullptr) {
    backward(loss, backward_options);
  } else if (last) {
    sharding_->backward(loss, std::move(backward_options));
  } else {
    sharding_->accumulate(loss, std::move(backward_options));
  }
  if (after) {
    after();
  }
  return value;
}

double Trainer::step(const nn::Batch& batch, double learning_rate) {
  return step({&batch, 1}, learning_rate, 1);
}

double Trainer::step(std::span<const nn::Batch> micro_batches, double learning_rate, double scale) {
  return explained(micro_batches, true, [&] {
    return wants_graph(micro_batches) ? graph_step(micro_batches, learning_rate, scale)
                                      : plain_step(micro_batches, learning_rate, scale);
  });
}

double Trainer::plain_step(std::span<const nn::Batch> micro_batches, double learning_rate,
                           double scale) {
  const double loss = sweeps(micro_batches, scale);
  const PhaseScope phase(Phase::optimizer);
  optimizer_.step(learning_rate, clip_scale());
  if (sharding_ != nullptr) {
    sharding_->updated();
  }
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

double Trainer::global_norm() {
  return sharding_ != nullptr ? sharding_->global_norm() : nn::global_norm(parameters_);
}

double Trainer::clip_scale() {
  if (options_.max_norm <= 0 || parameters_.front()->value().is_meta()) {
    return 1;
  }
  const double norm = global_norm();
  if (std::isfinite(norm)) {
    return nn::clip_coefficient(norm, options_.max_norm);
  }
  std::string first =
      sharding_ != nullptr ? "not one of this rank's shards" : "none by itself, only their sum";
  const auto& optimized = optimizer_.parameters();
  for (Parameter* p : optimized) {
    if (p->has_gradient() && !std::isfinite(nn::global_norm({&p, 1}))) {
      first = p->name();
      break;
    }
  }
  explain_gradients(norm, first);
}

void Trainer::explain_gradients(double norm, std::string_view first) const {
  throw Diverged(
      fmt::format("[train] the norm of the gradients is {} at step {}; first parameter "
                  "with a non-finite gradient: {}",
                  norm, steps_ + 1, first));
}

namespace {

// Steps must not lose their dropout, also when an Error leaves.
class Evaluating {
 public:
  Evaluating(nn::Model& model, Generator& generator) : model_(model), generator_(generator) {
    model_.evaluate();
  }
  ~Evaluating() { model_.train(generator_); }
  Evaluating(const Evaluating&) = delete;

 private:
  nn::Model& model_;
  Generator& generator_;
};

}  // namespace

double Trainer::evaluate(const nn::Batch& batch) {
  const PhaseScope phase(Phase::evaluation);
  const Evaluating evaluating(model_, generator_);
  const double loss = model_.loss(batch).tensor().item<float>();
  if (!std::isfinite(loss)) {
    Tape::Scope scope(tape_, options_.policies);
    explain_non_finite(batch, generator_.next_offset, loss,
                       fmt::format("in evaluation after {} steps", steps_));
  }
  if (sharding_ != nullptr) {
    sharding_->end_forward();
  }
  return loss;
}

absl::Status Trainer::save(const std::string& folder, distributed::Communicator& ranks) {
  const PhaseScope phase(Phase::saving);
  return distributed::save_state(folder, optimizer_, sharding_, ranks,
                                 {steps_, generator_.next_offset});
}

absl::Status Trainer::resume(const std::string& folder, distributed::Communicator& ranks) {
  const absl::StatusOr<distributed::RunPosition> position =
      distributed::load_state(folder, optimizer_, sharding_, ranks);
  if (position.ok()) {
    forget_graph();
    steps_ = position->steps;
    generator_.next_offset = position->random_offset;
  }
  return position.status();
}

// The same forward again, same random numbers, looking at every op's output.
void Trainer::explain_non_finite(const nn::Batch& batch, std::uint64_t first_offset, double loss,
                                 std::string_view when) {
  // At stage 3 the values are gathered once more, by the ranks that wait for this one in backward.
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

// Steps of a trainer that are launches of a graph (TrainerOptions::graph). All that changes from
// one to the next lies in memory: the batch, AdamW's scalars, how far the random numbers are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "core/captured_step.h"
#include "core/out_of_memory.h"
#include "core/progress.h"
#include "core/step_graph.h"
#include "kernels/adamw.h"
#include "kernels/reduce.h"
#include "nn/models/attend.h"
#include "train/on_device.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

constexpr Tensor nn::Batch::*kParts[] = {
    &nn::Batch::ids,    &nn::Batch::labels, &nn::Batch::mask,        &nn::Batch::positions,
    &nn::Batch::pixels, &nn::Batch::grids,  &nn::Batch::image_tokens};

bool are_ids(const nn::Batch& batch, Tensor nn::Batch::*part) {
  return part == &nn::Batch::labels && batch.labels.defined() && same_view(batch.labels, batch.ids);
}

// A launch costs the host some 5 us, in which a card does about as many operations.
constexpr double kLaunchBoundFlops = 1e9;

bool shares_rows(const nn::Batch& batch) {
  return !batch.starts.empty();
}
// Of the exception that is being handled: whether the step may go well when it is not captured.
bool is_refusal() {
  try {
    throw;
  } catch (const OutOfMemory&) {
    return false;
  } catch (const Error&) {
    return true;
  } catch (...) {
    return false;
  }
}

bool has_hooks(const SweepHooks& hooks) {
  return hooks.before || hooks.after || hooks.before_accumulation || hooks.after_accumulation;
}

}  // namespace

struct Trainer::Graph {
  // What the steps of one kind read and write from outside.
  struct Fixed {
    std::string key;
    std::vector<nn::Batch> batches;
    Tensor losses;   // f32 [L]
    Tensor outcome;  // f64 [L + 1]: losses, norm of the gradients
    Tensor squares;  // f64 [parameters], of those that have a gradient
    std::vector<const Parameter*> reached;
    std::uint64_t first_offset = 0, words = 0;  // of the generator when it was recorded, and used
    std::vector<std::uint64_t> offsets;         // of each micro-batch from there
  };

  Device device;
  CapturedStep step;
  Tensor scalars, shift;
  Fixed captured, plain;
  Fixed* now = nullptr;
  std::int64_t launches = 0;

  explicit Graph(Device on) : device(on), step(on) {}

  Fixed& fixed_for(const std::string& key, std::span<const nn::Batch> given,
                   std::size_t parameters) {
    if (step.holds(key)) {
      return captured;
    }
    if (plain.key == key && !plain.batches.empty()) {
      return plain;
    }
    plain = {};
    plain.key = key;
    for (const nn::Batch& batch : given) {
      nn::Batch& mine = plain.batches.emplace_back(batch);
      for (const auto part : kParts) {
        if (!(batch.*part).defined() || are_ids(batch, part)) {
          continue;
        }
        mine.*part = Tensor::empty((batch.*part).shape(), (batch.*part).dtype(), device);
      }
      if (batch.labels.defined() && are_ids(batch, &nn::Batch::labels)) {
        mine.labels = mine.ids;
      }
    }
    const auto count = std::ssize(given);
    plain.losses = Tensor::empty({count}, DType::f32, device, MemoryKind::workspace);
    plain.outcome = Tensor::empty({count + 1}, DType::f64, device, MemoryKind::workspace);
    plain.squares = Tensor::empty({static_cast<std::int64_t>(parameters)}, DType::f64, device,
                                  MemoryKind::workspace);
    return plain;
  }
};

std::shared_ptr<Trainer::Graph> Trainer::make_graph() const {
  const Device device = parameters_.front()->value().device();
  if (device == meta) {
    return nullptr;  // a dry run, of the step as it is
  }
  if (device.kind != DeviceKind::cuda || sharding_ != nullptr) {
    fail("train", "a graph needs a model on a cuda device{}, got one on {}{}",
         sharding_ != nullptr ? ", not sharded" : "", to_string(device),
         sharding_ != nullptr ? ", sharded" : "");
  }
  auto graph = std::make_shared<Graph>(device);
  graph->scalars = Tensor::empty({std::ssize(parameters_), kernels::kAdamWScalars}, DType::f32,
                                 device, MemoryKind::optimizer);
  graph->shift = Tensor::empty({1}, DType::i64, device, MemoryKind::workspace);
  return graph;
}

void Trainer::set_policies(Policies policies) {
  options_.policies = std::move(policies);
  forget_graph();
}

void Trainer::forget_graph() {
  if (graph_ != nullptr) {
    graph_->step.forget();
    graph_->captured = graph_->plain = {};
  }
}

std::int64_t Trainer::launches() const {
  return graph_ == nullptr ? 0 : graph_->launches;
}

namespace {

// All that the host puts into a step.
std::string key_of(std::span<const nn::Batch> batches, double scale, std::uint64_t seed,
                   const std::vector<Parameter*>& parameters) {
  std::string key = fmt::format("scale {}, seed {}", scale, seed);
  for (const nn::Batch& batch : batches) {
    for (const auto part : kParts) {
      const Tensor& tensor = batch.*part;
      if (tensor.defined()) {
        key += fmt::format("; {} {}{}", name(tensor.dtype()), to_string(tensor.shape()),
                           are_ids(batch, part) ? ", the ids" : "");
      } else {
        key += "; -";
      }
    }
    key += batch.padded_right.value_or(false) ? "; padded on the right" : "";
  }
  std::uint64_t where = 0;
  for (const Parameter* p : parameters) {
    where = where * 0x9E3779B97F4A7C15u + reinterpret_cast<std::uintptr_t>(p->value().raw());
  }
  return key + fmt::format("; parameters at {:x}", where);
}

}  // namespace

// The first step is done without, and measured.
bool Trainer::wants_graph(std::span<const nn::Batch> micro_batches) {
  if (options_.graph != StepGraphs::automatic) {
    return graph_ != nullptr;
  }
  if (steps_ == 0 || has_hooks(hooks) || std::ranges::any_of(micro_batches, shares_rows)) {
    return false;
  }
  if (graph_ == nullptr) {
    const TapeReport& done = tape_.report();
    const auto flops = static_cast<double>(done.forward_flops + done.backward_flops);
    const auto ops = static_cast<double>(std::max<std::int64_t>(done.records, 1) * 2);
    if (parameters_.front()->value().device().kind != DeviceKind::cuda || sharding_ != nullptr ||
        flops / ops > kLaunchBoundFlops) {
      options_.graph = StepGraphs::off;
      return false;
    }
    graph_ = make_graph();
  }
  return true;
}

double Trainer::graph_step(std::span<const nn::Batch> micro_batches, double learning_rate,
                           double scale) {
  if (micro_batches.empty()) {
    fail("train", "a step needs at least one micro-batch");
  }
  if (std::ranges::any_of(micro_batches, shares_rows)) {
    fail("train",
         "texts that share a row cannot be part of a captured step: train without a graph, or "
         "with a text a row");
  }
  if (has_hooks(hooks)) {
    fail("train", "a step with hooks around backward cannot be captured: train without a graph");
  }
  progress().begin_step(steps_ + 1);
  const PhaseScope phase(Phase::forward);
  Graph& graph = *graph_;
  std::vector<nn::Batch> given(micro_batches.begin(), micro_batches.end());
  for (nn::Batch& batch : given) {
    if (batch.mask.defined() && !batch.padded_right) {
      batch.padded_right = nn::is_padded_right(batch.mask);
    }
  }
  const std::string key = key_of(given, scale, generator_.seed, model_.parameters());
  Graph::Fixed& fixed = graph.fixed_for(key, given, parameters_.size());
  for (std::size_t i = 0; i < given.size(); ++i) {
    for (const auto part : kParts) {
      if ((given[i].*part).defined() && !are_ids(given[i], part)) {
        (fixed.batches[i].*part).copy_from(given[i].*part);
      }
    }
  }
  const std::uint64_t first = generator_.next_offset;
  const bool launch = graph.step.holds(key);
  graph.scalars.copy_from(optimizer_.next_scalars(learning_rate));
  const std::uint64_t ahead = launch ? first - fixed.first_offset : 0;
  graph.shift.copy_from(Tensor::from(std::vector{static_cast<std::int64_t>(ahead)}, {1}));
  zero_gradients();
  graph.now = &fixed;
  CapturedStep::How how{};
  const bool captures = graph.step.is_next(key);
  try {
    how = graph.step.run(key, [&] { record_step(scale); });
  } catch (...) {
    tape_.reset();
    zero_gradients();  // some lie in the plan's memory, and were never computed
    generator_.next_offset = first;
    if (options_.graph != StepGraphs::automatic || !captures || !is_refusal()) {
      throw;
    }
    options_.graph = StepGraphs::off;
    graph_ = nullptr;
    return plain_step(micro_batches, learning_rate, scale);
  }
  if (how != CapturedStep::How::plain) {
    ++graph.launches;
    generator_.next_offset = first + fixed.words;
  }
  if (how == CapturedStep::How::captured) {
    graph.captured = std::exchange(graph.plain, {});
    graph.now = &graph.captured;
  }
  const double loss = finite_loss(first);
  optimizer_.advance();
  ++steps_;
  return loss;
}

void Trainer::record_step(double scale) {
  Graph::Fixed& fixed = *graph_->now;
  const ShiftDraws shift(
      reinterpret_cast<const std::uint64_t*>(graph_->shift.data<std::int64_t>()));
  fixed.first_offset = generator_.next_offset;
  fixed.offsets.clear();
  for (std::size_t i = 0; i < fixed.batches.size(); ++i) {
    fixed.offsets.push_back(generator_.next_offset - fixed.first_offset);
    Tape::Scope scope(tape_, options_.policies);
    const Variable loss = model_.loss(fixed.batches[i]);
    const auto at = static_cast<std::int64_t>(i);
    fixed.losses.slice(0, at, at + 1).copy_from(loss.tensor().reshape({1}));
    backward(loss, sweep_options(scale));
  }
  fixed.words = generator_.next_offset - fixed.first_offset;
  const PhaseScope phase(Phase::optimizer);
  fixed.reached.clear();
  std::vector<Tensor> gradients;
  for (const Parameter* p : parameters_) {
    if (options_.max_norm > 0 && p->has_gradient()) {
      fixed.reached.push_back(p);
      gradients.push_back(p->gradient());
    }
  }
  const Tensor squares = fixed.squares.slice(0, 0, std::ssize(gradients));
  if (!gradients.empty()) {
    kernels::squared_norms(gradients, squares);
  }
  gradients.clear();
  kernels::adamw_gradient_scale(squares, fixed.losses, options_.max_norm, graph_->scalars,
                                fixed.outcome);
  optimizer_.step_from(graph_->scalars);
  zero_gradients();  // their memory is the step's
}

// The mean of the losses. When one is not finite, or the norm of the gradients, nothing was
// updated.
double Trainer::finite_loss(std::uint64_t first_offset) {
  Graph::Fixed& fixed = *graph_->now;
  const std::vector<double> outcome = fixed.outcome.to_vector<double>();
  double sum = 0;
  for (std::size_t i = 0; i < fixed.batches.size(); ++i) {
    if (!std::isfinite(outcome[i])) {
      explain_non_finite(fixed.batches[i], first_offset + fixed.offsets[i], outcome[i],
                         fmt::format("at step {}", steps_ + 1));
    }
    sum += outcome[i];
  }
  const double norm = outcome.back();
  if (std::isfinite(norm)) {
    return sum / static_cast<double>(fixed.batches.size());
  }
  const std::vector<double> squares = fixed.squares.to_vector<double>();
  for (std::size_t i = 0; i < fixed.reached.size(); ++i) {
    if (!std::isfinite(squares[i])) {
      explain_gradients(norm, fixed.reached[i]->name());
    }
  }
  explain_gradients(norm, "none by itself, only their sum");
}

}  // namespace reprise::train

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "autograd/tape.h"
#include "autograd/tape_state.h"
#include "bench/kernels.h"
#include "kernels/elementwise.h"
#include "tests/op_case.h"

namespace reprise::bench {
namespace {

using testing::Argument;
using testing::Fill;
using testing::OpCase;

std::vector<Tensor> inputs_of(const OpCase& op, DType dtype, Device device) {
  OpCase some = op;
  for (Argument& argument : some.inputs) {
    if (argument.values.empty()) {
      argument.shape = Shape{std::min(argument.shape.numel(), kDrawn)};
    }
  }
  std::vector<Tensor> inputs = testing::draw_inputs(some, dtype, cpu);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (op.inputs[i].parameter) {
      // Logits of large weights make probabilities that are denormal, and slow.
      kernels::scale(inputs[i], 0.02, inputs[i]);
    }
    inputs[i] = repeated(inputs[i], op.inputs[i].shape, device);
  }
  return inputs;
}

// Made by an op, as activations are, from a parameter that is asked for: so their gradients end
// here, in whatever buffer they are.
class Source final : public Op {
 public:
  explicit Source(Tensor value) : value_(std::move(value)) {}
  std::string_view name() const override { return "source"; }
  void forward(Forward& run) const override { run.give_output(0, value_); }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override { run.into(0).tensor.zero(); }
  Cost cost(const Call&) const override { return {}; }

 private:
  Tensor value_;
};

// The inputs of one call, on the current tape.
class Inputs {
 public:
  Inputs(const OpCase& op, const std::vector<Tensor>& tensors)
      : origin_("origin", Tensor::zeros({1}, DType::f32, tensors[0].device())) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Argument& argument = op.inputs[i];
      if (!argument.gradient || argument.fill == Fill::indices) {
        values.push_back(Variable(tensors[i]));
      } else if (argument.parameter) {
        values.push_back(Variable(parameters_.emplace_back(argument.name, tensors[i])));
      } else {
        values.push_back(apply(std::make_unique<Source>(tensors[i]), {Variable(origin_)}));
      }
    }
  }
  std::vector<Variable> values;

 private:
  Parameter origin_;
  std::deque<Parameter> parameters_;
};

bool is_product(std::string_view op) {
  constexpr std::array<std::string_view, 4> kProducts = {"linear", "matmul", "attention",
                                                         "linear_cross_entropy"};
  return std::ranges::find(kProducts, op) != kProducts.end();
}

std::int64_t floating_bytes(const std::vector<Variable>& values) {
  std::int64_t bytes = 0;
  for (const Variable& value : values) {
    bytes += is_floating(value.dtype()) ? value.tensor().bytes() : 0;
  }
  return bytes;
}

struct RowWork {
  Work forward, backward;
};

void add_record(const Record& record, const Call& call, RowWork& work) {
  std::int64_t all = 0, saved = 0, gradients = 0;
  for (std::size_t i = 0; i < record.input_count; ++i) {
    if (call.has(i)) {
      const std::int64_t bytes = call.input(i).bytes();
      all += bytes;
      saved += (record.saved.inputs >> i & 1u) != 0 ? bytes : 0;
      gradients += (record.gradients >> i & 1u) != 0 ? bytes : 0;
    }
  }
  for (std::size_t k = 0; k < record.output_count; ++k) {
    all += call.output(k).bytes();
    saved += (record.saved.outputs >> k & 1u) != 0 ? call.output(k).bytes() : 0;
  }
  const Cost forward = record.op->cost(call);
  work.forward.flops += forward.flops;
  work.forward.bytes += std::min(forward.bytes, all);
  work.forward.products |= is_product(record.op->name());
  if (record.gradients != 0) {
    work.backward.flops += record.op->backward_cost(call, record.gradients).flops;
    work.backward.bytes += saved + gradients;
  }
}

// Known without running it: the op on meta.
RowWork work_of(const OpCase& op, DType dtype) {
  Tape tape;
  const Tape::Scope scope(tape);
  const Inputs inputs(op, inputs_of(op, dtype, meta));
  const std::size_t first = tape.state().records().size();
  const std::vector<Variable> outputs = op.run(inputs.values);
  RowWork work;
  std::int64_t most = 0;
  std::vector<Tensor> layouts;
  for (const Record& record : std::span(tape.state().records()).subspan(first)) {
    const Call call = tape.state().call(record, layouts);
    add_record(record, call, work);
    if (record.gradients != 0) {
      most += record.op->backward_cost(call, record.gradients).bytes;
    }
  }
  work.backward.bytes = std::min(most, work.backward.bytes + floating_bytes(outputs));
  work.backward.products = work.forward.products;
  return work;
}

// A loss whose gradients are given: each backward gets copies of its own, as in a step, where the
// op that takes one may work in it.
class Upstream final : public Op {
 public:
  explicit Upstream(std::vector<Tensor>& gradients) : gradients_(gradients) {}
  std::string_view name() const override { return "upstream"; }
  void forward(Forward& run) const override { run.output(0, {}, DType::f32).zero(); }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    for (std::size_t i = 0; i < gradients_.size(); ++i) {
      if (run.wants(i)) {
        run.give(i, std::exchange(gradients_[i], Tensor()));
      }
    }
  }
  Cost cost(const Call&) const override { return {}; }

 private:
  std::vector<Tensor>& gradients_;
};

double time_forward(const OpCase& op, const std::vector<Tensor>& tensors) {
  Tape tape;
  const Tape::Scope scope(tape);
  const Inputs inputs(op, tensors);
  std::vector<Variable> outputs;
  return seconds_of([&] { outputs = op.run(inputs.values); });
}

double time_backward(const OpCase& op, const std::vector<Tensor>& tensors,
                     std::vector<Tensor>& upstream) {
  Tape tape;
  const Tape::Scope scope(tape);
  const Inputs inputs(op, tensors);
  std::vector<Variable> outputs = op.run(inputs.values);
  std::vector<Tensor> gradients;
  // A scalar is a loss itself: some ops know the gradient 1.
  if (outputs.size() != 1 || outputs[0].rank() != 0) {
    std::erase_if(outputs, [](const Variable& y) { return !is_floating(y.dtype()); });
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      if (upstream.size() == k) {
        const Tensor drawn = testing::draw_normal(1000 + k, Shape{kDrawn}, outputs[k].dtype(), cpu);
        upstream.push_back(repeated(drawn, outputs[k].shape()));
      }
      gradients.push_back(upstream[k].clone());
    }
    const Variable loss = apply_many(std::make_unique<Upstream>(gradients), outputs).front();
    outputs = {loss};
  }
  return seconds_of([&] { backward(outputs); });
}

void register_row(const std::shared_ptr<const OpCase>& op, bool backward, DType dtype,
                  const Work& work, const Peaks& peaks) {
  const std::string name = "op/" + op->name + (backward ? "/backward/" : "/forward/") +
                           std::string(reprise::name(dtype));
  const auto run = [op, backward, dtype, work, &peaks](benchmark::State& state) {
    const std::vector<Tensor> tensors = inputs_of(*op, dtype, cpu);
    std::vector<Tensor> upstream;
    const auto once = [&] {
      return backward ? time_backward(*op, tensors, upstream) : time_forward(*op, tensors);
    };
    once();
    double seconds = 0;
    for (const auto& iteration : state) {
      (void)iteration;
      const double time = once();
      state.SetIterationTime(time);
      seconds += time;
    }
    set_counters(state, work, dtype, seconds, peaks);
  };
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}

}  // namespace

void register_op_rows(const Peaks& peaks) {
  for (OpCase& row : testing::all_op_cases()) {
    if (!row.benchmark) {
      continue;
    }
    const auto op = std::make_shared<const OpCase>(std::move(row));
    for (const DType dtype : op->dtypes) {
      if (dtype != DType::f32 && dtype != DType::bf16) {
        continue;
      }
      const RowWork work = work_of(*op, dtype);
      register_row(op, false, dtype, work.forward, peaks);
      // Else nothing runs: a gradient that is passed on, or was formed in forward.
      if (work.backward.flops > 0 || work.backward.bytes > 0) {
        register_row(op, true, dtype, work.backward, peaks);
      }
    }
  }
}

}  // namespace reprise::bench

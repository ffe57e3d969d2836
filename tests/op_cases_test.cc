// What every op must do, for every row of the op table, dtype and device.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "core/cuda_device.h"
#include "core/parallel.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

constexpr Mask kAll = ~Mask{0};

bool has(Mask mask, std::size_t i) {
  return (mask >> i & 1u) != 0;
}

// The losses: the sum of all elements of the inputs, each times a fixed weight. With `seen` the
// backward asks for the inputs' values, so that a segment must replay what made them, and copies
// them there.
class WeightedSum final : public Op {
 public:
  WeightedSum(std::vector<Tensor> weights, std::vector<Tensor>* seen)
      : weights_(std::move(weights)), seen_(seen) {}
  std::string_view name() const override { return "weighted_sum"; }
  void forward(Forward& run) const override {
    const Tensor out = run.output(0, {}, DType::f32);
    if (out.is_meta()) {
      return;
    }
    double sum = 0;
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      const Array w = to_array(weights_[i]), x = to_array(run.input(i));
      for (std::size_t j = 0; j < w.at.size(); ++j) {
        sum += w.at[j] * x.at[j];
      }
    }
    out.copy_from(Tensor::full({}, DType::f32, sum));
  }
  Saved saved(Mask) const override {
    return {.inputs = seen_ != nullptr ? (Mask{1} << weights_.size()) - 1 : 0, .outputs = 0};
  }
  void backward(Backward& run) const override {
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      if (seen_ != nullptr) {
        seen_->push_back(run.input(i).to(cpu).clone());
      }
      if (run.wants(i)) {
        run.give(i, weights_[i].clone());
      }
    }
  }
  Cost cost(const Call&) const override { return {}; }

 private:
  std::vector<Tensor> weights_;
  std::vector<Tensor>* seen_;
};

std::vector<Tensor> loss_weights(const std::vector<Variable>& outputs) {
  std::vector<Tensor> weights;
  for (const Variable& y : outputs) {
    weights.push_back(draw_normal(1000 + weights.size(), y.shape(), y.dtype(), y.device()));
  }
  return weights;
}

// `reached`: the outputs that the loss depends on.
Variable weighted_sum(const std::vector<Variable>& outputs, Mask reached,
                      std::vector<Tensor>* seen = nullptr) {
  const std::vector<Tensor> all = loss_weights(outputs);
  std::vector<Variable> inputs;
  std::vector<Tensor> weights;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (has(reached, i) && is_floating(outputs[i].dtype())) {
      inputs.push_back(outputs[i]);
      weights.push_back(all[i]);
    }
  }
  return apply_many(std::make_unique<WeightedSum>(std::move(weights), seen), inputs).front();
}

struct Way {
  Device device = cpu;
  bool strided = false;
  bool checkpointed = false;
  Mask wanted = kAll;   // inputs whose gradient is asked for
  Mask reached = kAll;  // outputs in the loss
};

// On the host. Gradients by input; undefined where there is none.
struct Outcome {
  std::vector<Tensor> outputs, gradients;
  std::vector<Tensor> replayed;  // the outputs in the loss, as the sweep saw them
  TapeReport report;
};

bool wants_gradient(const Argument& argument, Mask wanted, std::size_t i) {
  return argument.gradient && argument.fill != Fill::indices && has(wanted, i);
}

std::vector<Variable> variables(const OpCase& op, const std::vector<Tensor>& tensors, Mask wanted) {
  std::vector<Variable> result;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    result.push_back(wants_gradient(op.inputs[i], wanted, i) ? Variable::leaf(tensors[i])
                                                             : Variable(tensors[i]));
  }
  return result;
}

Outcome execute(const OpCase& op, DType dtype, const Way& way) {
  const std::vector<Tensor> tensors = draw_inputs(op, dtype, way.device, way.strided);
  Tape tape;
  Tape::Scope scope(tape);
  const std::vector<Variable> inputs = variables(op, tensors, way.wanted);
  Outcome outcome;
  outcome.gradients.resize(inputs.size());
  const auto loss_of_case = [&] {
    const std::vector<Variable> outputs = op.run(inputs);
    for (const Variable& y : outputs) {
      outcome.outputs.push_back(y.tensor().to(cpu).clone());
    }
    return weighted_sum(outputs, way.reached, way.checkpointed ? &outcome.replayed : nullptr);
  };
  const Variable loss = way.checkpointed ? checkpoint("case", loss_of_case) : loss_of_case();
  if (!loss.needs_gradient()) {
    return outcome;
  }
  std::vector<Variable> wrt;
  for (const Variable& x : inputs) {
    if (x.needs_gradient()) {
      wrt.push_back(x);
    }
  }
  const std::vector<Tensor> gradients = grad({&loss, 1}, wrt);
  outcome.report = tape.report();
  std::size_t next = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (wants_gradient(op.inputs[i], way.wanted, i)) {
      const Tensor& g = gradients[next++];
      outcome.gradients[i] = g.defined() ? g.to(cpu).clone() : Tensor();
    }
  }
  return outcome;
}

::testing::AssertionResult same_bits(const Tensor& a, const Tensor& b) {
  if (a.defined() != b.defined()) {
    return ::testing::AssertionFailure() << (a.defined() ? "the second" : "the first") << " absent";
  }
  if (!a.defined()) {
    return ::testing::AssertionSuccess();
  }
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) {
    return ::testing::AssertionFailure() << "shape or dtype differ";
  }
  if (a.numel() > 0 && std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())) != 0) {
    const Array x = to_array(a), y = to_array(b);
    for (std::size_t i = 0; i < x.at.size(); ++i) {
      if (std::memcmp(&x.at[i], &y.at[i], sizeof(double)) != 0) {
        return ::testing::AssertionFailure()
               << "element " << i << ": " << x.at[i] << " and " << y.at[i];
      }
    }
  }
  return ::testing::AssertionSuccess();
}

void expect_same_bits(const Outcome& a, const Outcome& b, const std::string& what) {
  ASSERT_EQ(a.outputs.size(), b.outputs.size());
  for (std::size_t k = 0; k < a.outputs.size(); ++k) {
    EXPECT_TRUE(same_bits(a.outputs[k], b.outputs[k])) << what << ", output " << k;
  }
  for (std::size_t i = 0; i < a.gradients.size(); ++i) {
    EXPECT_TRUE(same_bits(a.gradients[i], b.gradients[i])) << what << ", gradient of input " << i;
  }
}

// Largest error, as a share of the element and of the root mean square of all. What is small
// everywhere is so by cancellation, hence a floor: inputs and loss weights are of the order of 1.
double error(const Array& actual, const Array& expected) {
  double square = 0;
  for (const double e : expected.at) {
    square += e * e;
  }
  const double count = static_cast<double>(std::max<std::size_t>(1, expected.at.size()));
  const double rms = std::max(0.05, std::sqrt(square / count));
  double worst = 0;
  for (std::size_t i = 0; i < expected.at.size(); ++i) {
    const double scale = std::abs(expected.at[i]) + rms;
    const double e = std::abs(actual.at[i] - expected.at[i]) / scale;
    worst = e <= worst ? worst : e;  // NaN is the worst
    if (std::isnan(e)) {
      return e;
    }
  }
  return worst;
}

double tolerance(const OpCase& op, DType dtype) {
  return op.tolerance * (dtype == DType::bf16 ? 8e-3 : 1e-5);
}

std::vector<Array> arrays(const OpCase& op, DType dtype) {
  std::vector<Array> result;
  for (const Tensor& x : draw_inputs(op, dtype, cpu)) {
    result.push_back(to_array(x));
  }
  return result;
}

// Outputs that the oracle gives.
Mask compared(const std::vector<Array>& expected) {
  Mask mask = 0;
  for (std::size_t k = 0; k < expected.size(); ++k) {
    mask |= Mask{expected[k].shape.rank() > 0 || !expected[k].at.empty()} << k;
  }
  return mask;
}

// Gradients of the weighted sum, by central differences of the oracle, of chosen elements.
class Differences {
 public:
  Differences(const OpCase& op, DType dtype, Mask reached)
      : op_(op), reached_(reached), inputs_(arrays(op, dtype)) {
    const std::vector<Array> outputs = op.oracle(inputs_);
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      weights_.push_back(to_array(draw_normal(1000 + k, outputs[k].shape, dtype, cpu)));
    }
  }

  // Every element of a small input, else some spread over it.
  static std::vector<std::int64_t> chosen(std::int64_t count) {
    const std::int64_t step = std::max<std::int64_t>(1, count / (count > 4096 ? 8 : 96));
    std::vector<std::int64_t> at;
    for (std::int64_t i = 0; i < count; i += step) {
      at.push_back(i);
    }
    return at;
  }

  Array gradient(std::size_t input) {
    const auto elements = chosen(inputs_[input].shape.numel());
    Array result(Shape{static_cast<std::int64_t>(elements.size())});
    for (std::size_t j = 0; j < elements.size(); ++j) {
      double& x = inputs_[input][elements[j]];
      const double before = x, step = 1e-5 * std::max(1.0, std::abs(before));
      x = before + step;
      const double above = loss();
      x = before - step;
      const double below = loss();
      x = before;
      result.at[j] = (above - below) / (2 * step);
    }
    return result;
  }

 private:
  double loss() const {
    const std::vector<Array> outputs = op_.oracle(inputs_);
    double sum = 0;
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      for (std::size_t i = 0; has(reached_, k) && i < outputs[k].at.size(); ++i) {
        sum += weights_[k].at[i] * outputs[k].at[i];
      }
    }
    return sum;
  }

  const OpCase& op_;
  Mask reached_;
  std::vector<Array> inputs_, weights_;
};

Array picked(const Tensor& gradient, const Shape& shape) {
  const auto elements = Differences::chosen(shape.numel());
  Array result(Shape{static_cast<std::int64_t>(elements.size())});
  if (gradient.defined()) {
    const Array all = to_array(gradient);
    for (std::size_t j = 0; j < elements.size(); ++j) {
      result.at[j] = all[elements[j]];
    }
  }
  return result;
}

struct Row {
  OpCase op;
  DType dtype;
  Device device;
};

void PrintTo(const Row& row, std::ostream* out) {
  *out << row.op.name << " " << name(row.dtype) << " on " << to_string(row.device);
}

std::vector<Row> rows() {
  std::vector<Device> devices = {cpu};
  if (cuda_device_count() > 0) {
    devices.push_back({DeviceKind::cuda, 0});
  }
  std::vector<Row> result;
  for (const Device device : devices) {
    for (const OpCase& op : all_op_cases()) {
      for (const DType dtype : op.dtypes) {
        if (op.test && (op.cuda || device == cpu)) {
          result.push_back({op, dtype, device});
        }
      }
    }
  }
  return result;
}

std::string as_name(std::string text) {
  std::ranges::replace_if(
      text, [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return text;
}
std::string row_name(const ::testing::TestParamInfo<Row>& info) {
  return as_name(info.param.op.name + "_" + std::string(name(info.param.dtype)) + "_" +
                 (info.param.device == cpu ? "cpu" : "cuda"));
}

class OpCases : public ::testing::TestWithParam<Row> {
 protected:
  void SetUp() override {
    for (const Device device : {cpu, GetParam().device}) {
      allocator(device).set_guard(true);
      allocator(device).set_poison(true);
    }
    damaged_ = damaged();
  }
  void TearDown() override { EXPECT_EQ(damaged(), damaged_) << "guard bytes were written over"; }

  std::int64_t damaged() const {
    return allocator(cpu).damaged_guards() + allocator(GetParam().device).damaged_guards();
  }
  Outcome run(Way way = {}) const {
    way.device = GetParam().device;
    return execute(GetParam().op, GetParam().dtype, way);
  }
  void expect_gradients(const Outcome& outcome, Mask reached, double factor = 1.0,
                        Mask wanted = kAll) const {
    const auto& [op, dtype, device] = GetParam();
    Differences differences(op, dtype, reached);
    for (std::size_t i = 0; i < op.inputs.size(); ++i) {
      if (!wants_gradient(op.inputs[i], wanted, i)) {
        continue;
      }
      Array expected = differences.gradient(i);
      for (double& e : expected.at) {
        e *= factor;
      }
      EXPECT_LE(error(picked(outcome.gradients[i], op.inputs[i].shape), expected),
                3 * tolerance(op, dtype))
          << "gradient of " << op.inputs[i].name << ", outputs in the loss: " << reached;
    }
  }

 private:
  std::int64_t damaged_ = 0;
};

TEST_P(OpCases, ValuesAgreeWithTheFormulaInDouble) {
  const auto& [op, dtype, device] = GetParam();
  const std::vector<Array> expected = op.oracle(arrays(op, dtype));
  const Outcome outcome = run();
  ASSERT_GE(outcome.outputs.size(), expected.size());
  for (std::size_t k = 0; k < expected.size(); ++k) {
    if (has(compared(expected), k)) {
      ASSERT_EQ(outcome.outputs[k].shape(), expected[k].shape) << "output " << k;
      EXPECT_LE(error(to_array(outcome.outputs[k]), expected[k]), tolerance(op, dtype))
          << "output " << k;
    }
  }
}

TEST_P(OpCases, GradientsAgreeWithCentralDifferences) {
  const auto& [op, dtype, device] = GetParam();
  const Mask all = compared(op.oracle(arrays(op, dtype)));
  expect_gradients(run({.reached = all}), all);
  for (std::size_t k = 0; k < kMaxArity; ++k) {
    if (has(all, k) && all != Mask{1} << k) {
      expect_gradients(run({.reached = Mask{1} << k}), Mask{1} << k);
    }
  }
}

TEST_P(OpCases, StridedInputsGiveTheSameBits) {
  const auto& inputs = GetParam().op.inputs;
  if (std::ranges::any_of(inputs, &Argument::strided)) {
    expect_same_bits(run(), run({.strided = true}), "strided");
  }
}

TEST_P(OpCases, EveryRunGivesTheSameBits) {
  const Outcome first = run();
  expect_same_bits(first, run(), "a second run");
  const int before = threads();
  for (const int count : {1, 2, 3}) {
    set_threads(count);
    expect_same_bits(first, run(), std::to_string(count) + " threads");
  }
  set_threads(before);
  const Device device = GetParam().device;
  for (int schedule = 1; schedule < schedule_count(device); ++schedule) {
    set_schedule(device, schedule);
    expect_same_bits(first, run(), "schedule " + std::to_string(schedule));
  }
  set_schedule(device, 0);
}

TEST_P(OpCases, CheckpointedGradientsHaveTheSameBits) {
  const Outcome outcome = run({.checkpointed = true});
  expect_same_bits(run(), outcome, "checkpointed");
  std::size_t next = 0;
  for (const Tensor& y : outcome.outputs) {
    if (is_floating(y.dtype()) && next < outcome.replayed.size()) {
      EXPECT_TRUE(same_bits(y, outcome.replayed[next++])) << "a replayed output";
    }
  }
}

TEST_P(OpCases, FlopsAgreeWithTheRow) {
  if (const OpCase& op = GetParam().op; op.forward_flops >= 0) {
    const TapeReport report = run({.checkpointed = true}).report;
    EXPECT_EQ(report.forward_flops, op.forward_flops);
    EXPECT_EQ(report.replay_flops, op.forward_flops);
    EXPECT_EQ(report.backward_flops, op.backward_flops);
  }
}

TEST_P(OpCases, FrozenInputsLeaveTheOtherGradients) {
  const OpCase& op = GetParam().op;
  std::vector<std::size_t> differentiable;
  for (std::size_t i = 0; i < op.inputs.size(); ++i) {
    if (wants_gradient(op.inputs[i], kAll, i)) {
      differentiable.push_back(i);
    }
  }
  if (differentiable.empty() || differentiable.size() > 4) {
    return;
  }
  const Outcome full = run();
  for (Mask subset = 0; subset < (Mask{1} << differentiable.size()); ++subset) {
    Mask wanted = 0;
    Outcome expected = full;
    for (std::size_t j = 0; j < differentiable.size(); ++j) {
      if (has(subset, j)) {
        wanted |= Mask{1} << differentiable[j];
      } else {
        expected.gradients[differentiable[j]] = Tensor();
      }
    }
    const std::string what = "gradients of inputs " + std::to_string(wanted);
    expect_same_bits(expected, run({.wanted = wanted}), what);
    expect_same_bits(expected, run({.checkpointed = true, .wanted = wanted}), what + ", replayed");
  }
}

// Parameters read by two calls, and two sweeps: every contribution arrives, in f32.
TEST_P(OpCases, GradientsAccumulate) {
  const auto& [op, dtype, device] = GetParam();
  const Mask all = compared(op.oracle(arrays(op, dtype)));
  const std::vector<Tensor> tensors = draw_inputs(op, dtype, device);
  std::vector<std::unique_ptr<Parameter>> parameters(tensors.size());
  Mask wanted = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Argument& argument = op.inputs[i];
    if (wants_gradient(argument, kAll, i)) {
      parameters[i] = std::make_unique<Parameter>(argument.name, tensors[i]);
      parameters[i]->set_grad_dtype(DType::f32);  // also of what the op writes in its own dtype
      wanted |= Mask{1} << i;
    }
  }
  if (wanted == 0) {
    return;
  }
  for (int sweep = 0; sweep < 2; ++sweep) {
    Tape tape;
    Tape::Scope scope(tape);
    std::vector<Variable> losses;
    for (int call = 0; call < 2; ++call) {
      std::vector<Variable> inputs;
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        inputs.push_back(parameters[i] ? Variable(*parameters[i]) : Variable(tensors[i]));
      }
      losses.push_back(weighted_sum(op.run(inputs), all));
    }
    if (!losses[0].needs_gradient()) {
      return;
    }
    backward(losses);
  }
  Outcome outcome;
  for (const auto& p : parameters) {
    outcome.gradients.push_back(p && p->has_gradient() ? p->gradient() : Tensor());
  }
  expect_gradients(outcome, all, 4.0, wanted);
}

// Shapes and dtypes of a step, and the most bytes that it had at once.
struct Footprint {
  std::vector<std::pair<Shape, DType>> layouts;
  std::int64_t peak_bytes = 0;
  friend bool operator==(const Footprint&, const Footprint&) = default;
};

Footprint footprint(const OpCase& op, DType dtype, Device device, bool checkpointed) {
  const std::vector<Tensor> tensors = draw_inputs(op, dtype, device);
  Allocator& bytes = allocator(device);
  bytes.reset_peak();
  const std::int64_t before = bytes.report().live_bytes;
  Footprint result;
  Tape tape;
  Tape::Scope scope(tape);
  std::vector<Variable> inputs = variables(op, tensors, kAll);
  std::vector<Variable> outputs =
      checkpointed ? checkpoint("case", op.run, inputs) : op.run(inputs);
  std::erase_if(inputs, [](const Variable& x) { return !x.needs_gradient(); });
  for (const Variable& y : outputs) {
    result.layouts.emplace_back(y.shape(), y.dtype());
  }
  // Kernels are compared, not how the loss is computed.
  result.peak_bytes = bytes.report().peak_bytes - before;
  const Variable loss = weighted_sum(outputs, kAll);
  outputs.clear();
  bytes.reset_peak();
  if (loss.needs_gradient()) {
    for (const Tensor& g : grad({&loss, 1}, inputs)) {
      result.layouts.emplace_back(g.defined() ? g.shape() : Shape(), g.dtype());
    }
  }
  result.peak_bytes = std::max(result.peak_bytes, bytes.report().peak_bytes - before);
  return result;
}

TEST_P(OpCases, ADryRunHasTheSameShapesAndPeak) {
  const auto& [op, dtype, device] = GetParam();
  for (const bool checkpointed : {false, true}) {
    const Footprint real = footprint(op, dtype, device, checkpointed);
    const DryRunFor stands_for(device.kind);
    const Footprint dry = footprint(op, dtype, meta, checkpointed);
    EXPECT_TRUE(real.layouts == dry.layouts);
    EXPECT_EQ(real.peak_bytes, dry.peak_bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(All, OpCases, ::testing::ValuesIn(rows()), row_name);

class OpMistakes : public ::testing::TestWithParam<OpCase> {};

TEST_P(OpMistakes, AreNamed) {
  for (const Mistake& mistake : GetParam().mistakes) {
    std::string message = "no Error";
    try {
      mistake.call();
      for (const Device device : cuda_devices_in_use()) {
        cuda_synchronize(device);  // what the device has found is said where the host waits
      }
    } catch (const Error& e) {
      message = e.what();
    }
    EXPECT_EQ(message, mistake.message);
  }
}

std::vector<OpCase> cases_with_mistakes() {
  std::vector<OpCase> all = all_op_cases();
  std::erase_if(all, [](const OpCase& op) { return op.mistakes.empty(); });
  return all;
}

INSTANTIATE_TEST_SUITE_P(All, OpMistakes, ::testing::ValuesIn(cases_with_mistakes()),
                         [](const auto& row) { return as_name(row.param.name); });

TEST(OpTable, HasUniqueNames) {
  std::set<std::string> names;
  for (const OpCase& op : all_op_cases()) {
    EXPECT_TRUE(names.insert(op.name).second) << op.name;
    EXPECT_FALSE(op.dtypes.empty()) << op.name;
  }
}

}  // namespace
}  // namespace reprise::testing

#include "autograd/tape.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "autograd/run_forward.h"
#include "autograd/tape_state.h"

namespace reprise {
namespace {

// An op running for the first time. An input's buffer is given to an output when the handle that
// the caller moved in is the last use of it.
class RecordingForward final : public RunForward {
 public:
  RecordingForward(std::span<const Tensor> inputs, std::span<Variable> handles, std::size_t outputs,
                   Mask gradients, Mask saved_inputs)
      : RunForward(inputs, outputs, gradients), handles_(handles), saved_inputs_(saved_inputs) {}

 private:
  Value* last_use(std::size_t i) const override {
    Value* v = handles_[i].value();
    const bool last =
        v != nullptr && v->handles == 1 && v->need == 0 && (saved_inputs_ >> i & 1u) == 0;
    return last ? v : nullptr;
  }

  std::span<Variable> handles_;
  Mask saved_inputs_;
};

template <class T, class F>
bool all_of(const Tensor& x, F&& finite) {
  const T* first = x.data<T>();
  return std::all_of(first, first + x.numel(), finite);
}

bool all_finite(const Tensor& tensor) {
  const Tensor x = tensor.contiguous(MemoryKind::workspace);
  switch (x.dtype()) {
    case DType::f32:
      return all_of<float>(x, [](float v) { return std::isfinite(v); });
    case DType::f64:
      return all_of<double>(x, [](double v) { return std::isfinite(v); });
    case DType::bf16:
      return all_of<bfloat16>(x, [](bfloat16 v) { return std::isfinite(to_float(v)); });
    default:
      return true;
  }
}

}  // namespace

Tape::Tape() : state_(std::make_unique<TapeState>()) {}
Tape::~Tape() = default;
void Tape::check_finite(bool on) {
  state_->check_finite = on;
}
void Tape::reset() {
  if (state_->sweeping) {
    fail("reset", "a sweep of this tape is under way");
  }
  state_->reset();
}
const TapeReport& Tape::report() const {
  return state_->report;
}
std::int64_t Tape::open_segment() const {
  return state_->open_segment();
}
const Policies& Tape::policies() const {
  return state_->policies;
}

OpenSegment::OpenSegment(std::string_view name)
    : tape_(Tape::current()), exceptions_(std::uncaught_exceptions()) {
  if (tape_ != nullptr) {
    tape_->state().open(name);
  }
}

OpenSegment::~OpenSegment() noexcept(false) {
  if (tape_ == nullptr || !tape_->state().segment_open()) {
    return;
  }
  try {
    tape_->state().close();
  } catch (...) {
    tape_->state().reset();
    if (std::uncaught_exceptions() == exceptions_) {
      throw;
    }
  }
}

Value* TapeState::add_value(Tensor tensor, Value* root) {
  auto value = std::make_unique<Value>();
  if (root != nullptr) {
    tensor.drop_storage();
    value->root = root;
    retain(root);
  }
  value->tensor = std::move(tensor);
  value->tape = this;
  value->segment = open_;
  retain(value.get());
  values_.push_back(value.get());
  return value.release();
}

Value* TapeState::leaf(const Parameter& parameter) {
  Value*& leaf = leaves_[parameter.life().get()];
  if (leaf == nullptr || leaf->version != parameter.version() ||
      leaf->needs_gradient != parameter.trainable()) {
    Tensor layout = parameter.value();
    layout.drop_storage();
    leaf = add_value(std::move(layout), nullptr);
    leaf->segment = -1;
    leaf->parameter = const_cast<Parameter*>(&parameter);
    leaf->life = parameter.life();
    leaf->version = parameter.version();
    leaf->needs_gradient = parameter.trainable();
  }
  return leaf;
}

void TapeState::check_inputs(const Op& op, std::span<Variable> inputs) {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    Value* value = inputs[i].value();
    if (value == nullptr) {
      continue;
    }
    // A view of what a tape has truncated has no history of its own, but its root may.
    if (value->stale || value->root->stale) {
      fail(op.name(), "input {} is of a tape that was reset (after backward): detach it", i);
    }
    const TapeState* home = value->tape != nullptr ? value->tape : value->root->tape;
    if (home != nullptr && home != this) {
      fail(op.name(), "input {} is on another tape than the current one: detach it", i);
    }
    if (value->root->is_parameter() && value->root->outlived()) {
      fail(op.name(), "input {} is parameter {}, which was destroyed", i, value->root->life->name);
    }
  }
}

void TapeState::bind(Value* value) {
  if (value->tape == nullptr) {
    value->tape = this;
    value->asked = value->candidate = value->reached = 0;  // epochs start again with each tape
    retain(value);
    values_.push_back(value);
  }
}

void TapeState::bind(std::span<Variable> inputs) {
  for (const Variable& input : inputs) {
    if (input.defined()) {
      bind(input.value());
      bind(input.value()->root);
    }
  }
}

Variable TapeState::unrecorded_view(const Op& op, Value* source) {
  Tensor view = static_cast<const ViewOp&>(op).view(source->read());
  if (source->tape == nullptr) {
    return Variable(std::move(view));
  }
  return Variable(add_value(std::move(view), source->root));
}

// Every enclosing segment that the input comes into from outside notes the read: an inner segment
// may let go at its close what only an outer one's replay needs.
void TapeState::hold_inputs(std::span<Variable> inputs, bool add) {
  for (const Variable& input : inputs) {
    Value* value = input.value();
    if (value == nullptr || value->root->is_parameter()) {
      continue;
    }
    for (std::int32_t s = open_; s >= 0 && outside(value, segments_[static_cast<std::size_t>(s)]);
         s = segments_[static_cast<std::size_t>(s)].parent) {
      auto& ext = segments_[static_cast<std::size_t>(s)].ext;
      if (add) {
        ext.push_back(value->root);
        retain(value->root);
        add_need(value);
      } else {
        release(ext.back());
        ext.pop_back();
        drop_need(value);
      }
    }
  }
}

std::vector<Variable> TapeState::record(std::unique_ptr<const Op> op, std::span<Variable> inputs,
                                        bool gradients_on) {
  if (sweeping) {
    fail(op->name(), "an op cannot run during a sweep (from a callback of backward)");
  }
  begin_report();
  offload.tick();
  ensure(inputs.size() <= kMaxArity && op->outputs() <= kMaxArity, "{} has more than {} values",
         op->name(), kMaxArity);
  check_inputs(*op, inputs);
  std::vector<Tensor> tensors(inputs.size());
  Mask gradients = 0, present = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].defined()) {
      present |= Mask{1} << i;
      tensors[i] = inputs[i].value()->read();
      gradients |= Mask{inputs[i].needs_gradient()} << i;
    }
  }
  gradients &= gradients_on ? op->differentiable() : 0;
  const bool recorded = gradients != 0 || open_ >= 0;
  if (!recorded && op->is_view()) {
    return {unrecorded_view(*op, inputs[0].value())};
  }
  if (recorded) {
    bind(inputs);
  }
  Saved saved = gradients != 0 ? op->saved(gradients) : Saved{};
  saved.inputs &= present;
  hold_inputs(inputs, true);
  RecordingForward run(tensors, inputs, op->outputs(), gradients, saved.inputs);
  try {
    run.run(*op);
  } catch (...) {
    hold_inputs(inputs, false);
    throw;
  }
  if (check_finite) {
    expect_finite(*op, run.outputs());
  }
  const Cost cost = op->cost(Call(tensors, run.outputs()));
  report.forward_flops += cost.flops;
  std::vector<Variable> results;
  if (!recorded) {
    for (Tensor& output : run.outputs()) {
      results.emplace_back(std::move(output));
    }
    return results;
  }

  Record record;
  record.gradients = gradients;
  record.saved = saved;
  record.segment = open_;
  record.input_count = static_cast<std::uint16_t>(inputs.size());
  record.output_count = static_cast<std::uint16_t>(op->outputs());
  record.first_input = static_cast<std::uint32_t>(edges_.size());
  for (const Variable& input : inputs) {
    edges_.push_back(input.value());
  }
  record.first_output = static_cast<std::uint32_t>(edges_.size());
  for (Tensor& output : run.outputs()) {
    Value* value = add_value(std::move(output), op->is_view() ? inputs[0].value()->root : nullptr);
    value->producer = static_cast<std::int32_t>(records_.size());
    value->needs_gradient = gradients != 0 && is_floating(value->tensor.dtype());
    edges_.push_back(value);
    results.emplace_back(value);
  }
  record.op = std::move(op);
  records_.push_back(std::move(record));
  ++report.records;
  if (open_ < 0) {
    each_saved(records_.back(), [](Value* v) { add_need(v); });
    offload.held(records_.back());
  } else {
    segments_[static_cast<std::size_t>(open_)].any_gradient |= gradients != 0;
    keep_by_policy(records_.back());
  }
  return results;
}

void TapeState::expect_finite(const Op& op, std::span<const Tensor> outputs) const {
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!outputs[k].defined() || outputs[k].device().kind != DeviceKind::cpu ||
        all_finite(outputs[k])) {
      continue;
    }
    const std::string where = open_ < 0
                                  ? "outside of segments"
                                  : "in segment " + segments_[static_cast<std::size_t>(open_)].name;
    fail(op.name(), "output {} of shape {} is not finite, {}", k, to_string(outputs[k].shape()),
         where);
  }
}

Call TapeState::call(const Record& r, std::vector<Tensor>& layouts) const {
  layouts.clear();
  for (Value* v : inputs(r)) {
    layouts.push_back(v != nullptr ? v->tensor : Tensor());
  }
  for (Value* v : outputs(r)) {
    layouts.push_back(v->tensor);
  }
  return Call({layouts.data(), r.input_count}, {layouts.data() + r.input_count, r.output_count});
}

std::vector<std::int32_t> TapeState::path(std::int32_t segment) const {
  std::vector<std::int32_t> path;
  for (; segment >= 0; segment = segments_[static_cast<std::size_t>(segment)].parent) {
    path.push_back(segment);
  }
  std::reverse(path.begin(), path.end());
  return path;
}

void TapeState::on_drop(const Value& root) {
  if (!sweeping && root.producer >= 0 && root.segment >= 0) {
    report.dropped_bytes += root.tensor.bytes();
  }
}

void TapeState::reset() {
  for (Value* value : values_) {
    value->tape = nullptr;
    value->gradient = Tensor();
    value->need = value->pend = 0;
    value->host.reset();
    value->leaving = false;
    // A constant of the user's may go onto another tape; all else has lost its history.
    value->stale = value->producer >= 0 || value->is_parameter() || value->is_view();
    if (value->is_parameter()) {
      if (value->handles > 0 && !value->outlived()) {
        value->tensor = value->parameter->value();
      }
      value->parameter = nullptr;
    }
    if (value->handles == 0 && !value->is_view()) {
      value->tensor.drop_storage();
    }
  }
  for (Segment& segment : segments_) {
    for (Value* value : segment.ext) {
      release(value);
    }
  }
  for (Value* value : values_) {
    release(value);
  }
  offload.reset();
  records_.clear();
  edges_.clear();
  values_.clear();
  segments_.clear();
  leaves_.clear();
  while (!labels_.empty()) {
    labels_.pop_back();
  }
  open_ = -1;
  epoch_ = 0;
  report_ended_ = true;
}

void TapeState::open(std::string_view name) {
  if (sweeping) {
    fail("checkpoint", "segment {} cannot be opened during a sweep", name);
  }
  begin_report();
  Segment segment;
  segment.name = name;
  segment.policy = policies.find(name);
  if (const Offload* which = policies.find_offload(name)) {
    segment.offload = *which;
  }
  segment.first = segment.last = static_cast<std::int32_t>(records_.size());
  segment.parent = open_;
  const auto id = static_cast<std::int32_t>(segments_.size());
  if (open_ >= 0) {
    segments_[static_cast<std::size_t>(open_)].children.push_back(id);
  }
  segment.number = ++report.segments;
  segments_.push_back(std::move(segment));
  open_ = id;
  labels_.emplace_back(std::string(name));
}

void TapeState::close() {
  const std::int32_t id = open_;
  Segment& segment = segments_[static_cast<std::size_t>(id)];
  segment.last = static_cast<std::int32_t>(records_.size());
  open_ = segment.parent;
  labels_.pop_back();
  if (open_ < 0 && !segment.any_gradient) {
    truncate(id);
    return;
  }
  if (open_ >= 0) {
    segments_[static_cast<std::size_t>(open_)].any_gradient |= segment.any_gradient;
  }
  fold(id);
  if (open_ < 0) {
    offload.held(id);
  }
}

}  // namespace reprise

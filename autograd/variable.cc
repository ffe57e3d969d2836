#include "autograd/variable.h"

#include "autograd/run_forward.h"
#include "autograd/tape.h"
#include "autograd/tape_state.h"
#include "autograd/value.h"

namespace reprise {
namespace {

thread_local Tape* current_tape = nullptr;
thread_local bool gradients_off = false;

const Value& expect_defined(const Value* value, const char* what) {
  if (value == nullptr) {
    fail(what, "the Variable is absent");
  }
  return *value;
}

}  // namespace

Variable::Variable(Value* value) : value_(value) {
  add_handle(value_);
}

Variable::Variable(Tensor constant) {
  if (!constant.defined()) {
    return;
  }
  auto value = std::make_unique<Value>();
  value->tensor = std::move(constant);
  value_ = value.release();
  add_handle(value_);
}

Variable::Variable(const Parameter& parameter) {
  if (!parameter.defined()) {
    return;
  }
  if (current_tape != nullptr) {
    value_ = current_tape->state().leaf(parameter);
    add_handle(value_);
  } else {
    *this = Variable(parameter.read());
  }
}

Variable Variable::leaf(Tensor value) {
  if (!value.defined()) {
    fail("leaf", "the tensor is undefined");
  }
  if (!is_floating(value.dtype())) {
    fail("leaf", "must be of a floating dtype, as its gradient is, got {}", name(value.dtype()));
  }
  Variable variable(std::move(value));
  variable.value_->needs_gradient = true;
  return variable;
}

Variable::Variable(const Variable& other) : value_(other.value_) {
  if (value_ != nullptr) {
    add_handle(value_);
  }
}

Variable::~Variable() {
  if (value_ != nullptr) {
    drop_handle(value_);
  }
}

Tensor Variable::tensor() const {
  return expect_defined(value_, "tensor").read();
}
const Shape& Variable::shape() const {
  return expect_defined(value_, "shape").tensor.shape();
}
DType Variable::dtype() const {
  return expect_defined(value_, "dtype").tensor.dtype();
}
Device Variable::device() const {
  return expect_defined(value_, "device").tensor.device();
}
bool Variable::needs_gradient() const {
  return value_ != nullptr && value_->needs_gradient;
}

Tape* Tape::current() {
  return current_tape;
}

Tape::Scope::Scope(Tape& tape, Policies policies)
    : before_(std::exchange(current_tape, &tape)),
      tape_(tape),
      policies_before_(std::exchange(tape.state().policies, std::move(policies))) {}

Tape::Scope::~Scope() {
  tape_.state().policies = std::move(policies_before_);
  current_tape = before_;
}

NoGrad::NoGrad() : before_(std::exchange(gradients_off, true)) {}
NoGrad::~NoGrad() {
  gradients_off = before_;
}

namespace {

// Without a tape an op just runs: inference.
class PlainForward final : public RunForward {
 public:
  PlainForward(std::span<const Tensor> inputs, std::size_t outputs)
      : RunForward(inputs, outputs, 0) {}

 private:
  Value* last_use(std::size_t) const override { return nullptr; }
};

}  // namespace

std::vector<Variable> apply_many(std::unique_ptr<const Op> op, std::span<Variable> inputs) {
  if (current_tape != nullptr) {
    return current_tape->state().record(std::move(op), inputs, !gradients_off);
  }
  std::vector<Tensor> tensors;
  for (const Variable& input : inputs) {
    if (input.defined() && (input.value()->tape != nullptr || input.value()->stale)) {
      fail(op->name(), "an input belongs to a tape that is not current here: detach it");
    }
    tensors.push_back(input.defined() ? input.tensor() : Tensor());
  }
  PlainForward run(tensors, op->outputs());
  run.run(*op);
  std::vector<Variable> results;
  for (Tensor& output : run.outputs()) {
    results.emplace_back(std::move(output));
  }
  return results;
}

Variable apply(std::unique_ptr<const Op> op, std::initializer_list<Variable> inputs) {
  // The list's elements are the caller's handles, moved in: they count as the op's own.
  std::span<Variable> handles(const_cast<Variable*>(inputs.begin()), inputs.size());
  return std::move(apply_many(std::move(op), handles).front());
}

namespace {

class Detach final : public ViewOp {
 public:
  std::string_view name() const override { return "detach"; }
  Tensor view(const Tensor& x) const override { return x; }
  Mask differentiable() const override { return 0; }
  void backward(Backward&) const override {
    throw InternalError("detach has no backward: its output needs no gradient");
  }
};

}  // namespace

Variable detach(const Variable& x) {
  const Value& value = expect_defined(x.value(), "detach");
  // Also what is on another tape: there the error says "detach it".
  if (value.tape == nullptr || current_tape == nullptr || value.tape != &current_tape->state()) {
    return Variable(x.tensor());
  }
  return apply(std::make_unique<Detach>(), {x});
}

Variable named(Variable x, std::string_view name) {
  if (current_tape != nullptr && x.defined()) {
    current_tape->state().name_value(x.value(), name);
  }
  return x;
}

Cost Op::backward_cost(const Call& call, Mask) const {
  const Cost forward = cost(call);
  return {2 * forward.flops, 2 * forward.bytes};
}

}  // namespace reprise

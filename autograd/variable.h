// Variable: a tensor with a place on a tape. Ops take and return Variables; a live Variable keeps
// its value resident, whatever the policies say.
#pragma once

#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "autograd/op.h"
#include "core/tensor.h"

namespace reprise {

struct Value;
class Parameter;
class Tape;

class Variable {
 public:
  Variable() = default;                  // absent: an optional input that is not there
  Variable(Tensor constant);             // NOLINT: a constant; bound to a tape by its first use
  Variable(const Parameter& parameter);  // NOLINT: a leaf on the current tape
  // A leaf whose gradient may be asked for with grad().
  static Variable leaf(Tensor value);
  Variable(const Variable& other);
  Variable(Variable&& other) noexcept : value_(std::exchange(other.value_, nullptr)) {}
  Variable& operator=(Variable other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Variable();

  bool defined() const { return value_ != nullptr; }
  // A copy of the tensor: it shares the storage and keeps that alive by itself.
  Tensor tensor() const;
  const Shape& shape() const;
  std::int64_t size(int dim) const { return shape()[dim]; }
  int rank() const { return shape().rank(); }
  DType dtype() const;
  Device device() const;
  bool needs_gradient() const;

  Value* value() const { return value_; }  // for the tape
  explicit Variable(Value* value);

 private:
  Value* value_ = nullptr;
};

// Runs the op on the current tape (no tape: just runs it) and records it. The elements of `inputs`
// are the op's from then on: the buffer of one that is the last handle on its value may have become
// an output's, so they may only be dropped or assigned to. Throws Error for a stale input ("detach
// it"), inputs of two tapes, an output that the op did not make, or from the op itself; then
// nothing was recorded.
std::vector<Variable> apply_many(std::unique_ptr<const Op> op, std::span<Variable> inputs);
Variable apply(std::unique_ptr<const Op> op, std::initializer_list<Variable> inputs);

// The same value without history: no gradient flows through it. A view.
Variable detach(const Variable& x);
// Gives the value a name, for keep_named and reports. Returns x. The name of a view is one of the
// buffer's that it looks into: kept is that buffer, as made by its op. Several names may be given.
Variable named(Variable x, std::string_view name);

}  // namespace reprise

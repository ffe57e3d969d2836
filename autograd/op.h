// What an operation on Variables declares. An op is a class: its fields are its attributes, all
// that is needed to run it again; the tape keeps the object in its record. Deriving from Op
// without a backward does not compile as an op: the class stays abstract.
//
//   class Scale final : public Op {                     // y = factor * x
//    public:
//     explicit Scale(double factor) : factor_(factor) {}
//     std::string_view name() const override { return "scale"; }
//     void forward(Forward& run) const override {
//       const Tensor& x = run.input(0);
//       kernels::scale(x, factor_, run.output(0, x.shape(), x.dtype(), /*reuse=*/0));
//     }
//     Saved saved(Mask) const override { return {}; }    // backward needs no value
//     void backward(Backward& run) const override {
//       auto dx = run.into(0, /*reuse=*/0);
//       kernels::scale(run.gradient(0), factor_, dx.tensor, dx.accumulate);
//     }
//     Cost cost(const Call& call) const override {
//       return {call.output(0).numel(), 2 * call.output(0).bytes()};
//     }
//    private:
//     double factor_;
//   };
//   Variable scale(Variable x, double factor) {
//     return apply(std::make_unique<Scale>(factor), {std::move(x)});
//   }
//
// Rules: forward and backward are pure functions of the inputs and attributes, bitwise the same at
// every run, whatever the addresses, and whether or not a buffer was reused. Kernels take workspace
// from the allocator only, of a size that is the same on meta.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "core/tensor.h"

namespace reprise {

// Bit i stands for input or output i.
using Mask = std::uint32_t;
inline constexpr std::size_t kMaxArity = 16;  // inputs, and outputs, of one op

// The values that a backward reads; they are held from forward (or restored) until it has run.
struct Saved {
  Mask inputs = 0;
  Mask outputs = 0;
};

struct Cost {
  std::int64_t flops = 0;
  std::int64_t bytes = 0;  // read and written

  Cost& operator+=(Cost other) {
    flops += other.flops;
    bytes += other.bytes;
    return *this;
  }
};

// The tensors of a call as layouts: shape, dtype, strides and device, but no elements.
class Call {
 public:
  Call(std::span<const Tensor> inputs, std::span<const Tensor> outputs)
      : inputs_(inputs), outputs_(outputs) {}
  std::size_t inputs() const { return inputs_.size(); }
  bool has(std::size_t i) const { return i < inputs_.size() && inputs_[i].defined(); }
  const Tensor& input(std::size_t i) const { return inputs_[i]; }
  const Tensor& output(std::size_t k) const { return outputs_[k]; }

 private:
  std::span<const Tensor> inputs_, outputs_;
};

// What an op sees while it runs forward, the first time and in a replay.
class Forward {
 public:
  virtual ~Forward() = default;
  std::size_t inputs() const { return inputs_.size(); }
  // Optional inputs may be absent, at the end or in between.
  bool has(std::size_t i) const { return i < inputs_.size() && inputs_[i].defined(); }
  const Tensor& input(std::size_t i) const { return inputs_[i]; }
  Device device() const { return device_; }
  // As it was when the op was recorded, also in a replay.
  bool needs_gradient(std::size_t i) const { return (gradients_ >> i & 1u) != 0; }
  // Memory for output k, uninitialised and contiguous. With `reuse` it may be the buffer of that
  // input (same bytes, contiguous, and nobody else needs it): then the kernel works in place.
  virtual Tensor output(std::size_t k, const Shape& shape, DType dtype, int reuse = -1) = 0;
  // A tensor that the op made by itself becomes output k.
  virtual void give_output(std::size_t k, Tensor tensor) = 0;

 protected:
  std::span<const Tensor> inputs_;
  Device device_;
  Mask gradients_ = 0;
};

// Where a gradient goes: added to the tensor when `accumulate`, else written over it.
struct Target {
  Tensor tensor;
  bool accumulate = false;
};

// What an op sees in the sweep.
class Backward {
 public:
  virtual ~Backward() = default;
  bool has(std::size_t i) const { return i < inputs_.size() && inputs_[i].defined(); }
  // Values of the saved set have elements; of the others only the layout may be read.
  const Tensor& input(std::size_t i) const { return inputs_[i]; }
  const Tensor& output(std::size_t k) const { return outputs_[k]; }
  // The gradient of output k; absent when nothing that depends on it reached the losses. One at
  // least is there.
  bool has_gradient(std::size_t k) const { return gradients_[k].defined(); }
  const Tensor& gradient(std::size_t k) const { return gradients_[k]; }
  // True when the gradient of output k is the sweep's own start, exactly 1: known without reading
  // an element, so also on meta.
  bool gradient_is_one(std::size_t k) const { return (ones_ >> k & 1u) != 0; }
  // Whether input i needs a gradient.
  bool wants(std::size_t i) const { return (wanted_ >> i & 1u) != 0; }

  // For each wanted input exactly one of the two:
  // Memory for the gradient of input i, of its shape and dtype (of an input in Op::weights() that
  // is a parameter: its grad_dtype, which may be f32 for a bf16 parameter). With `reuse` it may be
  // the buffer of the gradient of that output, when nobody else has it. What accumulates may be a
  // parameter's gradient itself: an op that writes such memory in several steps asks for all that
  // can fail (other targets, workspace) before the first.
  virtual Target into(std::size_t i, int reuse = -1) = 0;
  // A buffer handed over without a copy: one the op made or saved, or a gradient passed on.
  virtual void give(std::size_t i, Tensor gradient) = 0;

 protected:
  std::span<const Tensor> inputs_, outputs_;
  std::span<Tensor> gradients_;
  Mask wanted_ = 0, ones_ = 0;
};

class Op {
 public:
  virtual ~Op() = default;
  // The kind, as policies and reports name it: "rms_norm".
  virtual std::string_view name() const = 0;
  virtual std::size_t outputs() const { return 1; }
  virtual void forward(Forward& run) const = 0;
  // `gradients`: the inputs that need one. Inputs that are absent may be named all the same.
  virtual Saved saved(Mask gradients) const = 0;
  virtual void backward(Backward& run) const = 0;
  virtual Cost cost(const Call& call) const = 0;
  // Default: twice the forward.
  virtual Cost backward_cost(const Call& call, Mask gradients) const;
  // Inputs that never have a gradient (indices, masks): bit i set means differentiable.
  virtual Mask differentiable() const { return ~Mask{0}; }
  // Inputs whose gradient backward can write in f32 also when the input is bf16. Gradients of the
  // others are made in the input's dtype, and converted by the tape.
  virtual Mask weights() const { return 0; }
  // True when a replay could give something else (data-dependent indices): the outputs are kept
  // under every policy.
  virtual bool must_keep() const { return false; }
  // True when output 0 is a view of input 0 (see ViewOp).
  virtual bool is_view() const { return false; }
};

// An op whose output shares the memory of its input; dropped and restored with it, never executed
// in a replay.
class ViewOp : public Op {
 public:
  virtual Tensor view(const Tensor& x) const = 0;
  bool is_view() const final { return true; }
  void forward(Forward& run) const final { run.give_output(0, view(run.input(0))); }
  Saved saved(Mask) const final { return {}; }
  Cost cost(const Call&) const final { return {}; }
  Cost backward_cost(const Call&, Mask) const override { return {}; }
};

}  // namespace reprise

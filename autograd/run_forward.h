// What the three ways to run an op's forward share: plain, recorded, replayed. Internal to
// autograd.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "autograd/op.h"
#include "autograd/value.h"
#include "core/progress.h"

namespace reprise {

class RunForward : public Forward {
 public:
  Tensor output(std::size_t k, const Shape& shape, DType dtype, int reuse) final {
    Value* donor = reuse >= 0 ? last_use(static_cast<std::size_t>(reuse)) : nullptr;
    if (donor != nullptr && fits(*donor, shape, dtype)) {
      Tensor& taken = donor->tensor;
      outputs_[k] = taken.as_view(shape, contiguous_strides(shape), taken.offset());
      taken.drop_storage();
    } else {
      outputs_[k] = Tensor::empty(shape, dtype, device_);
    }
    return outputs_[k];
  }
  void give_output(std::size_t k, Tensor tensor) final { outputs_[k] = std::move(tensor); }
  std::vector<Tensor>& outputs() { return outputs_; }

  void run(const Op& op) {
    progress().tick();
    op.forward(*this);
    for (std::size_t k = 0; k < outputs_.size(); ++k) {
      if (!outputs_[k].defined()) {
        fail(op.name(), "forward made no output {} of {}", k, outputs_.size());
      }
    }
  }

 protected:
  RunForward(std::span<const Tensor> inputs, std::size_t outputs, Mask gradients)
      : outputs_(outputs) {
    inputs_ = inputs;
    gradients_ = gradients;
    for (const Tensor& input : inputs) {
      if (input.defined()) {
        device_ = input.device();
        break;
      }
    }
  }
  // The value of input i when this run is the last that will read it; else null.
  virtual Value* last_use(std::size_t i) const = 0;

 private:
  // The whole of a buffer that is the value's alone, made by an op, serves the output.
  static bool fits(const Value& v, const Shape& shape, DType dtype) {
    return !v.is_view() && v.producer >= 0 && v.tensor.dtype() == dtype &&
           v.tensor.numel() == shape.numel() && v.tensor.is_contiguous() &&
           v.tensor.storage_references() == 2 &&  // the value's and the copy in inputs_
           v.tensor.storage_bytes() == v.tensor.bytes();
  }

  std::vector<Tensor> outputs_;
};

}  // namespace reprise

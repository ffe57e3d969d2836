#include "autograd/parameter.h"

#include <utility>

#include "autograd/parameter_sweep.h"

namespace reprise {

Parameter::Parameter(std::string name, Tensor value, bool trainable)
    : name_(std::move(name)), value_(std::move(value)), trainable_(trainable) {
  value_.reclassify(MemoryKind::parameters);
}

Parameter::~Parameter() {
  life_->ended = true;
  life_->name = std::move(name_);
}

Tensor Parameter::write() {
  ++version_;
  return value_;
}

void Parameter::expect_ready(const char* caller) const {
  if (gradient_pending_) {
    fail(caller, "a sweep still adds to the gradient of {}: wait for on_ready", name_);
  }
}

void Parameter::bind_value(Tensor value) {
  if (data_pending_) {
    fail("bind_value", "a sweep may still read {}: wait for on_last_read", name_);
  }
  if (value_.defined() && (value.shape() != value_.shape() || value.dtype() != value_.dtype())) {
    fail("bind_value", "{} must be {} {}, got {} {}", name_, reprise::name(value_.dtype()),
         to_string(value_.shape()), reprise::name(value.dtype()), to_string(value.shape()));
  }
  value_ = std::move(value);
  ++version_;
}

void Parameter::restore_value(const Tensor& storage) {
  ensure(storage.shape() == value_.shape() && storage.dtype() == value_.dtype() &&
             storage.is_contiguous(),
         "the value of {} is {} {}, not {} {}", name_, reprise::name(value_.dtype()),
         to_string(value_.shape()), reprise::name(storage.dtype()), to_string(storage.shape()));
  value_ = storage;
}

const Tensor& Parameter::gradient() const {
  if (stale_) {
    fail("gradient", "the gradient of {} is stale after a failed backward: zero it first", name_);
  }
  if (!has_gradient_) {
    fail("gradient", "{} has no gradient", name_);
  }
  return gradient_;
}

Tensor Parameter::write_gradient() {
  return gradient();
}

void Parameter::zero_gradient() {
  expect_ready("zero_gradient");
  has_gradient_ = false;
  stale_ = false;
  if (!bound_) {
    gradient_ = Tensor();
  }
}

void Parameter::set_grad_dtype(DType dtype) {
  expect_ready("set_grad_dtype");
  if (dtype != DType::f32 && dtype != value_.dtype()) {
    fail("set_grad_dtype", "gradient of {} must be f32 or {}, got {}", name_,
         reprise::name(value_.dtype()), reprise::name(dtype));
  }
  if (has_gradient_ || bound_) {
    fail("set_grad_dtype", "{} has a gradient or a bound storage already", name_);
  }
  grad_dtype_ = dtype;
}

void Parameter::bind_gradient(Tensor storage) {
  expect_ready("bind_gradient");
  if (storage.shape() != value_.shape() || storage.dtype() != grad_dtype() ||
      !storage.is_contiguous()) {
    fail("bind_gradient", "storage for {} must be contiguous {} {}, got {} {}", name_,
         reprise::name(grad_dtype()), to_string(value_.shape()), reprise::name(storage.dtype()),
         to_string(storage.shape()));
  }
  if (has_gradient_) {
    storage.copy_from(gradient_);
  }
  gradient_ = std::move(storage);
  bound_ = true;
}

void Parameter::unbind_gradient() {
  expect_ready("unbind_gradient");
  if (has_gradient_ || stale_) {
    fail("unbind_gradient", "{} has a gradient", name_);
  }
  gradient_ = Tensor();
  bound_ = false;
}

void Parameter::set_gradient_present() {
  expect_ready("set_gradient_present");
  if (!bound_ || stale_) {
    fail("set_gradient_present", "{} {}", name_,
         stale_ ? "is stale after a failed backward: zero it first" : "has no bound storage");
  }
  has_gradient_ = true;
}

bool Parameter::Sweep::begin(Parameter& p) {
  if (std::exchange(p.sweeping_, true)) {
    return false;
  }
  p.gradient_pending_ = p.data_pending_ = true;
  return true;
}

void Parameter::Sweep::end(Parameter& p) {
  p.sweeping_ = p.gradient_pending_ = p.data_pending_ = false;
}

void Parameter::Sweep::restore(Parameter& p, Tensor gradient) {
  if (p.gradient_.defined()) {
    p.gradient_.copy_from(gradient);
  } else {
    p.gradient_ = std::move(gradient);  // a callback has zeroed it
  }
  p.has_gradient_ = true;
}

void Parameter::Sweep::bind_to_host(Parameter& p) {
  if (p.host_ == nullptr || p.bound_) {
    return;
  }
  if (Tensor storage = p.host_->gradient_storage(p); storage.defined()) {
    ensure(storage.shape() == p.shape() && storage.dtype() == p.grad_dtype() &&
               storage.is_contiguous(),
           "the storage for the gradient of {} is {} {}", p.name_, reprise::name(storage.dtype()),
           to_string(storage.shape()));
    p.gradient_ = std::move(storage);
    p.bound_ = true;
  }
}

Tensor Parameter::Sweep::fresh(const Parameter& p) {
  return p.bound_
             ? p.gradient_
             : Tensor::empty(p.shape(), p.grad_dtype(), p.value().device(), MemoryKind::gradients);
}

void Parameter::Sweep::set(Parameter& p, Tensor gradient) {
  if (p.bound_) {
    ensure(gradient.shares_storage(p.gradient_), "gradient of {} is not in its bound storage",
           p.name_);
  } else {
    gradient.reclassify(MemoryKind::gradients);
    p.gradient_ = std::move(gradient);
  }
  p.has_gradient_ = true;
}

void Parameter::Sweep::set_absent(Parameter& p) {
  p.has_gradient_ = false;
  if (!p.bound_) {
    p.gradient_ = Tensor();
  }
}

}  // namespace reprise

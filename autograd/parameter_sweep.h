// How the sweep writes a parameter's gradient. Internal to autograd.
#pragma once

#include "autograd/op.h"
#include "autograd/parameter.h"

namespace reprise {

struct Parameter::Sweep {
  static bool begin(Parameter& p) { return !std::exchange(p.sweeping_, true); }
  static void end(Parameter& p) { p.sweeping_ = false; }
  // Storage for a gradient that is absent: the bound one, or new.
  static Tensor fresh(const Parameter& p);
  static bool bound(const Parameter& p) { return p.bound_; }
  static const Tensor& present(const Parameter& p) { return p.gradient_; }
  // The gradient is now `gradient`, complete.
  static void set(Parameter& p, Tensor gradient);
  static void set_absent(Parameter& p);
  static void set_stale(Parameter& p) { p.stale_ = true; }
};

}  // namespace reprise

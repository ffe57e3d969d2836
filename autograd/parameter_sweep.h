// How the sweep writes a parameter's gradient. Internal to autograd.
#pragma once

#include "autograd/op.h"
#include "autograd/parameter.h"

namespace reprise {

struct Parameter::Sweep {
  // False: another sweep has it.
  static bool begin(Parameter& p);
  static void end(Parameter& p);
  // What is called before the callbacks: from here on the user may change it.
  static void ready(Parameter& p) { p.gradient_pending_ = false; }
  static void read_last(Parameter& p) { p.data_pending_ = false; }
  // The first contribution to a gradient that is absent is about to be written.
  static void bind_to_host(Parameter& p);
  // Storage for a gradient that is absent: the bound one, or new.
  static Tensor fresh(const Parameter& p);
  static bool bound(const Parameter& p) { return p.bound_; }
  static const Tensor& present(const Parameter& p) { return p.gradient_; }
  // The gradient is now `gradient`, complete.
  static void set(Parameter& p, Tensor gradient);
  static void set_absent(Parameter& p);
  // As it was before the sweep, whatever a callback has done to it meanwhile.
  static void restore(Parameter& p, Tensor gradient);
  static void set_stale(Parameter& p) { p.stale_ = true; }
};

}  // namespace reprise

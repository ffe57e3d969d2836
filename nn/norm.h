// Normalisation layers; formulas in kernels/norm.h.
#pragma once

#include <cstdint>

#include "autograd/norm.h"
#include "nn/module.h"

namespace reprise::nn {

class RmsNorm : public Module {
 public:
  RmsNorm(std::int64_t width, double epsilon, Place place);
  // x [.., C].
  Variable operator()(Variable x) const;
  // Normalises x + residual; gives the sum too.
  Normed operator()(Variable x, Variable residual) const;

  Parameter weight;

 private:
  double epsilon_;
};

class LayerNorm : public Module {
 public:
  LayerNorm(std::int64_t width, double epsilon, Place place);
  Variable operator()(Variable x) const;
  Normed operator()(Variable x, Variable residual) const;

  Parameter weight, bias;

 private:
  double epsilon_;
};

}  // namespace reprise::nn

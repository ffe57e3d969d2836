#include "nn/norm.h"

#include <utility>

namespace reprise::nn {

RmsNorm::RmsNorm(std::int64_t width, double epsilon, Place place)
    : weight("weight", parameter_tensor(Shape{width}, place)), epsilon_(epsilon) {
  add("weight", weight);
}

Variable RmsNorm::operator()(Variable x) const {
  return rms_norm(std::move(x), weight, epsilon_);
}

Normed RmsNorm::operator()(Variable x, Variable residual) const {
  return rms_norm_residual(std::move(x), std::move(residual), weight, epsilon_);
}

LayerNorm::LayerNorm(std::int64_t width, double epsilon, Place place)
    : weight("weight", parameter_tensor(Shape{width}, place)),
      bias("bias", parameter_tensor(Shape{width}, place)),
      epsilon_(epsilon) {
  add("weight", weight);
  add("bias", bias);
}

Variable LayerNorm::operator()(Variable x) const {
  return layer_norm(std::move(x), weight, bias, epsilon_);
}

Normed LayerNorm::operator()(Variable x, Variable residual) const {
  return layer_norm_residual(std::move(x), std::move(residual), weight, bias, epsilon_);
}

}  // namespace reprise::nn

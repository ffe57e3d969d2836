// Linear: y = x W^T + b, W [out, in]; in the layout of GPT-2's files y = x W + b, W [in, out].
// A low-rank adapter may be put around it later (nn/lora.h).
#pragma once

#include <cstdint>

#include "autograd/variable.h"
#include "nn/module.h"

namespace reprise::nn {

class Lora;

struct LinearOptions {
  bool bias = false;
  bool in_out = false;  // W is [in, out]
};

class Linear : public Module {
 public:
  Linear(std::int64_t in, std::int64_t out, LinearOptions options, Place place);

  // x [.., in] -> [.., out].
  Variable operator()(Variable x) const;

  std::int64_t in() const { return in_; }
  std::int64_t out() const { return out_; }
  bool in_out() const { return options_.in_out; }
  // The active adapter, which belongs to the model; null without one.
  Lora* lora() const { return lora_; }
  // Throws Error when its sizes are not those of this layer.
  void set_lora(Lora* lora);

  Parameter weight, bias;

 private:
  std::int64_t in_, out_;
  LinearOptions options_;
  Lora* lora_ = nullptr;
};

}  // namespace reprise::nn

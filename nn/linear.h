// Linear: y = x W^T + b, W [out, in]; in the layout of GPT-2's files y = x W + b, W [in, out].
// A low-rank adapter may be put on it later (nn/lora.h): y += s B(A(dropout(x))).
#pragma once

#include <cstdint>
#include <memory>

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
  ~Linear() override;

  // x [.., in] -> [.., out].
  Variable operator()(Variable x) const;

  std::int64_t in() const { return in_; }
  std::int64_t out() const { return out_; }
  bool in_out() const { return options_.in_out; }
  // Null without an adapter.
  Lora* lora() const { return lora_.get(); }
  // Throws Error when there is one already, or its sizes are not those of this layer.
  void set_lora(std::unique_ptr<Lora> lora);
  // Without it from now on; null when there is none.
  std::unique_ptr<Lora> take_lora();

  Parameter weight, bias;

 private:
  std::int64_t in_, out_;
  LinearOptions options_;
  std::unique_ptr<Lora> lora_;
};

}  // namespace reprise::nn

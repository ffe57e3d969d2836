// A digest of named tensors: equal exactly when names, order and bytes are.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "core/tensor.h"

namespace reprise::train {

class Digest {
 public:
  Digest();
  ~Digest();
  Digest(const Digest&) = delete;

  // Host tensors, contiguous.
  void add(std::string_view name, const Tensor& tensor);
  // XXH3-128 of all so far, 32 hexadecimal digits.
  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace reprise::train

// The low-rank adapter of one layer.
#pragma once

#include <cstdint>
#include <functional>

#include "autograd/variable.h"
#include "nn/adapters/config.h"
#include "nn/module.h"

namespace reprise::nn {

struct LoraShape {
  std::int64_t in = 0, out = 0, rank = 0;
  double scale = 1;    // s
  double dropout = 0;  // none for an embedding
  bool weight_decomposed = false;
  bool b_bias = false;  // none for an embedding
};

// Common to both: A [R, in], B [out, R] and, where they are there, DoRA's lengths m [out] and the
// bias of B [out].
class LoraBase : public Module {
 public:
  bool is_adapter() const override { return true; }
  virtual void initialize(LoraInit init, Generator& generator) = 0;

  std::int64_t in() const { return shape_.in; }
  std::int64_t out() const { return shape_.out; }
  std::int64_t rank() const { return shape_.rank; }
  double scale() const { return shape_.scale; }
  bool weight_decomposed() const { return shape_.weight_decomposed; }
  // m becomes what it is in the unchanged model: the row lengths of W + s B A.
  void initialize_magnitude(const Tensor& weight, bool in_out);

  Parameter a, b, magnitude, b_bias;

 protected:
  LoraBase(const LoraShape& shape, const char* a_name, const char* b_name, Place place);
  // m / |W + s B A| x, x [.., out].
  Variable decompose(Variable x, const Parameter& weight, bool in_out) const;

  LoraShape shape_;
};

// Of a Linear: its parameters are "lora_A.weight", "lora_B.weight", "lora_magnitude_vector" and
// "lora_B.bias" of that layer.
class Lora : public LoraBase {
 public:
  Lora(const LoraShape& shape, Place place);
  void initialize(LoraInit init, Generator& generator) override;
  // y + s (B(A(dropout(x))) + b_B) for the layer's own y [.., out] of x [.., in].
  Variable operator()(Variable y, Variable x) const;
  // The layer's output where it is weight-decomposed: `whole` is its own without the bias, W x and
  // what else it adds; `product` is W x. As PEFT has it, what else a layer adds is scaled with W x,
  // but not where dropout is on: then only W and the adapter see the dropped input.
  using Product = std::function<Variable(Variable)>;
  Variable decomposed(Variable x, const Product& whole, const Product& product,
                      const Parameter& weight, const Parameter& bias, bool in_out) const;
};

// Of an Embedding: "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector".
class LoraEmbedding : public LoraBase {
 public:
  LoraEmbedding(const LoraShape& shape, Place place);
  void initialize(LoraInit init, Generator& generator) override;
  // y + s B(A[:, id]) for the layer's own y [.., out]; the row `padding` gets no gradient.
  Variable operator()(Variable y, const Tensor& ids, std::int64_t padding,
                      const Parameter& table) const;
};

}  // namespace reprise::nn

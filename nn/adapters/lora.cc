#include "nn/adapters/lora.h"

#include <cmath>
#include <utility>

#include "autograd/dropout.h"
#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/low_rank.h"
#include "autograd/scaling.h"
#include "autograd/shape.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "nn/initialize.h"

namespace reprise::nn {

LoraBase::LoraBase(const LoraShape& shape, const char* a_name, const char* b_name, Place place)
    : a(a_name, parameter_tensor(Shape{shape.rank, shape.in}, place)),
      b(b_name, parameter_tensor(Shape{shape.out, shape.rank}, place)),
      magnitude("lora_magnitude_vector",
                shape.weight_decomposed ? parameter_tensor(Shape{shape.out}, place) : Tensor()),
      b_bias("lora_B.bias", shape.b_bias ? parameter_tensor(Shape{shape.out}, place) : Tensor()),
      shape_(shape) {
  add(a_name, a);
  add(b_name, b);
  add("lora_magnitude_vector", magnitude);
  add("lora_B.bias", b_bias);
}

void LoraBase::initialize_magnitude(const Tensor& weight, bool in_out) {
  if (!shape_.weight_decomposed || weight.is_meta()) {
    return;
  }
  const Tensor inverse =
      no_grad([&] { return merged_norms(weight, in_out, a, b, scale()); }).tensor();
  std::vector<float> lengths = inverse.to_vector<float>();
  for (float& x : lengths) {
    x = 1 / x;
  }
  const Tensor values = Tensor::from(lengths, Shape{out()}, inverse.device());
  magnitude.write().copy_from(no_grad([&] { return cast(values, magnitude.dtype()); }).tensor());
}

Variable LoraBase::decompose(Variable x, const Parameter& weight, bool in_out) const {
  Variable inverse = merged_norms(weight, in_out, a, b, scale());          // [out]
  Variable factor = mul(cast(magnitude, DType::f32), std::move(inverse));  // [out]
  return scale_columns(std::move(x), std::move(factor));
}

Lora::Lora(const LoraShape& shape, Place place)
    : LoraBase(shape, "lora_A.weight", "lora_B.weight", place) {}

void Lora::initialize(LoraInit init, Generator& generator) {
  const auto bound = [](const Parameter& weight) {
    return 1 / std::sqrt(static_cast<double>(weight.shape()[1]));
  };
  if (init == LoraInit::gaussian) {
    fill_normal(a.write(), 1 / static_cast<double>(rank()), generator);
  } else {
    fill_uniform(a.write(), -bound(a), bound(a), generator);
  }
  if (init == LoraInit::random) {
    fill_uniform(b.write(), -bound(b), bound(b), generator);
  } else {
    b.write().zero();
  }
  if (b_bias.defined() && init == LoraInit::random) {
    fill_uniform(b_bias.write(), -bound(b), bound(b), generator);
  } else if (b_bias.defined()) {
    b_bias.write().zero();
  }
}

Variable Lora::operator()(Variable y, Variable x) const {
  if (weight_decomposed()) {
    fail("lora", "a weight-decomposed adapter cannot go around this kind of layer");
  }
  const double p = generator() != nullptr ? shape_.dropout : 0;
  Variable u = low_rank(std::move(x), a, {.scale = scale(), .dropout = p}, generator());  // [.., R]
  y = add_low_rank(std::move(y), std::move(u), b);  // [.., out]
  if (!b_bias.defined()) {
    return y;
  }
  const DType dtype = y.dtype();
  return add_bias(std::move(y), cast(reprise::scale(b_bias, scale()), dtype));
}

Variable Lora::decomposed(Variable x, const Product& whole, const Product& product,
                          const Parameter& weight, const Parameter& bias, bool in_out) const {
  const DType dtype = x.dtype(), work = a.dtype();
  const bool dropped = generator() != nullptr && shape_.dropout > 0;
  // As PEFT has it: what was learned sees the dropped input, the frozen layer the whole one, so
  //   y = W x + b + (m/n (W x~ + s B A x~) - W x~).
  Variable own = dropped ? whole(x) : Variable();  // [.., out]
  if (dropped) {
    x = reprise::dropout(std::move(x), shape_.dropout, *generator());
  }
  Variable z = cast(dropped ? product(x) : whole(x), work);  // [.., out]
  Variable less = dropped ? reprise::scale(z, -1.0) : Variable();
  Variable u = low_rank(std::move(x), a, {.scale = scale()});  // [.., R]
  Variable y = decompose(add_low_rank(std::move(z), std::move(u), b), weight, in_out);
  if (dropped) {
    y = reprise::add(std::move(y), std::move(less));
    y = reprise::add(std::move(y), cast(std::move(own), work));
  }
  if (bias.defined()) {
    y = add_bias(std::move(y), cast(bias, work));
  }
  return cast(std::move(y), dtype);  // [.., out]
}

LoraEmbedding::LoraEmbedding(const LoraShape& shape, Place place)
    : LoraBase(shape, "lora_embedding_A", "lora_embedding_B", place) {}

void LoraEmbedding::initialize(LoraInit init, Generator& generator) {
  if (init == LoraInit::random) {
    fill_normal(a.write(), 1, generator);
  } else {
    a.write().zero();
  }
  fill_normal(b.write(), 1, generator);
}

Variable LoraEmbedding::operator()(Variable y, const Tensor& ids, std::int64_t padding,
                                   const Parameter& table) const {
  Variable columns = contiguous(transpose(Variable(a), 0, 1));  // [V, R]
  Variable u = embedding(ids, std::move(columns), padding);     // [.., R]
  if (scale() != 1) {
    u = reprise::scale(std::move(u), scale());
  }
  if (!weight_decomposed()) {
    return add_low_rank(std::move(y), std::move(u), b);  // [.., C]
  }
  const DType dtype = y.dtype();
  Variable z = add_low_rank(cast(std::move(y), a.dtype()), std::move(u), b);
  return cast(decompose(std::move(z), table, /*in_out=*/true), dtype);
}

}  // namespace reprise::nn

// Inputs for the rows: what the tests and the benchmarks of kernels run on.
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <string_view>
#include <tuple>
#include <vector>

#include "core/philox.h"
#include "tests/op_case.h"

namespace reprise::testing {
namespace {

std::uint64_t seed_of(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  return hash;
}

double normal(std::uint64_t seed, std::int64_t i) {
  const PhiloxBlock words = philox(seed, static_cast<std::uint64_t>(i));
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform(words[0])));
  return radius * std::cos(2.0 * std::numbers::pi * uniform(words[1]));
}

void set(const Tensor& tensor, std::int64_t i, double value) {
  switch (tensor.dtype()) {
    case DType::f32:
      tensor.data<float>()[i] = static_cast<float>(value);
      break;
    case DType::bf16:
      tensor.data<bfloat16>()[i] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::f64:
      tensor.data<double>()[i] = value;
      break;
    case DType::i32:
      tensor.data<std::int32_t>()[i] = static_cast<std::int32_t>(value);
      break;
    case DType::i64:
      tensor.data<std::int64_t>()[i] = static_cast<std::int64_t>(value);
      break;
  }
}

double draw(const Argument& argument, std::uint64_t seed, std::int64_t i) {
  switch (argument.fill) {
    case Fill::normal:
      return normal(seed, i);
    case Fill::positive:
      return 0.5 + static_cast<double>(uniform(philox(seed, static_cast<std::uint64_t>(i))[0]));
    case Fill::indices:
      return static_cast<double>(philox(seed, static_cast<std::uint64_t>(i))[0] %
                                 static_cast<std::uint64_t>(argument.limit));
  }
  return 0;
}

// Kept: a case draws the same numbers dozens of times.
const std::vector<double>& drawn(const Argument& argument, std::uint64_t seed, std::int64_t count) {
  static std::map<std::tuple<std::uint64_t, Fill, std::int64_t>, std::vector<double>> kept;
  std::vector<double>& values = kept[{seed, argument.fill, argument.limit}];
  for (auto i = static_cast<std::int64_t>(values.size()); i < count; ++i) {
    values.push_back(draw(argument, seed, i));
  }
  return values;
}

Tensor draw_argument(const Argument& argument, std::uint64_t seed, DType dtype) {
  Tensor tensor = Tensor::empty(argument.shape, dtype);
  if (!argument.values.empty()) {
    for (std::int64_t i = 0; i < tensor.numel(); ++i) {
      set(tensor, i, static_cast<double>(argument.values[static_cast<std::size_t>(i)]));
    }
    return tensor;
  }
  const std::vector<double>& values = drawn(argument, seed, tensor.numel());
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    set(tensor, i, values[static_cast<std::size_t>(i)]);
  }
  return tensor;
}

// The same elements as rows of a wider matrix, at an odd address, with NaNs around them.
Tensor widened(const Tensor& tensor, Device device) {
  const int last = tensor.rank() - 1;
  const std::int64_t width = tensor.shape().back();
  const Tensor wide = Tensor::full(tensor.shape().with(last, width + 3), tensor.dtype(),
                                   std::numeric_limits<double>::quiet_NaN());
  wide.slice(last, 1, 1 + width).copy_from(tensor);
  return wide.to(device).slice(last, 1, 1 + width);
}

}  // namespace

std::vector<Tensor> draw_inputs(const OpCase& op, DType dtype, Device device, bool strided) {
  std::vector<Tensor> inputs;
  for (std::size_t i = 0; i < op.inputs.size(); ++i) {
    const Argument& argument = op.inputs[i];
    const DType own = argument.fill == Fill::indices ? DType::i64
                      : argument.always_f32          ? DType::f32
                                                     : dtype;
    const Tensor host = draw_argument(argument, seed_of(op.name) + i, own);
    inputs.push_back(strided && argument.strided ? widened(host, device) : host.to(device));
  }
  return inputs;
}

Tensor draw_normal(std::uint64_t seed, const Shape& shape, DType dtype, Device device) {
  return draw_argument({.name = "", .shape = shape, .values = {}}, seed, dtype).to(device);
}

Array to_array(const Tensor& tensor) {
  Array array(tensor.shape());
  const Tensor host = tensor.to(cpu).contiguous();
  for (std::int64_t i = 0; i < array.shape.numel(); ++i) {
    switch (host.dtype()) {
      case DType::f32:
        array[i] = static_cast<double>(host.data<float>()[i]);
        break;
      case DType::bf16:
        array[i] = static_cast<double>(to_float(host.data<bfloat16>()[i]));
        break;
      case DType::f64:
        array[i] = host.data<double>()[i];
        break;
      case DType::i32:
        array[i] = static_cast<double>(host.data<std::int32_t>()[i]);
        break;
      case DType::i64:
        array[i] = static_cast<double>(host.data<std::int64_t>()[i]);
        break;
    }
  }
  return array;
}

}  // namespace reprise::testing

// One row of the op table: it drives the value, gradient, dtype, device, error and determinism
// tests, and the kernel benchmark. A family's rows are in tests/op_cases/<family>.cc; the list of
// families in tests/op_cases.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"
#include "core/tensor.h"

namespace reprise::testing {

// A tensor of doubles, for oracles. Row-major.
struct Array {
  Shape shape;
  std::vector<double> at;

  Array() = default;
  explicit Array(const Shape& s) : shape(s), at(static_cast<std::size_t>(s.numel())) {}
  double& operator[](std::int64_t i) { return at[static_cast<std::size_t>(i)]; }
  double operator[](std::int64_t i) const { return at[static_cast<std::size_t>(i)]; }
};

enum class Fill : std::uint8_t { normal, positive, indices };

struct Argument {
  std::string name;
  Shape shape;
  Fill fill = Fill::normal;  // normal: N(0, 1); positive: U(0.5, 1.5); indices: 0..limit-1
  std::int64_t limit = 0;    // of indices; may be drawn from {-100} too, see ignore
  bool gradient = true;
  bool always_f32 = false;           // else the dtype of the run (indices: i64)
  bool strided = false;              // also run as rows of a wider matrix
  std::vector<std::int64_t> values;  // given indices instead of drawn ones
};

struct Mistake {
  std::function<void()> call;
  std::string message;  // the whole text of the Error
};

struct OpCase {
  std::string name;  // "rms_norm/residual"
  std::vector<Argument> inputs;
  // The op on Variables.
  std::function<std::vector<Variable>(const std::vector<Variable>&)> run;
  // The same by its formula, naively, in double. An Array with no shape and no elements for an
  // output that is not compared. Gradients: central differences of the oracle.
  std::function<std::vector<Array>(const std::vector<Array>&)> oracle;
  std::vector<DType> dtypes = {DType::f32, DType::bf16};
  double tolerance = 1.0;  // times the default of the dtype
  std::vector<Mistake> mistakes;
  bool benchmark = false;  // also a row of bench/kernels (its sizes are then large)
  bool test = true;        // false: only a benchmark
};

// One function a family.
std::vector<OpCase> all_op_cases();

}  // namespace reprise::testing

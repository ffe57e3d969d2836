// One row of the op table: it drives the value, gradient, dtype, device, error and determinism
// tests, and the kernel benchmark. A family's rows are in tests/op_cases/<family>.cc; the list of
// families in tests/op_cases.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <ostream>
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
  std::int64_t limit = 0;    // of indices
  bool gradient = true;
  bool always_f32 = false;           // else the dtype of the run (indices: i64)
  bool strided = false;              // also run as rows of a wider matrix
  bool parameter = false;            // a weight: its gradient may be f32 when it is bf16
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
  bool cuda = false;       // the family has a CUDA side: the row runs there too
  // Both by a formula of the row's own, with every gradient asked for; -1: not compared.
  std::int64_t forward_flops = -1, backward_flops = -1;
};

// How GoogleTest names a case.
inline void PrintTo(const OpCase& op, std::ostream* out) {
  *out << op.name;
}

// Families, one a line, in tests/op_cases.cc.
std::vector<OpCase> all_op_cases();

// The inputs of a case, the same at every call: drawn from its name, rounded to their dtype. On
// meta floating inputs have no elements. With `strided` the arguments that say so are rows inside a
// wider matrix, between NaNs.
std::vector<Tensor> draw_inputs(const OpCase& op, DType dtype, Device device, bool strided = false);

// Numbers N(0, 1) that `seed` stands for, rounded to `dtype`.
Tensor draw_normal(std::uint64_t seed, const Shape& shape, DType dtype, Device device);

// Sets a way in which the device may schedule work that must not change a result, 0 .. count - 1;
// the tests run under each of them. 0 is the usual one.
int schedule_count(Device device);
void set_schedule(Device device, int schedule);

// All elements of a tensor on any device, of any dtype.
Array to_array(const Tensor& tensor);

}  // namespace reprise::testing

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/activation_cpu.cc"
#include "hwy/foreach_target.h"
#include "kernels/activation_sides.h"
#include "kernels/pieces.h"
#include "kernels/staging-inl.h"
#include "kernels/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

// Each has value(x) and derivative(x).
struct Silu {
  static HWY_ATTR HWY_INLINE FloatVector value(FloatVector x) {
    return hn::Div(x, hn::Add(constant(1.0f), exponential(hn::Neg(x))));
  }
  static HWY_ATTR HWY_INLINE FloatVector derivative(FloatVector x) {
    const Sigmoid s = sigmoid(x);
    return hn::MulAdd(hn::Mul(x, s.value), s.complement, s.value);
  }
};

struct Gelu {
  static HWY_ATTR HWY_INLINE FloatVector value(FloatVector x) {
    return hn::Mul(x, normal(x).integral);
  }
  static HWY_ATTR HWY_INLINE FloatVector derivative(FloatVector x) {
    const Normal n = normal(x);
    return hn::MulAdd(x, n.density, n.integral);
  }
};

// (1 + tanh u) / 2 is the sigmoid of 2u.
struct GeluTanh {
  static constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;

  // The sigmoid is 0 or 1 well inside of these, and the cube cannot overflow.
  static HWY_ATTR HWY_INLINE FloatVector bounded(FloatVector x) {
    const auto above = hn::IfThenElse(hn::Lt(x, constant(-16.0f)), constant(-16.0f), x);
    return hn::IfThenElse(hn::Gt(above, constant(16.0f)), constant(16.0f), above);
  }
  static HWY_ATTR HWY_INLINE Sigmoid gate(FloatVector x, FloatVector square) {
    const auto inner = hn::MulAdd(hn::Mul(x, square), constant(kCubic), x);
    return sigmoid(hn::Mul(inner, constant(kScale)));
  }
  static HWY_ATTR HWY_INLINE FloatVector value(FloatVector x) {
    const auto z = bounded(x);
    return hn::Mul(x, gate(z, hn::Mul(z, z)).value);
  }
  static HWY_ATTR HWY_INLINE FloatVector derivative(FloatVector x) {
    const auto z = bounded(x);
    const auto square = hn::Mul(z, z);
    const Sigmoid s = gate(z, square);
    const auto slope = hn::MulAdd(square, constant(3 * kCubic * kScale), constant(kScale));
    return hn::MulAdd(hn::Mul(z, slope), hn::Mul(s.value, s.complement), s.value);
  }
};

struct QuickGelu {
  static HWY_ATTR HWY_INLINE FloatVector value(FloatVector x) {
    return hn::Mul(x, sigmoid(hn::Mul(x, constant(1.702f))).value);
  }
  static HWY_ATTR HWY_INLINE FloatVector derivative(FloatVector x) {
    const auto z = hn::Mul(x, constant(1.702f));
    const Sigmoid s = sigmoid(z);
    return hn::MulAdd(hn::Mul(z, s.value), s.complement, s.value);
  }
};

struct Exp {
  static HWY_ATTR HWY_INLINE FloatVector value(FloatVector x) { return exponential(x); }
  static HWY_ATTR HWY_INLINE FloatVector derivative(FloatVector x) { return exponential(x); }
};

template <class A>
struct ValueOf {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const { return A::value(x); }
};

template <class A>
struct GradientOf {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector dy) const {
    return hn::Mul(dy, A::derivative(x));
  }
};

template <class T>
struct GatedSilu {
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector gate, FloatVector up) const {
    return hn::Mul(rounded_to<T>(Silu::value(gate)), up);
  }
};

void activation_run(Activation f, const Matrix& x, const Matrix& y, std::int64_t count) {
  switch (f) {
    case Activation::silu:
      return run_staged(ValueOf<Silu>(), x, y, false, count);
    case Activation::gelu:
      return run_staged(ValueOf<Gelu>(), x, y, false, count);
    case Activation::gelu_tanh:
      return run_staged(ValueOf<GeluTanh>(), x, y, false, count);
    case Activation::quick_gelu:
      return run_staged(ValueOf<QuickGelu>(), x, y, false, count);
    case Activation::exp:
      return run_staged(ValueOf<Exp>(), x, y, false, count);
  }
}

void activation_backward_run(Activation f, const Matrix& x, const Matrix& dy, const Matrix& dx,
                             bool accumulate, std::int64_t count) {
  switch (f) {
    case Activation::silu:
      return run_staged(GradientOf<Silu>(), x, dy, dx, accumulate, count);
    case Activation::gelu:
      return run_staged(GradientOf<Gelu>(), x, dy, dx, accumulate, count);
    case Activation::gelu_tanh:
      return run_staged(GradientOf<GeluTanh>(), x, dy, dx, accumulate, count);
    case Activation::quick_gelu:
      return run_staged(GradientOf<QuickGelu>(), x, dy, dx, accumulate, count);
    case Activation::exp:
      return run_staged(GradientOf<Exp>(), x, dy, dx, accumulate, count);
  }
}

void gated_silu_run(const Matrix& gate, const Matrix& up, const Matrix& y, std::int64_t count) {
  if (gate.dtype == DType::bf16) {
    run_staged(GatedSilu<bfloat16>(), gate, up, y, false, count);
  } else {
    run_staged(GatedSilu<float>(), gate, up, y, false, count);
  }
}

// Of a block in f32. Both gradients are computed before either is written: dgate or dup may be dy.
template <class T>
void gated_block(const float* gate, const float* up, const float* dy, float* dgate, float* dup,
                 std::int64_t count) {
  const std::int64_t step = lanes();
  for (std::int64_t i = 0; i < count; i += step) {
    const std::int64_t left = count - i;
    const bool whole = left >= step;
    const auto g = whole ? load(gate + i) : load_first(gate + i, left);
    const auto u = whole ? load(up + i) : load_first(up + i, left);
    const auto d = whole ? load(dy + i) : load_first(dy + i, left);
    const Sigmoid s = sigmoid(g);
    const auto silu = hn::Mul(g, s.value);
    const auto slope = hn::MulAdd(silu, s.complement, s.value);
    const auto to_gate = hn::Mul(hn::Mul(d, u), slope);
    const auto to_up = hn::Mul(d, rounded_to<T>(Silu::value(g)));
    if (whole) {
      store(to_gate, dgate + i);
      store(to_up, dup + i);
    } else {
      store_first(to_gate, dgate + i, left);
      store_first(to_up, dup + i, left);
    }
  }
}

void gated_silu_backward_run(const Matrix& gate, const Matrix& up, const Matrix& dy,
                             const GatedGradients& gradients, std::int64_t count) {
  HWY_ALIGN float blocks[5][kBlock];
  const auto& [dgate, dup, accumulate_gate, accumulate_up] = gradients;
  for (std::int64_t i = 0; i < count; i += kBlock) {
    const std::int64_t size = std::min(kBlock, count - i);
    const float* g = staged(advanced(gate.at, gate.dtype, i), gate.dtype, size, blocks[0]);
    const float* u = staged(advanced(up.at, up.dtype, i), up.dtype, size, blocks[1]);
    const float* d = staged(advanced(dy.at, dy.dtype, i), dy.dtype, size, blocks[2]);
    if (gate.dtype == DType::bf16) {
      gated_block<bfloat16>(g, u, d, blocks[3], blocks[4], size);
    } else {
      gated_block<float>(g, u, d, blocks[3], blocks[4], size);
    }
    if (dgate.at != nullptr) {
      write_block(blocks[3], advanced(dgate.at, dgate.dtype, i), dgate.dtype, accumulate_gate,
                  size);
    }
    if (dup.at != nullptr) {
      write_block(blocks[4], advanced(dup.at, dup.dtype, i), dup.dtype, accumulate_up, size);
    }
  }
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(activation_run);
HWY_EXPORT(activation_backward_run);
HWY_EXPORT(gated_silu_run);
HWY_EXPORT(gated_silu_backward_run);

}  // namespace

void activation(Activation f, const Matrix& x, const Matrix& y, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(activation_run)(f, x.run(row, begin), y.run(row, begin), end - begin);
  });
}

void activation_backward(Activation f, const Matrix& x, const Matrix& dy, const Matrix& dx,
                         bool accumulate, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(activation_backward_run)
    (f, x.run(row, begin), dy.run(row, begin), dx.run(row, begin), accumulate, end - begin);
  });
}

void gated_silu(const Matrix& gate, const Matrix& up, const Matrix& y, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(gated_silu_run)
    (gate.run(row, begin), up.run(row, begin), y.run(row, begin), end - begin);
  });
}

void gated_silu_backward(const Matrix& gate, const Matrix& up, const Matrix& dy,
                         const GatedGradients& gradients, MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    const GatedGradients here{gradients.dgate.run(row, begin), gradients.dup.run(row, begin),
                              gradients.accumulate_gate, gradients.accumulate_up};
    HWY_DYNAMIC_DISPATCH(gated_silu_backward_run)
    (gate.run(row, begin), up.run(row, begin), dy.run(row, begin), here, end - begin);
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

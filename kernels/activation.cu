#include "kernels/activation_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

// 1 / (1 + e^-x) and its complement to 1, each to full relative precision.
struct Sigmoid {
  float value, complement;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float e = expf(-x);
  const float value = 1.0f / (1.0f + e);
  // e may be infinite there, and the value 0.
  return {value, x < -87.0f ? 1.0f : e * value};
}

// Each has value(x) and derivative(x).
struct Silu {
  __device__ static float value(float x) { return x / (1.0f + expf(-x)); }
  __device__ static float derivative(float x) {
    const Sigmoid s = sigmoid(x);
    return x * s.value * s.complement + s.value;
  }
};

struct Gelu {
  __device__ static float integral(float x) { return 0.5f * erfcf(x * -0.707106781f); }
  __device__ static float value(float x) { return x * integral(x); }
  __device__ static float derivative(float x) {
    return x * (expf(x * x * -0.5f) * 0.398942280f) + integral(x);
  }
};

// (1 + tanh u) / 2 is the sigmoid of 2u.
struct GeluTanh {
  static constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;

  // The sigmoid is 0 or 1 well inside of these, and the cube cannot overflow.
  __device__ static float bounded(float x) { return x < -16.0f ? -16.0f : x > 16.0f ? 16.0f : x; }
  __device__ static Sigmoid gate(float x) { return sigmoid((x * x * x * kCubic + x) * kScale); }
  __device__ static float value(float x) { return x * gate(bounded(x)).value; }
  __device__ static float derivative(float x) {
    const float z = bounded(x);
    const Sigmoid s = gate(z);
    const float slope = z * z * (3 * kCubic * kScale) + kScale;
    return z * slope * (s.value * s.complement) + s.value;
  }
};

struct QuickGelu {
  __device__ static float value(float x) { return x * sigmoid(x * 1.702f).value; }
  __device__ static float derivative(float x) {
    const float z = x * 1.702f;
    const Sigmoid s = sigmoid(z);
    return z * s.value * s.complement + s.value;
  }
};

struct Exp {
  __device__ static float value(float x) { return expf(x); }
  __device__ static float derivative(float x) { return expf(x); }
};

template <class A>
struct ValueOf {
  Matrix x, y;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] = A::value(run.at[i]);
    }
    store_run(y, row, column, count, run);
  }
};

template <class A>
struct GradientOf {
  Matrix x, dy, dx;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const Run at = load_run(x, row, column, count);
    Run run = load_run(dy, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= A::derivative(at.at[i]);
    }
    store_run(dx, row, column, count, run, accumulate);
  }
};

struct GatedSilu {
  Matrix gate, up, y;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(gate, row, column, count);
    const Run other = load_run(up, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] = rounded(gate.dtype, Silu::value(run.at[i])) * other.at[i];
    }
    store_run(y, row, column, count, run);
  }
};

// Both gradients are computed before either is written: dgate or dup may be dy.
struct GatedSiluBackward {
  Matrix gate, up, dy;
  GatedGradients to;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run g = load_run(gate, row, column, count);
    Run u = load_run(up, row, column, count);
    const Run d = load_run(dy, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float x = g.at[i];
      g.at[i] = d.at[i] * u.at[i] * Silu::derivative(x);
      u.at[i] = d.at[i] * rounded(gate.dtype, Silu::value(x));
    }
    if (to.dgate.at != nullptr) {
      store_run(to.dgate, row, column, count, g, to.accumulate_gate);
    }
    if (to.dup.at != nullptr) {
      store_run(to.dup, row, column, count, u, to.accumulate_up);
    }
  }
};

template <class F>
void with_activation(Activation f, F call) {
  switch (f) {
    case Activation::silu:
      return call(Silu());
    case Activation::gelu:
      return call(Gelu());
    case Activation::gelu_tanh:
      return call(GeluTanh());
    case Activation::quick_gelu:
      return call(QuickGelu());
    case Activation::exp:
      return call(Exp());
  }
}

}  // namespace

void activation(Activation f, const Matrix& x, const Matrix& y, MatrixSize size, void* stream) {
  with_activation(f, [&](auto of) {
    launch_runs("activation", ValueOf<decltype(of)>{x, y}, size, stream);
  });
}

void activation_backward(Activation f, const Matrix& x, const Matrix& dy, const Matrix& dx,
                         bool accumulate, MatrixSize size, void* stream) {
  with_activation(f, [&](auto of) {
    launch_runs("activation_backward", GradientOf<decltype(of)>{x, dy, dx, accumulate}, size,
                stream);
  });
}

void gated_silu(const Matrix& gate, const Matrix& up, const Matrix& y, MatrixSize size,
                void* stream) {
  launch_runs("gated_silu", GatedSilu{gate, up, y}, size, stream);
}

void gated_silu_backward(const Matrix& gate, const Matrix& up, const Matrix& dy,
                         const GatedGradients& gradients, MatrixSize size, void* stream) {
  launch_runs("gated_silu_backward", GatedSiluBackward{gate, up, dy, gradients}, size, stream);
}

}  // namespace reprise::kernels::cuda

#include "kernels/adamw_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Step {
  AdamWRun run;
  AdamWScalars c;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const Matrix value{run.value, run.value_dtype, 0}, master{run.master, DType::f32, 0};
    const Matrix first{run.m, run.state_dtype, 0}, second{run.v, run.state_dtype, 0};
    const bool has_master = run.master != nullptr;
    Run p = load_run(has_master ? master : value, row, column, count);
    Run m = load_run(first, row, column, count), v = load_run(second, row, column, count);
    const Run gradient =
        load_run({const_cast<void*>(run.gradient), run.gradient_dtype, 0}, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float g = gradient.at[i] * c.gradient_scale;
      const float difference = g - m.at[i];
      // The form of lerp whose rounding vanishes at its nearer end.
      m.at[i] = c.beta1_rest < 0.5f ? c.beta1_rest * difference + m.at[i]
                                    : g - difference * (1 - c.beta1_rest);
      v.at[i] = c.beta2_rest * g * g + v.at[i] * c.beta2;
      const float denominator = sqrtf(v.at[i]) / c.correction2_root + c.epsilon;
      p.at[i] = p.at[i] * c.keep + c.minus_step_size * m.at[i] / denominator;
    }
    if (has_master) {
      store_run(master, row, column, count, p);
    }
    store_run(value, row, column, count, p);
    store_run(first, row, column, count, m);
    store_run(second, row, column, count, v);
  }
};

struct StepFromMemory {
  AdamWRun run;
  const AdamWScalars* c;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Step{run, *c}(row, column, count);
  }
};

}  // namespace

void adamw_run(const AdamWRun& run, const AdamWScalars* scalars, std::int64_t count, void* stream) {
  launch_runs("adamw", StepFromMemory{run, scalars}, {1, count}, stream);
}

void adamw_run(const AdamWRun& run, const AdamWScalars& scalars, std::int64_t count, void* stream) {
  launch_runs("adamw", Step{run, scalars}, {1, count}, stream);
}

}  // namespace reprise::kernels::cuda

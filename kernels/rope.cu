#include "kernels/matrix.cuh"
#include "kernels/rope_sides.h"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 128;

struct Turn {
  float cos, sin;
};

// Of an angle below 2^30: reduced in double, pi / 2 in two parts of which the first has 33 bits, so
// that its multiples are exact. The series leave out less than 2e-9 on [-pi / 4, pi / 4].
__device__ __forceinline__ Turn turn_by(float angle) {
  const double wide = static_cast<double>(angle);
  const double turns = rint(wide * 0.63661977236758134);
  const double near = wide - turns * 1.57079632673412561417e+00;
  const float r = static_cast<float>(near - turns * 6.07710050650619224932e-11);
  const int n = static_cast<int>(turns);
  const float z = r * r;
  float s = z * (1.0f / 362880) - 1.0f / 5040;
  s = z * s + 1.0f / 120;
  s = z * s - 1.0f / 6;
  s = r * z * s + r;
  float c = z * (-1.0f / 3628800) + 1.0f / 40320;
  c = z * c - 1.0f / 720;
  c = z * c + 1.0f / 24;
  c = z * c - 0.5f;
  c = z * c + 1.0f;
  const float sine = (n & 1) != 0 ? c : s, cosine = (n & 1) != 0 ? s : c;
  return {((n + 1) & 2) != 0 ? -cosine : cosine, (n & 2) != 0 ? -sine : sine};
}

// cos and sin of all pairs of a token, each by one thread.
__device__ __forceinline__ void turn_pairs(const RopeCall& call, std::int64_t b, std::int64_t t,
                                           float* cos, float* sin) {
  for (std::int64_t i = threadIdx.x; i < call.pairs; i += kThreads) {
    int section = 0;
    while (i >= call.sections.ends[section]) {
      ++section;
    }
    const std::int64_t at = section * call.sections.stride + b * call.positions_batch_stride + t;
    const Turn turn = turn_by(static_cast<float>(call.positions[at]) * call.inv_freq[i]);
    const float c = turn.cos * call.cos_factor, s = turn.sin * call.sin_factor;
    cos[i] = call.round_to_bf16 ? rounded(DType::bf16, c) : c;
    sin[i] = call.round_to_bf16 ? rounded(DType::bf16, s) : s;
  }
}

// The heads of a token as a matrix.
__device__ __forceinline__ Matrix heads_of(const Heads& x, std::int64_t b, std::int64_t t) {
  const std::int64_t at = b * x.batch_stride + t * x.token_stride;
  void* first = x.dtype == DType::f32 ? static_cast<void*>(static_cast<float*>(x.at) + at)
                                      : static_cast<void*>(static_cast<__nv_bfloat16*>(x.at) + at);
  return {first, x.dtype, x.head_stride};
}

// Calls f(head, first, count) for runs of `step` of [0, width) of every head.
template <class F>
__device__ __forceinline__ void for_heads(const RopeCall& call, std::int64_t width, int step, F f) {
  const std::int64_t per_head = (width + step - 1) / step;
  for (std::int64_t run = threadIdx.x; run < call.heads * per_head; run += kThreads) {
    const std::int64_t head = run / per_head, first = (run - head * per_head) * step;
    f(head, first, width - first < step ? static_cast<int>(width - first) : step);
  }
}

__device__ __forceinline__ void rotate(float& a, float& b, float c, float s) {
  const float turned = a * c - b * s;
  b = b * c + a * s;
  a = turned;
}

// A block turns the heads of a token. A pair is read and written by one thread: y may be x.
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeCall call) {
  float* cos = dynamic_shared<float>();
  float* sin = cos + call.pairs;
  const std::int64_t b = blockIdx.x / call.tokens, t = blockIdx.x % call.tokens;
  turn_pairs(call, b, t, cos, sin);
  __syncthreads();
  const Matrix x = heads_of(call.x, b, t), y = heads_of(call.y, b, t);
  if (call.interleaved) {
    for_heads(call, call.pairs, kRun / 2, [&](std::int64_t head, std::int64_t first, int count) {
      Run run = load_run(x, head, 2 * first, 2 * count);
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) {
        if (i < count) {
          rotate(run.at[2 * i], run.at[2 * i + 1], cos[first + i], sin[first + i]);
        }
      }
      store_run(y, head, 2 * first, 2 * count, run, call.accumulate);
    });
  } else {
    for_heads(call, call.pairs, kRun, [&](std::int64_t head, std::int64_t first, int count) {
      Run low = load_run(x, head, first, count);
      Run high = load_run(x, head, call.pairs + first, count);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count) {
          rotate(low.at[i], high.at[i], cos[first + i], sin[first + i]);
        }
      }
      store_run(y, head, first, count, low, call.accumulate);
      store_run(y, head, call.pairs + first, count, high, call.accumulate);
    });
  }
  const std::int64_t rest = 2 * call.pairs;
  for_heads(call, call.size - rest, kRun, [&](std::int64_t head, std::int64_t first, int count) {
    const Run run = load_run(x, head, rest + first, count);
    store_run(y, head, rest + first, count, run, call.accumulate);
  });
}

}  // namespace

void rope(const RopeCall& call, void* stream) {
  const std::size_t shared_bytes = 2 * static_cast<std::size_t>(call.pairs) * sizeof(float);
  launch("rope", rope_kernel,
         {dim3(static_cast<unsigned>(call.batch * call.tokens)), dim3(kThreads), shared_bytes},
         static_cast<cudaStream_t>(stream), call);
}

}  // namespace reprise::kernels::cuda

#include "kernels/device.cuh"
#include "kernels/norm_sides.h"

namespace reprise::kernels::cuda {
namespace {

// Who works on one row: a warp when rows are narrow, else the block. A thread keeps what it has
// read of a row in registers, kSlots packets of it; 0 slots: rows too wide for that are read again.
template <int kThreads, bool kWarp, int kSlotCount>
struct Team {
  static constexpr int kBlock = kThreads;
  static constexpr int kSize = kWarp ? 32 : kThreads;
  static constexpr int kTeams = kThreads / kSize;
  static constexpr int kSlots = kSlotCount;

  __device__ static int rank() { return static_cast<int>(threadIdx.x) % kSize; }
  __device__ static int index() { return static_cast<int>(threadIdx.x) / kSize; }
  __device__ static float sum(float value) {
    if constexpr (kWarp) {
      return warp_sum(value);
    } else {
      return block_sum<kThreads>(value);
    }
  }
};

// Calls f(slot, first column) for the packets of this thread.
template <class Team, int n, class F>
__device__ __forceinline__ void for_packets(std::int64_t width, F f) {
  if constexpr (Team::kSlots > 0) {
#pragma unroll
    for (int slot = 0; slot < Team::kSlots; ++slot) {
      const std::int64_t column = (slot * Team::kSize + Team::rank()) * n;
      if (column < width) {
        f(slot, column);
      }
    }
  } else {
    for (std::int64_t column = Team::rank() * n; column < width; column += Team::kSize * n) {
      f(0, column);
    }
  }
}

// Packets of a row, by element where a row is not aligned or ends within a packet: the same
// elements meet the same thread either way, so the sums are the same.
template <class T>
__device__ __forceinline__ Packet<T, kPacket<T>> read(const T* row, std::int64_t column,
                                                      std::int64_t width, bool aligned) {
  constexpr int n = kPacket<T>;
  if (aligned) {
    return load_packet<n>(row + column);
  }
  Packet<T, n> packet = {};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (column + i < width) {
      packet.at[i] = row[column + i];
    }
  }
  return packet;
}

template <class T>
__device__ __forceinline__ void write(T* row, std::int64_t column, std::int64_t width, bool aligned,
                                      const Packet<T, kPacket<T>>& packet) {
  constexpr int n = kPacket<T>;
  if (aligned) {
    store_packet(row + column, packet);
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (column + i < width) {
      row[column + i] = packet.at[i];
    }
  }
}

template <class T>
__device__ __forceinline__ T* row_of(const NormRows& rows, std::int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + row * rows.stride;
}

// The packets of a row that this thread has read, or, of wide rows, will read again.
template <class T, class Team>
struct Held {
  static constexpr int n = kPacket<T>;
  Packet<T, n> slots[Team::kSlots > 0 ? Team::kSlots : 1];

  __device__ __forceinline__ void keep(int slot, const Packet<T, n>& packet) {
    if constexpr (Team::kSlots > 0) {
      slots[slot] = packet;
    }
  }
  __device__ __forceinline__ Packet<T, n> get(int slot, const T* row, std::int64_t column,
                                              std::int64_t width, bool aligned) const {
    if constexpr (Team::kSlots > 0) {
      return slots[slot];
    } else {
      return read(row, column, width, aligned);
    }
  }
};

template <Norm norm, class T, class Team>
__global__ void __launch_bounds__(Team::kBlock) forward_kernel(NormForward call, bool aligned) {
  constexpr int n = kPacket<T>;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * Team::kTeams + Team::index();
  if (Team::kTeams > 1 && row >= call.rows) {
    return;  // a warp as a whole; there is no barrier of the block
  }
  const std::int64_t width = call.width;
  const T* x = row_of<T>(call.x, row);
  const T* residual = row_of<T>(call.residual, row);
  T* sum = row_of<T>(call.sum, row);
  const T* normed = residual == nullptr ? x : sum;
  Held<T, Team> held;
  float total = 0.0f;
  for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
    Packet<T, n> packet = read(x, column, width, aligned);
    if (residual != nullptr) {
      const Packet<T, n> other = read(residual, column, width, aligned);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        packet.at[i] = from_float<T>(to_float(packet.at[i]) + to_float(other.at[i]));
      }
      write(sum, column, width, aligned, packet);
    }
    held.keep(slot, packet);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float value = to_float(packet.at[i]);
      total += norm == Norm::rms ? value * value : value;
    }
  });
  total = Team::sum(total);
  const float width_inverse = width == 0 ? 0.0f : 1.0f / static_cast<float>(width);
  float mean = 0.0f;
  if constexpr (norm == Norm::layer) {
    mean = total * width_inverse;
    total = 0.0f;
    for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
      const Packet<T, n> packet = held.get(slot, normed, column, width, aligned);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float value = column + i < width ? to_float(packet.at[i]) - mean : 0.0f;
        total += value * value;
      }
    });
    total = Team::sum(total);
  }
  const float scale = 1.0f / sqrtf(total * width_inverse + call.epsilon);
  if (Team::rank() == 0) {
    call.scale[row] = scale;
    if constexpr (norm == Norm::layer) {
      call.mean[row] = mean;
    }
  }
  T* y = row_of<T>(call.y, row);
  const T* weight = static_cast<const T*>(call.weight);
  const T* bias = static_cast<const T*>(call.bias);
  for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
    Packet<T, n> packet = held.get(slot, normed, column, width, aligned);
    const Packet<T, n> w = read(weight, column, width, aligned);
    Packet<T, n> b = {};
    if (bias != nullptr) {
      b = read(bias, column, width, aligned);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float value = (to_float(packet.at[i]) - mean) * scale;
      packet.at[i] = norm == Norm::rms
                         ? from_float<T>(to_float(from_float<T>(value)) * to_float(w.at[i]))
                         : from_float<T>(value * to_float(w.at[i]) + to_float(b.at[i]));
    }
    write(y, column, width, aligned, packet);
  });
}

// What a thread adds up of one gradient over the rows of its chunk: in registers, or, of wide
// rows, in its own columns of the chunk's partial sums.
template <class Team, int n>
struct ColumnSums {
  float held[Team::kSlots > 0 ? Team::kSlots* n : 1];

  __device__ void clear(float* partial, std::int64_t width) {
    if (partial == nullptr) {
      return;
    }
    for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if constexpr (Team::kSlots > 0) {
          held[slot * n + i] = 0.0f;
        } else if (column + i < width) {
          partial[column + i] = 0.0f;
        }
      }
    });
  }
  __device__ __forceinline__ void add(float* partial, std::int64_t width, int slot,
                                      std::int64_t column, int i, float value) {
    if constexpr (Team::kSlots > 0) {
      held[slot * n + i] += value;
    } else if (column + i < width) {
      partial[column + i] += value;
    }
  }
  // The teams' sums in order of the teams, to `partial`. Every thread of the block takes part.
  __device__ void finish(float* partial, std::int64_t width) {
    if constexpr (Team::kSlots > 0) {
      float* of_team = Team::kTeams > 1 ? dynamic_shared<float>() + Team::index() * width : partial;
      for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          if (column + i < width) {
            of_team[column + i] = held[slot * n + i];
          }
        }
      });
    }
    if constexpr (Team::kTeams > 1) {
      __syncthreads();
      const float* teams = dynamic_shared<float>();
      for (std::int64_t column = threadIdx.x; column < width; column += Team::kBlock) {
        float total = 0.0f;
        for (int team = 0; team < Team::kTeams; ++team) {
          total += teams[team * width + column];
        }
        partial[column] = total;
      }
      __syncthreads();
    }
  }
};

// One row of the backward: dx, and what it adds to the columns' sums.
template <Norm norm, class T, class Team>
__device__ __forceinline__ void backward_row(const NormBackward& call, bool aligned,
                                             std::int64_t row, float* dweight, float* dbias,
                                             ColumnSums<Team, kPacket<T>>& weight_sums,
                                             ColumnSums<Team, kPacket<T>>& bias_sums) {
  constexpr int n = kPacket<T>;
  const std::int64_t width = call.width;
  const T* dy = row_of<T>(call.dy, row);
  const T* x = row_of<T>(call.x, row);
  const T* weight = static_cast<const T*>(call.weight);
  const bool wants_dx = call.dx.data != nullptr;
  const float scale = x == nullptr ? 0.0f : call.scale[row];
  const float mean = norm == Norm::layer && x != nullptr ? call.mean[row] : 0.0f;
  Held<T, Team> dy_held, x_held;
  float g_total = 0.0f, gn_total = 0.0f;
  for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
    const Packet<T, n> d = read(dy, column, width, aligned);
    Packet<T, n> v = {}, w = {};
    if (x != nullptr) {
      v = read(x, column, width, aligned);
    }
    if (wants_dx) {
      w = read(weight, column, width, aligned);
    }
    dy_held.keep(slot, d);
    x_held.keep(slot, v);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float gradient = to_float(d.at[i]);
      const float normalised = (to_float(v.at[i]) - mean) * scale;
      const float g = gradient * to_float(w.at[i]);
      g_total += g;
      gn_total += g * normalised;
      if (dweight != nullptr) {
        const float factor = norm == Norm::rms ? to_float(from_float<T>(normalised)) : normalised;
        weight_sums.add(dweight, width, slot, column, i, gradient * factor);
      }
      if (dbias != nullptr) {
        bias_sums.add(dbias, width, slot, column, i, gradient);
      }
    }
  });
  if (!wants_dx) {
    return;
  }
  const float width_inverse = 1.0f / static_cast<float>(width);
  const float gn_mean = Team::sum(gn_total) * width_inverse;
  const float g_mean = norm == Norm::layer ? Team::sum(g_total) * width_inverse : 0.0f;
  const T* dsum = row_of<T>(call.dsum, row);
  T* dx = row_of<T>(call.dx, row);
  for_packets<Team, n>(width, [&](int slot, std::int64_t column) {
    const Packet<T, n> d = dy_held.get(slot, dy, column, width, aligned);
    const Packet<T, n> v = x_held.get(slot, x, column, width, aligned);
    const Packet<T, n> w = read(weight, column, width, aligned);
    Packet<T, n> more = {}, before = {};
    if (dsum != nullptr) {
      more = read(dsum, column, width, aligned);
    }
    if (call.accumulate_x) {
      before = read<T>(dx, column, width, aligned);
    }
    Packet<T, n> result;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float normalised = (to_float(v.at[i]) - mean) * scale;
      const float g = to_float(d.at[i]) * to_float(w.at[i]);
      const float value = (g - normalised * gn_mean - g_mean) * scale;
      result.at[i] = from_float<T>(value + to_float(more.at[i]) + to_float(before.at[i]));
    }
    write(dx, column, width, aligned, result);
  });
}

template <Norm norm, class T, class Team>
__global__ void __launch_bounds__(Team::kBlock)
    backward_kernel(NormBackward call, std::int64_t rows_per_chunk, bool aligned) {
  constexpr int n = kPacket<T>;
  const std::int64_t chunk = blockIdx.x;
  const auto of_chunk = [&](const NormSum& sum) {
    return sum.data == nullptr ? nullptr : sum.partial + chunk * call.width;
  };
  float* dweight = of_chunk(call.dweight);
  float* dbias = of_chunk(call.dbias);
  ColumnSums<Team, n> weight_sums, bias_sums;
  weight_sums.clear(dweight, call.width);
  bias_sums.clear(dbias, call.width);
  const std::int64_t begin = chunk * rows_per_chunk;
  const std::int64_t end = begin + rows_per_chunk < call.rows ? begin + rows_per_chunk : call.rows;
  for (std::int64_t row = begin + Team::index(); row < end; row += Team::kTeams) {
    backward_row<norm, T, Team>(call, aligned, row, dweight, dbias, weight_sums, bias_sums);
  }
  if (dweight != nullptr) {
    weight_sums.finish(dweight, call.width);
  }
  if (dbias != nullptr) {
    bias_sums.finish(dbias, call.width);
  }
}

constexpr int kSumColumns = 32, kSumGroups = 8;

// A gradient over the chunks: each of 8 threads a column adds every eighth chunk, then the eight
// sums are added in order.
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumGroups)
    sums_kernel(NormSum sum, std::int64_t chunks, std::int64_t width) {
  __shared__ float of_group[kSumGroups][kSumColumns];
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float total = 0.0f;
  if (column < width) {
#pragma unroll 8
    for (std::int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSumGroups) {
      total += sum.partial[chunk * width + column];
    }
  }
  of_group[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    total = 0.0f;
    for (int group = 0; group < kSumGroups; ++group) {
      total += of_group[group][threadIdx.x];
    }
    T* to = static_cast<T*>(sum.data) + column;
    *to = from_float<T>(sum.accumulate ? to_float(*to) + total : total);
  }
}

bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

// Whether packets of 128 bits fit every row.
template <class T>
bool is_aligned(const NormRows& rows) {
  return is_aligned(rows.data) && rows.stride * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
}

// Calls f with the team for rows of this width.
template <class T, class F>
void with_team(std::int64_t width, F f) {
  constexpr int n = kPacket<T>, kSlots = 4, kBlock = 256;
  if (width <= 32 * n * kSlots) {
    f(Team<kBlock, true, kSlots>());
  } else if (width <= kBlock * n * kSlots) {
    f(Team<kBlock, false, kSlots>());
  } else {
    f(Team<kBlock, false, 0>());
  }
}

// Calls f<norm, T>() for a call.
template <class Call, class F>
void with_types(const Call& call, F f) {
  using Rms = std::integral_constant<Norm, Norm::rms>;
  using Layer = std::integral_constant<Norm, Norm::layer>;
  const auto with_norm = [&](auto element) {
    call.norm == Norm::rms ? f(Rms(), element) : f(Layer(), element);
  };
  call.dtype == DType::f32 ? with_norm(float()) : with_norm(__nv_bfloat16());
}

template <class T>
void launch_sums(const NormSum& sum, std::int64_t chunks, std::int64_t width, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((width + kSumColumns - 1) / kSumColumns);
  launch("norm_sums", sums_kernel<T>, {dim3(blocks), dim3(kSumColumns, kSumGroups)}, stream, sum,
         chunks, width);
}

}  // namespace

void norm_forward(const NormForward& call, void* stream) {
  with_types(call, [&](auto norm, auto element) {
    using T = decltype(element);
    const bool aligned = call.width % kPacket<T> == 0 && is_aligned<T>(call.x) &&
                         is_aligned<T>(call.residual) && is_aligned<T>(call.sum) &&
                         is_aligned<T>(call.y) && is_aligned(call.weight) && is_aligned(call.bias);
    with_team<T>(call.width, [&](auto team) {
      using Team = decltype(team);
      const auto blocks = static_cast<unsigned>((call.rows + Team::kTeams - 1) / Team::kTeams);
      launch("norm_forward", forward_kernel<decltype(norm)::value, T, Team>,
             {dim3(blocks), dim3(Team::kBlock)}, static_cast<cudaStream_t>(stream), call, aligned);
    });
  });
}

void norm_backward(const NormBackward& call, void* stream) {
  if (call.width == 0) {
    return;
  }
  const std::int64_t chunks = norm_chunks(call.rows);
  const auto on = static_cast<cudaStream_t>(stream);
  with_types(call, [&](auto norm, auto element) {
    using T = decltype(element);
    const bool aligned = call.width % kPacket<T> == 0 && is_aligned<T>(call.dy) &&
                         is_aligned<T>(call.dsum) && is_aligned<T>(call.x) &&
                         is_aligned<T>(call.dx) && is_aligned(call.weight);
    with_team<T>(call.width, [&](auto team) {
      using Team = decltype(team);
      const std::size_t shared =
          Team::kTeams > 1 ? static_cast<std::size_t>(Team::kTeams * call.width) * sizeof(float)
                           : 0;
      if (chunks > 0) {
        launch("norm_backward", backward_kernel<decltype(norm)::value, T, Team>,
               {dim3(static_cast<unsigned>(chunks)), dim3(Team::kBlock), shared}, on, call,
               norm_rows_per_chunk(call.rows), aligned);
      }
    });
  });
  for (const NormSum* sum : {&call.dweight, &call.dbias}) {
    if (sum->data != nullptr) {
      sum->dtype == DType::f32 ? launch_sums<float>(*sum, chunks, call.width, on)
                               : launch_sums<__nv_bfloat16>(*sum, chunks, call.width, on);
    }
  }
}

}  // namespace reprise::kernels::cuda

// Copies between strided layouts on a cuda device. A thread moves the widest word that both sides
// allow: 16 bytes where rows lie together and are aligned, an element where they do not.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/cuda_device.h"
#include "core/launch.cuh"
#include "core/shape.h"

namespace reprise {
namespace {

constexpr int kMostLoops = Shape::kMaxRank;
constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 16;

struct __align__(16) SixteenBytes {
  std::uint32_t at[4];
};

// Outermost first, in words.
struct Loops {
  int count = 0;
  std::int64_t size[kMostLoops], to[kMostLoops], from[kMostLoops];
};

// `from` null: zeros. Neighbouring threads write neighbouring words where `to` has them so.
template <class Word, class Index>
__global__ void copy_strided(Word* to, const Word* from, Loops loops, Index total) {
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    Index rest = i;
    std::int64_t to_at = 0, from_at = 0;
    for (int loop = loops.count - 1; loop >= 0; --loop) {
      const Index size = static_cast<Index>(loops.size[loop]);
      const auto place = static_cast<std::int64_t>(rest % size);
      rest /= size;
      to_at += place * loops.to[loop];
      from_at += place * loops.from[loop];
    }
    to[to_at] = from == nullptr ? Word{} : from[from_at];
  }
}

template <class Word>
void start(void* to, const void* from, const Loops& loops, cudaStream_t stream) {
  std::int64_t total = 1;
  for (int loop = 0; loop < loops.count; ++loop) {
    total *= loops.size[loop];
  }
  const std::int64_t blocks = std::min(kMostBlocks, (total + kThreads - 1) / kThreads);
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads)};
  auto* const words = static_cast<Word*>(to);
  const auto* const source = static_cast<const Word*>(from);
  // Half of the range, so that the last step of a thread cannot wrap around.
  if (total < std::int64_t{1} << 31) {
    launch("copy_strided", &copy_strided<Word, std::uint32_t>, shape, stream, words, source, loops,
           static_cast<std::uint32_t>(total));
  } else {
    launch("copy_strided", &copy_strided<Word, std::uint64_t>, shape, stream, words, source, loops,
           static_cast<std::uint64_t>(total));
  }
}

// The widest word by which every address and every distance is divisible.
std::int64_t word_bytes(const void* to, const void* from, std::span<const CopyLoop> loops,
                        std::int64_t element_bytes) {
  const CopyLoop& last = loops.back();
  if (last.to_stride != 1 || last.from_stride != 1) {
    return element_bytes;
  }
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(to) |
                       reinterpret_cast<std::uintptr_t>(from) |
                       static_cast<std::uint64_t>(last.size * element_bytes);
  for (const CopyLoop& loop : loops.first(loops.size() - 1)) {
    bits |= static_cast<std::uint64_t>(loop.to_stride * element_bytes) |
            static_cast<std::uint64_t>(loop.from_stride * element_bytes);
  }
  std::int64_t bytes = 16;
  while (bytes > element_bytes && bits % static_cast<std::uint64_t>(bytes) != 0) {
    bytes /= 2;
  }
  return bytes;
}

constexpr int kWordsALaunch = 256;
struct Words {
  std::uint32_t at[kWordsALaunch];
};

__global__ void __launch_bounds__(kWordsALaunch)
    write_words(std::uint32_t* to, const __grid_constant__ Words words, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) {
    to[i] = words.at[i];
  }
}

template <class Word>
__global__ void __launch_bounds__(kThreads) fill(Word* to, Word value, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    to[i] = value;
  }
}

template <class Word>
void start_fill(void* to, const void* element, std::int64_t count, cudaStream_t stream) {
  Word value;
  std::memcpy(&value, element, sizeof value);
  const std::int64_t blocks = std::min(kMostBlocks, (count + kThreads - 1) / kThreads);
  launch("fill", &fill<Word>, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, stream,
         static_cast<Word*>(to), value, count);
}

}  // namespace

void cuda_fill(void* to, Device device, std::int64_t count, const void* element,
               std::size_t element_bytes) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream(device));
  switch (element_bytes) {
    case 2:
      return start_fill<std::uint16_t>(to, element, count, stream);
    case 4:
      return start_fill<std::uint32_t>(to, element, count, stream);
    default:
      return start_fill<std::uint64_t>(to, element, count, stream);
  }
}

void cuda_write(void* to, Device device, const void* from, std::size_t bytes) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream(device));
  const std::size_t words = bytes / sizeof(std::uint32_t);
  for (std::size_t first = 0; first < words; first += kWordsALaunch) {
    const int count = static_cast<int>(std::min<std::size_t>(kWordsALaunch, words - first));
    Words part = {};
    std::memcpy(part.at, static_cast<const std::uint32_t*>(from) + first,
                static_cast<std::size_t>(count) * sizeof(std::uint32_t));
    launch("write_words", write_words, {dim3(1), dim3(kWordsALaunch)}, stream,
           static_cast<std::uint32_t*>(to) + first, part, count);
  }
}

void cuda_copy_strided(void* to, const void* from, Device device, std::span<const CopyLoop> given,
                       std::size_t element_bytes) {
  const CopyLoop one{1, 1, 1};
  const std::span<const CopyLoop> loops = given.empty() ? std::span(&one, 1) : given;
  const auto element = static_cast<std::int64_t>(element_bytes);
  const std::int64_t word = word_bytes(to, from, loops, element);
  Loops counted;
  for (const CopyLoop& loop : loops) {
    const bool last = &loop == &loops.back();
    const auto words = [&](std::int64_t elements) {
      return last && word != element ? elements : elements * element / word;
    };
    counted.size[counted.count] = last ? loop.size * element / word : loop.size;
    counted.to[counted.count] = words(loop.to_stride);
    counted.from[counted.count] = words(loop.from_stride);
    ++counted.count;
  }
  const auto stream = static_cast<cudaStream_t>(cuda_stream(device));
  switch (word) {
    case 2:
      return start<std::uint16_t>(to, from, counted, stream);
    case 4:
      return start<std::uint32_t>(to, from, counted, stream);
    case 8:
      return start<std::uint64_t>(to, from, counted, stream);
    default:
      return start<SixteenBytes>(to, from, counted, stream);
  }
}

}  // namespace reprise

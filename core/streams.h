// The streams of a device: lines of work, each done in order, side by side. Kernels are given to
// `compute`, which the device's allocator is ordered by: what is freed may be handed out to later
// work of that stream at once. So another stream that uses device memory
//   - starts after compute has been given what makes the memory ready: follow(stream, compute);
//   - lets compute wait for it before the memory is freed: wait(compute, mark(stream)).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/cuda_calls.h"

namespace reprise {

enum class StreamKind : std::uint8_t { compute, copy, communication };
inline constexpr std::size_t kStreams = 3;

// Not thread-safe: one thread gives the work of a device.
class Streams {
 public:
  explicit Streams(std::shared_ptr<CudaCalls> calls);
  ~Streams();
  Streams(const Streams&) = delete;

  // A point in a stream's work. Its event goes back to the streams, which outlive it.
  class Mark {
   public:
    Mark() = default;
    Mark(Mark&& other) noexcept;
    Mark& operator=(Mark other) noexcept;
    ~Mark();
    bool defined() const { return event_ != nullptr; }

   private:
    friend class Streams;
    Mark(Streams* streams, CudaCalls::Event event) : streams_(streams), event_(event) {}
    Streams* streams_ = nullptr;
    CudaCalls::Event event_ = nullptr;
  };

  CudaCalls::Stream stream(StreamKind kind) const {
    return streams_[static_cast<std::size_t>(kind)];
  }
  // After what the stream has been given so far.
  Mark mark(StreamKind kind);
  // What `waiting` is given from now on starts after the mark.
  void wait(StreamKind waiting, const Mark& mark);
  // What `waiting` is given from now on starts after what `first` has been given so far.
  void follow(StreamKind waiting, StreamKind first);
  void copy(StreamKind kind, void* to, const void* from, std::size_t bytes);
  // Returns when the stream has done all that it was given.
  void synchronize(StreamKind kind);
  CudaCalls& calls() { return *calls_; }

 private:
  const std::shared_ptr<CudaCalls> calls_;
  std::array<CudaCalls::Stream, kStreams> streams_{};
  std::vector<CudaCalls::Event> events_;  // free ones
};

}  // namespace reprise

// What core asks of the CUDA runtime, without its header: the runtime itself (cuda_device.cc), or
// a stand-in that records it in a test. Calls throw Error; those that give something back do not.
#pragma once

#include <cstddef>

namespace reprise {

class CudaCalls {
 public:
  using Stream = void*;  // cudaStream_t
  using Event = void*;   // cudaEvent_t
  using Graph = void*;   // cudaGraphExec_t
  CudaCalls() = default;
  CudaCalls(const CudaCalls&) = delete;
  virtual ~CudaCalls() = default;

  // Makes the device current on this thread; the other calls are for that device.
  virtual void use_device() = 0;
  virtual Stream make_stream() = 0;
  virtual void destroy_stream(Stream stream) noexcept = 0;
  virtual Event make_event() = 0;
  virtual void destroy_event(Event event) noexcept = 0;
  // The event stands for what the stream has been given so far.
  virtual void record(Event event, Stream stream) = 0;
  // What the stream is given from now on starts after the event.
  virtual void wait(Stream stream, Event event) = 0;
  // Returns when the stream has done all that it was given.
  virtual void synchronize(Stream stream) = 0;

  // Device memory, ordered by nothing: as cudaMalloc and cudaFree, null when there is none left.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* at) noexcept = 0;
  // Page-locked host memory, the same.
  virtual void* allocate_pinned(std::size_t bytes) = 0;
  virtual void free_pinned(void* at) noexcept = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, Stream stream) = 0;

  // What the stream is given from begin to end is not done but put into a graph, which a launch
  // does as often as is wanted.
  virtual void begin_capture(Stream stream) = 0;
  virtual Graph end_capture(Stream stream) = 0;
  virtual void launch(Graph graph, Stream stream) = 0;
  virtual void destroy_graph(Graph graph) noexcept = 0;
};

}  // namespace reprise

// The CUDA runtime without a device: streams are lists of work that is done as late as may be, and
// what each piece of work reads and writes is checked against all that is not ordered before it by
// events. What CUDA does not allow is written down as a violation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/cuda_calls.h"

namespace reprise::testing {

struct MemoryRange {
  const void* at = nullptr;
  std::size_t bytes = 0;
};

class CudaStandIn final : public CudaCalls {
 public:
  struct Options {
    std::size_t device_bytes = SIZE_MAX, pinned_bytes = SIZE_MAX;
    // The work of the first stream that is made is done by the host: when that stream
    // is told to wait for an event so does the host, and a launch of a graph is done at once.
    bool first_stream_is_host = false;
    // How bytes are copied; none: memcpy.
    std::function<void(void* to, const void* from, std::size_t bytes)> copy;
    std::function<void(const char* call)> fault;  // may throw, before the call does anything
  };
  CudaStandIn() : CudaStandIn(Options()) {}
  explicit CudaStandIn(Options options) : options_(std::move(options)) {}
  ~CudaStandIn() override;

  // Work that reads and writes, as a kernel does; `run` does it. Order and ranges are checked.
  void work(Stream stream, const std::string& name, std::vector<MemoryRange> reads,
            std::vector<MemoryRange> writes, std::function<void()> run = {});
  const std::vector<std::string>& violations() const { return violations_; }
  // "make_stream", "copy", "wait", ... in order.
  const std::vector<std::string>& calls() const { return names_; }
  std::int64_t count(const std::string& call) const;
  std::size_t device_bytes() const { return device_bytes_; }
  std::size_t pinned_bytes() const { return pinned_bytes_; }
  // Pieces of work of a graph.
  std::size_t nodes(Graph graph) const;

  void use_device() override {}
  Stream make_stream() override;
  void destroy_stream(Stream stream) noexcept override;
  Event make_event() override;
  void destroy_event(Event event) noexcept override;
  void record(Event event, Stream stream) override;
  void wait(Stream stream, Event event) override;
  void synchronize(Stream stream) override;
  void* allocate(std::size_t bytes) override;
  void free(void* at) noexcept override;
  void* allocate_pinned(std::size_t bytes) override;
  void free_pinned(void* at) noexcept override;
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override;
  void begin_capture(Stream stream) override;
  Graph end_capture(Stream stream) override;
  void launch(Graph graph, Stream stream) override;
  void destroy_graph(Graph graph) noexcept override;

 private:
  struct Line;
  using Clock = std::map<const Line*, std::uint64_t>;  // what is known to be done of each stream
  struct Point {                                       // of a stream's work
    Line* line = nullptr;
    std::uint64_t number = 0;
    Clock clock;
    bool captured = false;
  };
  struct Work {
    std::string name;
    std::vector<MemoryRange> reads, writes;
    std::function<void()> run;
    Point after;  // another stream's work, to be done before; none: line null
  };
  struct Line {
    std::string name;
    std::deque<Work> left;
    std::uint64_t given = 0, done = 0;
    Clock clock;
    bool capturing = false;
  };
  struct Access {
    const char *begin, *end;
    const Line* line;
    std::uint64_t number;
    bool write;
    std::string name;
  };
  struct CapturedGraph {
    std::vector<Work> work;
  };

  void enter(const char* call);
  void violation(const std::string& text) { violations_.push_back(text); }
  Line* line(Stream stream);
  void give(Line& line, Work work);
  void check(Line& line, const MemoryRange& range, bool write, const std::string& name);
  void do_until(Line& line, std::uint64_t number);

  const Options options_;
  std::vector<std::unique_ptr<Line>> lines_;
  std::map<Event, Point> events_;
  std::map<void*, std::size_t> device_, pinned_;
  std::size_t device_bytes_ = 0, pinned_bytes_ = 0;
  std::vector<Access> accesses_;
  Line* capture_origin_ = nullptr;
  std::unique_ptr<CapturedGraph> capture_;
  std::set<CapturedGraph*> graphs_;
  std::vector<std::string> names_, violations_;
  std::uintptr_t next_event_ = 1;
};

}  // namespace reprise::testing

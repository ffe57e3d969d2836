#include "tests/core/cuda_stand_in.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include <fmt/format.h>

namespace reprise::testing {

CudaStandIn::~CudaStandIn() {
  for (const auto& [at, bytes] : device_) {
    std::free(at);
  }
  for (const auto& [at, bytes] : pinned_) {
    std::free(at);
  }
  for (CapturedGraph* graph : graphs_) {
    delete graph;
  }
}

void CudaStandIn::enter(const char* call) {
  if (options_.fault) {
    options_.fault(call);
  }
  names_.emplace_back(call);
}

std::int64_t CudaStandIn::count(const std::string& call) const {
  return std::ranges::count(names_, call);
}

std::size_t CudaStandIn::nodes(Graph graph) const {
  return static_cast<const CapturedGraph*>(graph)->work.size();
}

CudaStandIn::Line* CudaStandIn::line(Stream stream) {
  for (const auto& line : lines_) {
    if (line.get() == stream) {
      return line.get();
    }
  }
  violation("work on a stream that is not there");
  return lines_.front().get();
}

CudaCalls::Stream CudaStandIn::make_stream() {
  enter("make_stream");
  lines_.push_back(std::make_unique<Line>());
  lines_.back()->name = fmt::format("stream {}", lines_.size() - 1);
  return lines_.back().get();
}

void CudaStandIn::destroy_stream(Stream stream) noexcept {
  Line* gone = line(stream);
  do_until(*gone, gone->given);
  names_.emplace_back("destroy_stream");
}

CudaCalls::Event CudaStandIn::make_event() {
  enter("make_event");
  const auto event = reinterpret_cast<Event>(next_event_++);
  events_[event] = {};
  return event;
}

void CudaStandIn::destroy_event(Event event) noexcept {
  if (events_.erase(event) == 0) {
    violation("an event destroyed that is not there");
  }
}

void CudaStandIn::give(Line& to, Work work) {
  if (to.capturing) {
    capture_->work.push_back(work);
  }
  // Order among captured work is checked as that of other work is, by number.
  ++to.given;
  to.clock[&to] = to.given;
  if (!to.capturing) {
    for (const MemoryRange& range : work.reads) {
      check(to, range, false, work.name);
    }
    for (const MemoryRange& range : work.writes) {
      check(to, range, true, work.name);
    }
  } else {
    work = {};  // only counted
  }
  to.left.push_back(std::move(work));
}

void CudaStandIn::check(Line& by, const MemoryRange& range, bool write, const std::string& name) {
  const auto* begin = static_cast<const char*>(range.at);
  const char* end = begin + range.bytes;
  std::erase_if(accesses_, [&](const Access& before) {
    if (before.end <= begin || end <= before.begin || (!write && !before.write)) {
      return false;
    }
    const auto known = by.clock.find(before.line);
    const bool ordered =
        before.line == &by || (known != by.clock.end() && known->second >= before.number);
    if (!ordered) {
      violation(fmt::format("{} on {} {} {} bytes that {} on {} {}, unordered", name, by.name,
                            write ? "writes" : "reads", range.bytes, before.name, before.line->name,
                            before.write ? "writes" : "reads"));
    }
    return ordered && write && begin <= before.begin && before.end <= end;
  });
  accesses_.push_back({begin, end, &by, by.given, write, name});
}

void CudaStandIn::do_until(Line& on, std::uint64_t number) {
  while (on.done < number) {
    Work work = std::move(on.left.front());
    on.left.pop_front();
    ++on.done;
    if (work.after.line != nullptr) {
      do_until(*work.after.line, work.after.number);
    }
    if (work.run) {
      work.run();
    }
  }
}

void CudaStandIn::record(Event event, Stream stream) {
  enter("record");
  Line* of = line(stream);
  events_[event] = {of, of->given, of->clock, of->capturing};
}

void CudaStandIn::wait(Stream stream, Event event) {
  enter("wait");
  Line* waiting = line(stream);
  const auto found = events_.find(event);
  if (found == events_.end() || found->second.line == nullptr) {
    violation("a wait for an event that was not recorded");
    return;
  }
  const Point& point = found->second;
  if (point.captured && capture_ != nullptr) {
    waiting->capturing = true;  // a stream that waits for captured work takes part in the capture
  } else if (waiting->capturing != point.captured) {
    violation(waiting->capturing ? "captured work waits for an event from outside of the capture"
                                 : "a wait for an event of a capture that has ended");
    return;
  }
  for (const auto& [other, number] : point.clock) {
    auto& known = waiting->clock[other];
    known = std::max(known, number);
  }
  if (point.captured) {
    return;  // the order of the list is one of those that are allowed
  }
  Work work;
  work.name = "wait";
  work.after = point;
  give(*waiting, std::move(work));
  if (options_.first_stream_is_host && waiting == lines_.front().get()) {
    do_until(*waiting, waiting->given);
  }
}

void CudaStandIn::synchronize(Stream stream) {
  enter("synchronize");
  Line* on = line(stream);
  if (on->capturing) {
    violation("a stream is waited for while it is captured");
    return;
  }
  do_until(*on, on->given);
}

void CudaStandIn::work(Stream stream, const std::string& name, std::vector<MemoryRange> reads,
                       std::vector<MemoryRange> writes, std::function<void()> run) {
  enter("work");
  give(*line(stream), {name, std::move(reads), std::move(writes), std::move(run), {}});
}

void CudaStandIn::copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  enter("copy");
  give(*line(stream), {"copy",
                       {{from, bytes}},
                       {{to, bytes}},
                       [=, this] {
                         if (options_.copy) {
                           options_.copy(to, from, bytes);
                         } else {
                           std::memcpy(to, from, bytes);
                         }
                       },
                       {}});
}

void* CudaStandIn::allocate(std::size_t bytes) {
  enter("allocate");
  if (capture_ != nullptr) {
    violation("device memory is allocated while a stream is captured");
  }
  if (bytes > options_.device_bytes - device_bytes_) {
    return nullptr;
  }
  void* at = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(at, 0xFF, bytes);
  device_[at] = bytes;
  device_bytes_ += bytes;
  return at;
}

void CudaStandIn::free(void* at) noexcept {
  names_.emplace_back("free");
  const auto block = device_.find(at);
  if (block == device_.end()) {
    violation("device memory given back that is not there");
    return;
  }
  for (const auto& line : lines_) {  // as cudaFree does
    do_until(*line, line->given);
  }
  const auto* begin = static_cast<const char*>(at);
  std::erase_if(accesses_, [&](const Access& a) {
    return begin <= a.begin && a.end <= begin + block->second;
  });
  device_bytes_ -= block->second;
  std::free(at);
  device_.erase(block);
}

void* CudaStandIn::allocate_pinned(std::size_t bytes) {
  enter("allocate_pinned");
  if (capture_ != nullptr) {
    violation("page-locked memory is allocated while a stream is captured");
  }
  if (bytes > options_.pinned_bytes - pinned_bytes_) {
    return nullptr;
  }
  void* at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  pinned_[at] = bytes;
  pinned_bytes_ += bytes;
  return at;
}

void CudaStandIn::free_pinned(void* at) noexcept {
  names_.emplace_back("free_pinned");
  const auto block = pinned_.find(at);
  if (block == pinned_.end()) {
    violation("page-locked memory given back that is not there");
    return;
  }
  for (const auto& line : lines_) {
    do_until(*line, line->given);
  }
  pinned_bytes_ -= block->second;
  std::free(at);
  pinned_.erase(block);
}

void CudaStandIn::begin_capture(Stream stream) {
  enter("begin_capture");
  if (capture_ != nullptr) {
    violation("a capture begins while another is under way");
    return;
  }
  capture_origin_ = line(stream);
  capture_origin_->capturing = true;
  capture_ = std::make_unique<CapturedGraph>();
}

CudaCalls::Graph CudaStandIn::end_capture(Stream stream) {
  enter("end_capture");
  if (capture_ == nullptr || line(stream) != capture_origin_) {
    violation("a capture ends that has not begun on this stream");
    return nullptr;
  }
  for (const auto& other : lines_) {
    if (other->capturing && other.get() != capture_origin_ &&
        capture_origin_->clock[other.get()] < other->given) {
      violation(other->name + " takes part in a capture and was not joined before its end");
    }
    other->capturing = false;
  }
  capture_origin_ = nullptr;
  CapturedGraph* graph = capture_.release();
  graphs_.insert(graph);
  return graph;
}

void CudaStandIn::launch(Graph graph, Stream stream) {
  enter("launch");
  const auto* captured = static_cast<const CapturedGraph*>(graph);
  if (!graphs_.contains(const_cast<CapturedGraph*>(captured))) {
    violation("a graph launched that is not there");
    return;
  }
  Line* on = line(stream);
  for (const Work& work : captured->work) {
    give(*on, work);
  }
  if (options_.first_stream_is_host && on == lines_.front().get()) {
    do_until(*on, on->given);
  }
}

void CudaStandIn::destroy_graph(Graph graph) noexcept {
  auto* captured = static_cast<CapturedGraph*>(graph);
  if (graphs_.erase(captured) == 0) {
    violation("a graph destroyed that is not there");
    return;
  }
  delete captured;
}

}  // namespace reprise::testing

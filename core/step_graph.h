// A step captured into a graph of the device, which a launch does again at the cost of one call:
//
//   allocator(device).begin_plan(plan);             // where the step's blocks lie, each time
//   graph.capture([&] { forward, backward, optimizer });   // nothing of it is done yet
//   allocator(device).end_plan();
//   for (...) { write the next batch into the tensors that the step reads; graph.launch(); }
//
// What the graph does is fixed: kernels, addresses, and all numbers that the host put into a
// launch. New data comes through memory: tensors that the step reads are written between launches,
// in order of compute. What cannot be captured is an Error of the operation that tries, and the
// step can be run as it is: elements that the host reads or writes, a wait for the device, and
// blocks that do not lie where the memory plan says.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "core/streams.h"

namespace reprise {

class StepGraph {
 public:
  explicit StepGraph(Streams& streams) : streams_(streams) {}
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;

  // Runs step() once, and what it gives to compute, and to streams that compute waits for, becomes
  // the graph, in place of the one before, which is gone. When it throws there is none.
  void capture(const std::function<void()>& step);
  bool captured() const { return graph_ != nullptr; }
  // In order of compute. Throws Error when there is no graph.
  void launch();

 private:
  void forget();

  Streams& streams_;
  CudaCalls::Graph graph_ = nullptr;
};

// Whether a step is being captured on this thread.
bool capturing();
// Throws Error when it is: "[cuda_copy] cannot be part of a captured step: <why>".
void expect_not_capturing(std::string_view operation, std::string_view why);

// While one lives on this thread, kernels of a cuda device that draw random numbers add *shift, a
// word of device memory that is read when they run, to their offsets (core/philox.h). So a captured
// step draws on at each launch: the word is how far the generator is ahead of where it was at the
// capture.
class ShiftDraws {
 public:
  explicit ShiftDraws(const std::uint64_t* shift);
  ~ShiftDraws();
  ShiftDraws(const ShiftDraws&) = delete;

 private:
  const std::uint64_t* const before_;
};
// Of the innermost ShiftDraws; null: there is none, and nothing is added.
const std::uint64_t* draw_shift();

}  // namespace reprise

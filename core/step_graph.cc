#include "core/step_graph.h"

#include <utility>

#include "core/error.h"

namespace reprise {
namespace {

thread_local bool capture_under_way = false;
thread_local const std::uint64_t* shift_of_draws = nullptr;

}  // namespace

bool capturing() {
  return capture_under_way;
}

void expect_not_capturing(std::string_view operation, std::string_view why) {
  if (capture_under_way) {
    fail(operation, "cannot be part of a captured step: {}", why);
  }
}

StepGraph::~StepGraph() {
  forget();
}

void StepGraph::forget() {
  if (graph_ != nullptr) {
    streams_.calls().destroy_graph(std::exchange(graph_, nullptr));
  }
}

void StepGraph::capture(const std::function<void()>& step) {
  expect_not_capturing("capture", "another capture");
  forget();
  CudaCalls& calls = streams_.calls();
  calls.use_device();
  const CudaCalls::Stream compute = streams_.stream(StreamKind::compute);
  calls.begin_capture(compute);
  capture_under_way = true;
  try {
    step();
  } catch (...) {
    capture_under_way = false;
    try {  // the stream must leave the capture, whatever the graph is
      if (const CudaCalls::Graph part = calls.end_capture(compute)) {
        calls.destroy_graph(part);
      }
    } catch (...) {
      // A capture that the failure has made invalid: the stream has left it all the same.
    }
    throw;
  }
  capture_under_way = false;
  graph_ = calls.end_capture(compute);
}

void StepGraph::launch() {
  if (graph_ == nullptr) {
    fail("launch", "no step was captured");
  }
  expect_not_capturing("launch", "a graph of its own");
  streams_.calls().use_device();
  streams_.calls().launch(graph_, streams_.stream(StreamKind::compute));
}

ShiftDraws::ShiftDraws(const std::uint64_t* shift)
    : before_(std::exchange(shift_of_draws, shift)) {}
ShiftDraws::~ShiftDraws() {
  shift_of_draws = before_;
}

const std::uint64_t* draw_shift() {
  return shift_of_draws;
}

}  // namespace reprise

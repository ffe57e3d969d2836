// A step that is done again and again on a cuda device, captured into a graph (core/step_graph.h)
// once it is known:
//
//   CapturedStep repeated(device);
//   for (...) {
//     write the next batch into the tensors that the step reads;
//     repeated.run("B 8, T 1024", [&] { forward, backward, optimizer });
//   }
//
// The key stands for all that the host decides: shapes, options, which tensors are read. The first
// run with a key does the step as it is (libraries choose their algorithms, an optimizer makes its
// states); the second too, and writes down what it allocates; the third is captured, with its
// blocks where a plan of that says, and launched; every later one is a launch. A run with another
// key does the step as it is, and leaves the graph; three of it in a row, and its graph takes the
// place of the one before.
//
// What is captured must be the same work each time: nothing that the host reads, and nothing that
// lives from before the step to somewhere in it. The Errors are those of core/step_graph.h; after
// one the step has not been done, and the next run with its key begins anew.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/device.h"
#include "core/memory_plan.h"

namespace reprise {

class StepGraph;

class CapturedStep {
 public:
  enum class How : std::uint8_t { plain, captured, launched };  // captured: and launched

  // Throws Error unless it is a cuda device that is there.
  explicit CapturedStep(Device device);
  ~CapturedStep();
  CapturedStep(const CapturedStep&) = delete;

  How run(const std::string& key, const std::function<void()>& step);
  // Whether a run with the key is a launch of the graph, which does not call step().
  bool holds(const std::string& key) const { return graph_ != nullptr && key == key_; }
  // Whether it is a capture.
  bool is_next(const std::string& key) const { return key == known_ && plan_ != nullptr; }
  void forget();

 private:
  void trace(const std::function<void()>& step);
  void capture(const std::string& key, const std::function<void()>& step);

  const Device device_;
  std::unique_ptr<StepGraph> graph_;
  std::shared_ptr<const void> memory_, host_memory_;  // of the graph's blocks
  std::string key_;                                   // of the graph
  std::string known_;                                 // of the run before, where it was no launch
  bool any_known_ = false;
  std::shared_ptr<const MemoryPlan> plan_, host_plan_;  // of the step with the key `known_`
};

}  // namespace reprise

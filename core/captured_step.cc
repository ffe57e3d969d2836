#include "core/captured_step.h"

#include <utility>

#include "core/allocator.h"
#include "core/cuda_device.h"
#include "core/error.h"
#include "core/step_graph.h"

namespace reprise {
namespace {

// Writes down what an account allocates.
class Traced {
 public:
  explicit Traced(Device account) : memory_(allocator(account)) { memory_.set_trace(true); }
  ~Traced() { memory_.set_trace(false); }
  Traced(const Traced&) = delete;
  std::shared_ptr<const MemoryPlan> plan() const {
    return std::make_shared<const MemoryPlan>(plan_memory(memory_.trace()));
  }

 private:
  Allocator& memory_;
};

// An account's blocks lie where a plan says.
class Planned {
 public:
  Planned(Device account, std::shared_ptr<const MemoryPlan> plan) : memory_(allocator(account)) {
    memory_.begin_plan(std::move(plan));
  }
  ~Planned() {
    if (in_use_) {
      (void)memory_.end_plan();
    }
  }
  Planned(const Planned&) = delete;
  Allocator::PlanUse end() {
    in_use_ = false;
    return memory_.end_plan();
  }

 private:
  Allocator& memory_;
  bool in_use_ = true;
};

}  // namespace

CapturedStep::CapturedStep(Device device) : device_(device) {
  if (device.kind != DeviceKind::cuda) {
    fail("capture", "device must be a cuda device, got {}", to_string(device));
  }
  (void)cuda_streams(device);
}

CapturedStep::~CapturedStep() = default;

void CapturedStep::forget() {
  graph_ = nullptr;
  memory_ = host_memory_ = nullptr;
  plan_ = host_plan_ = nullptr;
  any_known_ = false;
}

CapturedStep::How CapturedStep::run(const std::string& key, const std::function<void()>& step) {
  if (holds(key)) {
    any_known_ = false;
    plan_ = host_plan_ = nullptr;
    graph_->launch();
    return How::launched;
  }
  if (!any_known_ || key != known_) {
    plan_ = host_plan_ = nullptr;
    any_known_ = false;  // until it went well
    step();
    known_ = key;
    any_known_ = true;
    return How::plain;
  }
  if (plan_ == nullptr) {
    trace(step);
    return How::plain;
  }
  capture(key, step);
  graph_->launch();
  return How::captured;
}

void CapturedStep::trace(const std::function<void()>& step) {
  any_known_ = false;
  const Traced here(device_), host(host_of(device_));
  step();
  plan_ = here.plan();
  host_plan_ = host.plan();
  any_known_ = true;
}

void CapturedStep::capture(const std::string& key, const std::function<void()>& step) {
  const auto plan = plan_, host_plan = host_plan_;
  forget();
  auto graph = std::make_unique<StepGraph>(cuda_streams(device_));
  Planned here(device_, plan), host(host_of(device_), host_plan);
  graph->capture(step);
  const Allocator::PlanUse use = here.end(), host_use = host.end();
  if (use.gone + host_use.gone > 0) {
    fail("capture",
         "the step frees {} block{} of memory that were there before it, and cannot be captured: "
         "what a captured step reads must stay",
         use.gone + host_use.gone, use.gone + host_use.gone == 1 ? "" : "s");
  }
  graph_ = std::move(graph);
  memory_ = use.reserved;
  host_memory_ = host_use.reserved;
  key_ = key;
}

}  // namespace reprise

#include "autograd/dry_run.h"

namespace reprise {

StepReport measure_step(const std::function<Variable()>& forward, const Policies& policies,
                        Device device, const BackwardOptions& options,
                        const std::function<void(const Tape&)>& before_backward) {
  Allocator& memory = allocator(device);
  Allocator& host = allocator(host_of(device));
  memory.reset_peak();
  host.reset_peak();
  Tape tape;
  Tape::Scope scope(tape, policies);
  const Variable loss = forward();
  if (before_backward) {
    before_backward(tape);
  }
  backward(loss, options);
  const MemoryReport used = memory.report();
  StepReport report;
  report.peak_bytes = used.peak_bytes;
  report.at_peak = used.at_peak;
  report.peak = used.peak;
  report.peak_transient_bytes = used.peak_transient_bytes;
  report.host_peak_bytes = host.report().peak_bytes;
  report.tape = tape.report();
  report.forward_flops = report.tape.forward_flops;
  report.replay_flops = report.tape.replay_flops;
  report.backward_flops = report.tape.backward_flops;
  return report;
}

StepReport dry_run(const std::function<Variable()>& forward, const Policies& policies,
                   const std::function<void(const Tape&)>& before_backward) {
  return measure_step(forward, policies, meta, {}, before_backward);
}

MemoryPlan plan_step(const std::function<void()>& step) {
  step();
  Allocator& memory = allocator(meta);
  memory.set_trace(true);
  try {
    step();
  } catch (...) {
    memory.set_trace(false);
    throw;
  }
  memory.set_trace(false);
  return plan_memory(memory.trace());
}

}  // namespace reprise

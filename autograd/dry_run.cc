#include "autograd/dry_run.h"

namespace reprise {

StepReport measure_step(const std::function<Variable()>& forward, const Policies& policies,
                        Device device, const BackwardOptions& options) {
  Allocator& memory = allocator(device);
  memory.reset_peak();
  Tape tape;
  Tape::Scope scope(tape, policies);
  backward(forward(), options);
  const MemoryReport used = memory.report();
  StepReport report;
  report.peak_bytes = used.peak_bytes;
  report.at_peak = used.at_peak;
  report.peak = used.peak;
  report.peak_transient_bytes = used.peak_transient_bytes;
  report.tape = tape.report();
  report.forward_flops = report.tape.forward_flops;
  report.replay_flops = report.tape.replay_flops;
  report.backward_flops = report.tape.backward_flops;
  return report;
}

StepReport dry_run(const std::function<Variable()>& forward, const Policies& policies) {
  return measure_step(forward, policies, meta);
}

}  // namespace reprise

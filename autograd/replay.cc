#include "autograd/replay.h"

#include <algorithm>
#include <vector>

#include "autograd/run_forward.h"
#include "core/progress.h"

namespace reprise {
namespace {

// An op running again. An input's buffer is given to an output when this is its last read.
class ReplayForward final : public RunForward {
 public:
  ReplayForward(std::span<const Tensor> inputs, std::span<Value* const> values,
                const Record& record)
      : RunForward(inputs, record.output_count, record.gradients), values_(values) {}

 private:
  Value* last_use(std::size_t i) const override {
    Value* v = values_[i];
    return v != nullptr && v->pend == 1 && v->need == 0 && v->handles == 0 ? v : nullptr;
  }

  std::span<Value* const> values_;
};

}  // namespace

void Replay::enter(std::int32_t id) {
  const Segment& segment = tape_.segments()[static_cast<std::size_t>(id)];
  const SegmentLabel label(segment.name);
  const PhaseScope phase(Phase::replay);
  const std::uint32_t epoch = tape_.next_epoch();
  auto ask = [&](Value* v) { v->root->asked = epoch; };
  plan_.each_wanted(id, [&](Value* v) {
    add_need(v);
    ask(v);
  });
  std::vector<std::int32_t> run;
  for (std::int32_t i = segment.last - 1; i >= segment.first; --i) {
    const Record& record = tape_.records()[static_cast<std::size_t>(i)];
    if (record.op->is_view()) {
      continue;
    }
    if (std::ranges::any_of(tape_.outputs(record),
                            [&](const Value* v) { return v->asked == epoch && !v->at_hand(); })) {
      run.push_back(i);
      for (Value* input : tape_.inputs(record)) {
        if (input != nullptr) {
          ask(input);
          add_pend(input);
        }
      }
    }
  }
  std::vector<Tensor> inputs, layouts;
  for (auto it = run.rbegin(); it != run.rend(); ++it) {
    const Record& record = tape_.records()[static_cast<std::size_t>(*it)];
    const auto values = tape_.inputs(record);
    tape_.offload.tick();
    inputs.clear();
    for (Value* v : values) {
      inputs.push_back(v != nullptr ? v->read() : Tensor());
    }
    ReplayForward forward(inputs, values, record);
    forward.run(*record.op);
    inputs.clear();
    const auto outputs = tape_.outputs(record);
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      Value& v = *outputs[k];
      if (v.asked == epoch && !v.at_hand() && v.need + v.pend > 0) {
        v.tensor.set_storage(forward.outputs()[k]);
        if (v.need > 0) {
          v.tensor.reclassify(MemoryKind::saved);
        }
        tape_.report.restored_bytes += v.tensor.bytes();
      }
      forward.outputs()[k] = Tensor();
      tape_.offload.replayed(&v);
    }
    tape_.report.replay_flops += record.op->cost(tape_.call(record, layouts)).flops;
    layouts.clear();  // else they would keep what is let go of
    ++tape_.report.replayed_records;
    for (Value* v : values) {
      if (v != nullptr) {
        drop_pend(v);
        tape_.offload.replayed(v);
      }
    }
  }
  for (Value* v : plan_.hold[static_cast<std::size_t>(id)]) {
    drop_need(v);
  }
  for (Value* v : plan_.keep[static_cast<std::size_t>(id)]) {
    drop_need(v);
  }
}

}  // namespace reprise

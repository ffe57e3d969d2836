#include "autograd/replay.h"

#include <algorithm>
#include <vector>

#include "core/allocator.h"

namespace reprise {
namespace {

// An op running again. An input's buffer is given to an output when this is its last read.
class ReplayForward final : public Forward {
 public:
  ReplayForward(std::span<const Tensor> inputs, std::span<Value* const> values,
                const Record& record)
      : values_(values), outputs_(record.output_count) {
    inputs_ = inputs;
    gradients_ = record.gradients;
    for (const Tensor& input : inputs) {
      if (input.defined()) {
        device_ = input.device();
        break;
      }
    }
  }
  Tensor output(std::size_t k, const Shape& shape, DType dtype, int reuse) override {
    if (reuse >= 0 && reusable(*values_[static_cast<std::size_t>(reuse)], shape, dtype)) {
      Tensor& taken = values_[static_cast<std::size_t>(reuse)]->tensor;
      outputs_[k] = taken.as_view(shape, contiguous_strides(shape), taken.offset());
      taken.drop_storage();
    } else {
      outputs_[k] = Tensor::empty(shape, dtype, device_);
    }
    return outputs_[k];
  }
  void give_output(std::size_t k, Tensor tensor) override { outputs_[k] = std::move(tensor); }
  std::vector<Tensor>& outputs() { return outputs_; }

 private:
  static bool reusable(const Value& v, const Shape& shape, DType dtype) {
    return !v.is_view() && v.producer >= 0 && v.pend == 1 && v.need == 0 && v.handles == 0 &&
           v.tensor.dtype() == dtype && v.tensor.numel() == shape.numel() &&
           v.tensor.is_contiguous() && v.tensor.storage_references() == 2 &&
           v.tensor.storage_bytes() == v.tensor.bytes();
  }

  std::span<Value* const> values_;
  std::vector<Tensor> outputs_;
};

}  // namespace

void Replay::enter(std::int32_t id) {
  const Segment& segment = tape_.segments()[static_cast<std::size_t>(id)];
  const std::string label = allocator(cpu).set_segment(segment.name);
  allocator(meta).set_segment(segment.name);
  const std::uint32_t epoch = tape_.next_epoch();
  auto ask = [&](Value* v) { v->root->asked = epoch; };
  each_wanted(tape_, plan_, id, [&](Value* v) {
    add_need(v);
    ask(v);
  });
  std::vector<std::int32_t> run;
  for (std::int32_t i = segment.last - 1; i >= segment.first; --i) {
    const Record& record = tape_.records()[static_cast<std::size_t>(i)];
    if (record.op->is_view()) {
      continue;
    }
    if (std::ranges::any_of(tape_.outputs(record), [&](const Value* v) {
          return v->asked == epoch && !v->tensor.has_storage();
        })) {
      run.push_back(i);
      for (Value* input : tape_.inputs(record)) {
        if (input != nullptr) {
          ask(input);
          add_pend(input);
        }
      }
    }
  }
  std::vector<Tensor> inputs;
  for (auto it = run.rbegin(); it != run.rend(); ++it) {
    const Record& record = tape_.records()[static_cast<std::size_t>(*it)];
    const auto values = tape_.inputs(record);
    inputs.clear();
    for (Value* v : values) {
      inputs.push_back(v != nullptr ? v->read() : Tensor());
    }
    ReplayForward forward(inputs, values, record);
    record.op->forward(forward);
    inputs.clear();
    const auto outputs = tape_.outputs(record);
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      Value& v = *outputs[k];
      if (v.asked == epoch && !v.tensor.has_storage() && v.need + v.pend > 0) {
        v.tensor.set_storage(forward.outputs()[k]);
        if (v.need > 0) {
          v.tensor.reclassify(MemoryKind::saved);
        }
        tape_.report.restored_bytes += v.tensor.bytes();
      }
      forward.outputs()[k] = Tensor();
    }
    std::vector<Tensor> layouts;
    tape_.report.replay_flops += record.op->cost(tape_.call(record, layouts)).flops;
    ++tape_.report.replayed_records;
    for (Value* v : values) {
      if (v != nullptr) {
        drop_pend(v);
      }
    }
  }
  for (Value* v : plan_.hold[static_cast<std::size_t>(id)]) {
    drop_need(v);
  }
  for (Value* v : plan_.keep[static_cast<std::size_t>(id)]) {
    drop_need(v);
  }
  allocator(cpu).set_segment(label);
  allocator(meta).set_segment(label);
}

}  // namespace reprise

// Records, segments and values of a tape. Internal to autograd: users see Tape.
//
// The three steps over one notion, a level L (the root, or one segment):
//   wants(L) = saved values of the records directly in L, and hold and keep of its child segments
// close() folds a segment to what its replay starts from (hold: made outside; keep: made inside and
// kept by the policy), enter() unfolds it again, and the root's wants are what forward holds.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd/offload.h"
#include "autograd/op.h"
#include "autograd/policy.h"
#include "autograd/segment_label.h"
#include "autograd/tape.h"
#include "autograd/value.h"

namespace reprise {

struct Record {
  std::unique_ptr<const Op> op;
  std::uint32_t first_input = 0, first_output = 0;  // in the tape's edges
  std::uint16_t input_count = 0, output_count = 0;
  Mask gradients = 0;  // inputs that need one; 0: no backward
  Saved saved;
  std::int32_t segment = -1;  // innermost
};

struct Segment {
  std::string name;
  Policy policy;
  Offload offload;                   // empty: nothing leaves
  std::int32_t first = 0, last = 0;  // records [first, last)
  std::int32_t parent = -1;
  std::int64_t number = 0;  // in order of opening; counts segments that were truncated
  std::vector<std::int32_t> children;
  bool any_gradient = false;
  std::vector<Value*> ext;         // while open: reads of what was made outside
  std::vector<Value*> kept;        // while open: kept by the policy
  std::vector<Value*> hold, keep;  // once closed
};

class TapeState {
 public:
  TapeState() = default;
  ~TapeState() { reset(); }
  TapeState(const TapeState&) = delete;

  // Recording
  std::vector<Variable> record(std::unique_ptr<const Op> op, std::span<Variable> inputs,
                               bool gradients_on);
  Value* leaf(const Parameter& parameter);
  void open(std::string_view name);
  void close();
  void name_value(Value* value, std::string_view name);
  void reset();
  void on_drop(const Value& root);
  // A constant or leaf of the user's belongs to the first tape that reads it.
  void bind(Value* value);

  // Reading
  std::span<Value* const> inputs(const Record& r) const {
    return {edges_.data() + r.first_input, r.input_count};
  }
  std::span<Value* const> outputs(const Record& r) const {
    return {edges_.data() + r.first_output, r.output_count};
  }
  const std::vector<Record>& records() const { return records_; }
  const std::vector<Segment>& segments() const { return segments_; }
  const std::vector<Value*>& values() const { return values_; }
  bool segment_open() const { return open_ >= 0; }
  std::int64_t open_segment() const {
    return open_ < 0 ? 0 : segments_[static_cast<std::size_t>(open_)].number;
  }
  // Calls f(value) for each saved value of a record.
  template <class F>
  void each_saved(const Record& r, F&& f) const {
    for (std::size_t i = 0; i < r.input_count; ++i) {
      if ((r.saved.inputs >> i & 1u) != 0) {
        f(inputs(r)[i]);
      }
    }
    for (std::size_t k = 0; k < r.output_count; ++k) {
      if ((r.saved.outputs >> k & 1u) != 0) {
        f(outputs(r)[k]);
      }
    }
  }
  // Calls f(value) for what a closed segment holds and keeps.
  template <class F>
  void each_held(std::int32_t segment, F&& f) const {
    for (Value* v : segments_[static_cast<std::size_t>(segment)].hold) {
      f(v);
    }
    for (Value* v : segments_[static_cast<std::size_t>(segment)].keep) {
      f(v);
    }
  }
  // Calls f(value) for each buffer made by an op that only the user's handles keep: no policy can
  // drop it. A handle on a view keeps all of its buffer.
  template <class F>
  void each_pinned(F&& f) const {
    for (const Value* v : values_) {
      if (!v->is_view() && v->handles > 0 && v->need == 0 && v->producer >= 0) {
        f(v);
      }
    }
  }
  std::int64_t pinned_bytes() const {
    std::int64_t bytes = 0;
    each_pinned([&](const Value* v) { bytes += v->tensor.bytes(); });
    return bytes;
  }
  Call call(const Record& r, std::vector<Tensor>& layouts) const;
  // Segments that hold record r, innermost last.
  std::vector<std::int32_t> path(std::int32_t segment) const;
  std::uint32_t next_epoch() { return ++epoch_; }
  static bool outside(const Value* value, const Segment& segment) {
    return value->root->producer < segment.first;
  }

  TapeReport report;
  Policies policies;
  OffloadSchedule offload{*this};
  bool sweeping = false;
  bool check_finite = false;

 private:
  // A report stays readable after a reset, until the tape is used again.
  void begin_report() {
    if (records_.empty() && segments_.empty() && std::exchange(report_ended_, false)) {
      report = {};
    }
  }
  void check_inputs(const Op& op, std::span<Variable> inputs);
  void bind(std::span<Variable> inputs);
  Variable unrecorded_view(const Op& op, Value* source);
  Value* add_value(Tensor tensor, Value* root);
  void hold_inputs(std::span<Variable> inputs, bool add);
  void expect_finite(const Op& op, std::span<const Tensor> outputs) const;
  void keep_by_policy(const Record& r);
  Keep ask_policy(const Segment& segment, const Value* value) const;
  Keep ask_policy(const Segment& segment, const Value* value, std::string_view name) const;
  void truncate(std::int32_t segment);
  void fold(std::int32_t segment);
  void end_open_holds(Segment& segment);

  std::vector<Record> records_;
  std::vector<Value*> edges_;
  std::vector<Value*> values_;  // every cell that this tape refers to
  std::vector<Segment> segments_;
  std::unordered_map<const ParameterLife*, Value*> leaves_;  // the values keep the keys alive
  std::int32_t open_ = -1;                                   // innermost open segment
  std::vector<SegmentLabel> labels_;                         // of the open segments, innermost last
  std::uint32_t epoch_ = 0;
  bool report_ended_ = false;
};

}  // namespace reprise

// Which values of a tape leave for host memory and come back, and when. Internal to autograd.
//
// Only values that no handle is on leave, so nothing but the sweep can want them. All happens at
// fixed points, counted in ops run, so that a dry run sees the same bytes: a value leaves
// `distance` ops after it was asked to, its memory goes `distance` ops later, and its copy back
// begins when the sweep is `distance` records before its next use. Whatever is read earlier comes
// back at that moment (Value::read): the schedule decides about time and bytes, never about values.
#pragma once

#include <cstdint>
#include <deque>
#include <queue>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd/policy.h"
#include "autograd/value.h"

namespace reprise {

class TapeState;
struct Record;
struct SweepPlan;

// The elements are on the device again, for what the device is given from now on.
void bring_back(Value& root);

class OffloadSchedule {
 public:
  explicit OffloadSchedule(TapeState& tape) : tape_(tape) {}

  // An op is about to run. Throws Error when host memory is short; nothing has changed then.
  void tick();
  // Those that a record outside of segments, or a segment closed outside of others, holds.
  void held(const Record& record);
  void held(std::int32_t segment);
  // The last handle on a root that is `leaving` is gone.
  void let_go(Value* root);

  // Finds when the sweep will want what has left. What has not yet stays.
  void begin_sweep(const SweepPlan& plan);
  // The sweep comes to record r.
  void step(std::int32_t r);
  // Segment `s` is replayed as the sweep comes to record r: what its inner segments start from
  // leaves as soon as the replay has read it.
  void begin_replay(std::int32_t s, std::int32_t r);
  // The replay has made the value, or has given back a read of it.
  void replayed(Value* value) {
    if (value->root->leaving) {
      leave_until_next_use(value->root);
    }
  }
  void end_replay();
  void end_sweep();
  void reset();

 private:
  using Due = std::pair<Value*, std::int64_t>;  // by the clock
  struct Return {
    std::int32_t record;
    std::int64_t number;  // of equal records the first that was asked for
    Value* root;
    bool operator<(const Return& other) const {
      return std::tuple(record, -number) < std::tuple(other.record, -other.number);
    }
  };
  void ask(Value* value);
  bool wanted(const Offload& which, const Value* value, std::int32_t first_record) const;
  bool leave(Value* root);
  void leave_until_next_use(Value* root);
  void return_at(std::int32_t record, Value* root);

  TapeState& tape_;
  std::int64_t clock_ = 0;    // ops run
  std::deque<Due> waiting_;   // to leave
  std::deque<Due> settling_;  // copies to the host under way
  std::priority_queue<Return> returns_;
  std::int64_t returns_asked_ = 0;
  const SweepPlan* plan_ = nullptr;
  std::vector<std::int32_t> entry_;  // by segment: the record at which the sweep enters it, or -1
  // Where the sweep reads each root, descending; only where inner segments have values leave.
  std::unordered_map<const Value*, std::vector<std::int32_t>> uses_;
  std::unordered_map<Value*, std::int32_t> next_use_;  // of what leaves in the replay under way
};

}  // namespace reprise

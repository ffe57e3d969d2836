#include "autograd/offload.h"

#include <algorithm>

#include "autograd/sweep_plan.h"
#include "autograd/tape_state.h"

namespace reprise {

void bring_back(Value& root) {
  Tensor tensor = root.host->take(MemoryKind::saved);
  root.tensor.set_storage(tensor);
  root.host.reset();
  if (root.tape != nullptr) {
    root.tape->report.fetched_bytes += tensor.bytes();
  }
}

void OffloadSchedule::tick() {
  ++clock_;
  while (!settling_.empty() && settling_.front().second <= clock_) {
    if (HostCopy* copy = settling_.front().first->host.get()) {
      copy->settle();
    }
    settling_.pop_front();
  }
  while (!waiting_.empty() && waiting_.front().second <= clock_) {
    Value* root = waiting_.front().first;
    if (root->handles > 0) {
      root->leaving = root->need > 0;
    } else {
      leave(root);
    }
    waiting_.pop_front();
  }
}

bool OffloadSchedule::leave(Value* root) {
  if (root->handles > 0 || root->pend > 0 || root->need == 0 ||
      !HostCopy::can_leave(root->tensor)) {
    return false;
  }
  settling_.emplace_back(root, clock_ + tape_.policies.distance());
  try {
    root->host = std::make_unique<HostCopy>(root->tensor);
  } catch (...) {
    settling_.pop_back();
    throw;
  }
  root->leaving = false;
  root->tensor.drop_storage();
  tape_.report.offloaded_bytes += root->tensor.bytes();
  return true;
}

void OffloadSchedule::ask(Value* value) {
  if (!value->root->is_parameter()) {
    waiting_.emplace_back(value->root, clock_ + tape_.policies.distance());
  }
}

void OffloadSchedule::let_go(Value* root) {
  root->leaving = false;
  if (!tape_.sweeping) {
    waiting_.emplace_front(root, clock_);
  }
}

bool OffloadSchedule::wanted(const Offload& which, const Value* value,
                             std::int32_t first_record) const {
  const Value* root = value->root;
  Candidate candidate{"", "", -1, {}, root->tensor.bytes()};
  if (root->producer >= 0) {
    const Record& record = tape_.records()[static_cast<std::size_t>(root->producer)];
    std::vector<Tensor> layouts;
    candidate.op = record.op->name();
    candidate.cost = record.op->cost(tape_.call(record, layouts));
    if (root->producer >= first_record) {
      candidate.ordinal = root->producer - first_record;
    }
  }
  if (root->names == nullptr) {
    return which(candidate);
  }
  return std::ranges::any_of(*root->names, [&](const std::string& name) {
    candidate.name = name;
    return which(candidate);
  });
}

void OffloadSchedule::held(const Record& record) {
  if (const Offload& which = tape_.policies.outside()) {
    tape_.each_saved(record, [&](Value* v) {
      if (wanted(which, v, 0)) {
        ask(v);
      }
    });
  }
}

void OffloadSchedule::held(std::int32_t segment) {
  const Segment& s = tape_.segments()[static_cast<std::size_t>(segment)];
  if (s.offload) {
    tape_.each_held(segment, [&](Value* v) {
      if (wanted(s.offload, v, s.first)) {
        ask(v);
      }
    });
  }
}

void OffloadSchedule::return_at(std::int32_t record, Value* root) {
  returns_.push({record, returns_asked_++, root});
}

// In the order of Sweep::step: a record's segments are entered, outermost first, before its
// backward.
void OffloadSchedule::begin_sweep(const SweepPlan& plan) {
  plan_ = &plan;
  waiting_.clear();
  returns_ = {};
  uses_.clear();
  entry_.assign(tape_.segments().size(), -1);
  const bool inner = std::ranges::any_of(
      tape_.segments(), [](const Segment& s) { return s.parent >= 0 && s.offload; });
  if (!inner && std::ranges::none_of(tape_.values(), [](Value* v) { return v->host != nullptr; })) {
    return;
  }
  const auto use = [&](Value* value, std::int32_t r) {
    if (value != nullptr && !value->root->is_parameter()) {
      std::vector<std::int32_t>& uses = uses_[value->root];
      if (uses.empty() && value->root->host != nullptr) {
        return_at(r, value->root);
      }
      if (uses.empty() || (inner && uses.back() != r)) {
        uses.push_back(r);
      }
    }
  };
  for (auto r = static_cast<std::int32_t>(plan.live.size()) - 1; r >= 0; --r) {
    if (plan.live[static_cast<std::size_t>(r)] == 0) {
      continue;
    }
    const Record& record = tape_.records()[static_cast<std::size_t>(r)];
    for (const std::int32_t s : tape_.path(record.segment)) {
      if (entry_[static_cast<std::size_t>(s)] >= 0) {
        continue;
      }
      entry_[static_cast<std::size_t>(s)] = r;
      for (const std::int32_t run : plan.runs[static_cast<std::size_t>(s)]) {
        for (Value* v : tape_.inputs(tape_.records()[static_cast<std::size_t>(run)])) {
          use(v, r);
        }
      }
    }
    tape_.each_saved(record, [&](Value* v) { use(v, r); });
  }
}

void OffloadSchedule::step(std::int32_t r) {
  tick();
  while (!returns_.empty() && returns_.top().record + tape_.policies.distance() >= r) {
    if (HostCopy* copy = returns_.top().root->host.get()) {
      copy->fetch(MemoryKind::saved);
    }
    returns_.pop();
  }
}

void OffloadSchedule::begin_replay(std::int32_t s, std::int32_t r) {
  const auto& segments = tape_.segments();
  for (const std::int32_t c : segments[static_cast<std::size_t>(s)].children) {
    const Segment& child = segments[static_cast<std::size_t>(c)];
    if (!child.offload) {
      continue;
    }
    const std::int32_t entry = entry_[static_cast<std::size_t>(c)];
    const auto consider = [&](Value* v) {
      // This replay's own reads are noted at r; the sweep may be at a record of the child already.
      const std::vector<std::int32_t>& uses = uses_[v->root];
      const auto next =
          std::ranges::find_if(uses, [&](std::int32_t use) { return use < r || use == entry; });
      // The copies there and back have a distance each.
      if (next != uses.end() && *next + 2 * tape_.policies.distance() < r &&
          wanted(child.offload, v, child.first)) {
        v->root->leaving = true;
        next_use_[v->root] = *next;
      }
    };
    std::ranges::for_each(plan_->hold[static_cast<std::size_t>(c)], consider);
    std::ranges::for_each(plan_->keep[static_cast<std::size_t>(c)], consider);
  }
}

void OffloadSchedule::leave_until_next_use(Value* root) {
  if (leave(root)) {
    return_at(next_use_.at(root), root);
  }
}

void OffloadSchedule::end_replay() {
  for (const auto& [root, use] : next_use_) {
    root->leaving = false;
  }
  next_use_.clear();
}

void OffloadSchedule::end_sweep() {
  plan_ = nullptr;
  returns_ = {};
  uses_.clear();
}

void OffloadSchedule::reset() {
  end_sweep();
  next_use_.clear();
  waiting_.clear();
  settling_.clear();
  clock_ = 0;
}

}  // namespace reprise

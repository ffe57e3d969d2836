// What a segment keeps while it is open, and how it is folded when it closes.
#include <algorithm>

#include "autograd/closure.h"
#include "autograd/tape_state.h"

namespace reprise {

// The strongest answer over the value's names.
Keep TapeState::ask_policy(const Segment& segment, const Value* value) const {
  if (value->names == nullptr) {
    return ask_policy(segment, value, "");
  }
  Keep keep = Keep::Drop;
  for (const std::string& name : *value->names) {
    keep = std::max(keep, ask_policy(segment, value, name));
  }
  return keep;
}

Keep TapeState::ask_policy(const Segment& segment, const Value* value,
                           std::string_view name) const {
  const Record& r = records_[static_cast<std::size_t>(value->producer)];
  std::vector<Tensor> layouts;
  const Call layout = call(r, layouts);
  Candidate candidate{r.op->name(), name, value->producer - segment.first, r.op->cost(layout), 0};
  for (Value* output : outputs(r)) {
    candidate.bytes += output->tensor.bytes();
  }
  return segment.policy(candidate);
}

void TapeState::keep_by_policy(const Record& r) {
  Segment& segment = segments_[static_cast<std::size_t>(open_)];
  auto keep = [&](Value* value) {
    if (!outside(value, segment)) {
      segment.kept.push_back(value->root);
      add_need(value);
    }
  };
  if (r.op->must_keep()) {
    std::ranges::for_each(outputs(r), keep);
    return;
  }
  if (r.op->is_view()) {
    return;
  }
  switch (ask_policy(segment, outputs(r)[0])) {
    case Keep::Drop:
      return;
    case Keep::Saved:
      each_saved(r, keep);
      return;
    case Keep::Output:
      std::ranges::for_each(outputs(r), keep);
      return;
  }
}

void TapeState::name_value(Value* value, std::string_view name) {
  value = value->root;
  if (value->names == nullptr) {
    value->names = std::make_unique<std::vector<std::string>>();
  }
  value->names->emplace_back(name);
  if (open_ < 0 || value->tape != this ||
      outside(value, segments_[static_cast<std::size_t>(open_)])) {
    return;
  }
  // The record was asked about before the name was known.
  Segment& segment = segments_[static_cast<std::size_t>(open_)];
  if (ask_policy(segment, value, name) == Keep::Output) {
    segment.kept.push_back(value);
    add_need(value);
  }
}

void TapeState::fold(std::int32_t id) {
  Segment& segment = segments_[static_cast<std::size_t>(id)];
  Closure closure(*this, id);
  for (Value* v : segment.kept) {
    closure.at_hand(v);
  }
  const auto keep_from_child = [&](Value* v) {
    if (outside(v, segment)) {
      return;
    }
    const bool must = records_[static_cast<std::size_t>(v->producer)].op->must_keep();
    if (must || ask_policy(segment, v) != Keep::Drop) {
      closure.at_hand(v);
    }
  };
  for (std::int32_t c : segment.children) {
    each_held(c, keep_from_child);
  }
  each_wanted(*this, id, [&](Value* v) { closure.ask(v); });
  closure.run([](std::int32_t) {});
  segment.hold = closure.hold();
  segment.keep = closure.keep();
  std::ranges::for_each(segment.hold, add_need);
  std::ranges::for_each(segment.keep, add_need);
  if (segment.parent >= 0) {
    // An outer segment may ask for them later although this one does not.
    Segment& parent = segments_[static_cast<std::size_t>(segment.parent)];
    for (Value* v : segment.kept) {
      if (records_[static_cast<std::size_t>(v->producer)].op->must_keep()) {
        parent.kept.push_back(v);
        add_need(v);
      }
    }
  }
  end_open_holds(segment);
}

// What an open segment held by itself and through its children, its own hold and keep now hold, or
// nobody.
void TapeState::end_open_holds(Segment& segment) {
  for (Value* v : segment.ext) {
    drop_need(v);
    release(v);
  }
  std::ranges::for_each(segment.kept, drop_need);
  for (std::int32_t c : segment.children) {
    each_held(c, drop_need);
  }
  segment.ext = {};
  segment.kept = {};
}

// Nothing in the segment needs a gradient and no outer segment could want it again: what escaped
// becomes constants, the rest is forgotten.
void TapeState::truncate(std::int32_t id) {
  Segment& segment = segments_[static_cast<std::size_t>(id)];
  end_open_holds(segment);
  const auto first = static_cast<std::size_t>(segment.first);
  if (first < records_.size()) {
    const std::size_t first_edge = records_[first].first_input;
    std::vector<Value*> gone;
    for (std::size_t r = first; r < records_.size(); ++r) {
      for (Value* v : outputs(records_[r])) {
        v->tape = nullptr;
        gone.push_back(v);
      }
    }
    std::erase_if(values_, [](const Value* v) { return v->tape == nullptr; });
    for (Value* v : gone) {
      v->producer = v->segment = -1;
    }
    for (Value* v : gone) {
      release(v);
    }
    edges_.resize(first_edge);
    records_.resize(first);
  }
  segments_.resize(static_cast<std::size_t>(id));
}

}  // namespace reprise

#include "autograd/sweep_plan.h"

#include <algorithm>
#include <tuple>
#include <unordered_set>
#include <utility>

namespace reprise {
namespace {

// The parameter whose memory an input reads, directly or through views of it.
Parameter* parameter_of(const Value* input) {
  return input == nullptr ? nullptr : input->root->parameter;
}

void expect_alive(const Value* leaf) {
  if (leaf->outlived()) {
    fail("backward", "parameter {} was destroyed between forward and backward", leaf->life->name);
  }
}

}  // namespace

SweepPlan::SweepPlan(TapeState& tape, std::span<const Variable> losses,
                     std::span<const Variable> wrt, const BackwardOptions& options)
    : live(tape.records().size()),
      hold(tape.segments().size()),
      keep(tape.segments().size()),
      runs(tape.segments().size()),
      tape_(tape),
      may_run_(tape.records().size()) {
  check(losses, wrt, options);
  find_live(losses);
  restrict_segments();
  find_last_reads();
  order(options);
}

void SweepPlan::check(std::span<const Variable> losses, std::span<const Variable> wrt,
                      const BackwardOptions& options) const {
  if (tape_.sweeping) {
    fail("backward", "a sweep of this tape is under way: backward inside a callback of backward");
  }
  if (tape_.segment_open()) {
    fail("backward", "a segment is open: backward belongs outside of checkpoint()");
  }
  if (losses.empty()) {
    fail("backward", "at least one loss is needed");
  }
  if (!options.scale.empty() && options.scale.size() != losses.size()) {
    fail("backward", "scale must have one factor a loss = {}, got {}", losses.size(),
         options.scale.size());
  }
  for (std::size_t i = 0; i < options.parameters.size(); ++i) {
    if (options.parameters[i] == nullptr) {
      fail("backward", "parameter {} of the options is null", i);
    }
  }
  auto expect_on_tape = [&](const Variable& v, const char* what, std::size_t i) {
    if (!v.defined()) {
      fail("backward", "{} {} is absent", what, i);
    }
    if (v.value()->stale) {
      fail("backward", "{} {} is of a tape that was released: backward ran already without keep",
           what, i);
    }
    if (v.value()->tape != nullptr && v.value()->tape != &tape_) {
      fail("backward", "{} {} is on another tape", what, i);
    }
    expect_alive(v.value());
  };
  for (std::size_t i = 0; i < losses.size(); ++i) {
    expect_on_tape(losses[i], "loss", i);
    if (losses[i].shape().numel() != 1) {
      fail("backward", "loss {} must be a scalar, got shape {}", i, to_string(losses[i].shape()));
    }
    if (!losses[i].needs_gradient()) {
      fail("backward", "loss {} does not need a gradient: nothing trainable leads to it", i);
    }
  }
  for (std::size_t i = 0; i < wrt.size(); ++i) {
    expect_on_tape(wrt[i], "value", i);
    if (!wrt[i].needs_gradient()) {
      fail("backward", "value {} does not need a gradient", i);
    }
    if (const Parameter* p = wrt[i].value()->parameter) {
      fail("backward", "value {} is parameter {}: call backward() and read its gradient()", i,
           p->name());
    }
  }
}

void SweepPlan::find_live(std::span<const Variable> losses) {
  const std::uint32_t reached = tape_.next_epoch();
  for (std::size_t i = 0; i < losses.size(); ++i) {
    losses[i].value()->reached = reached;
    if (Parameter* p = losses[i].value()->parameter) {
      Reader& reader = readers[p];
      ++reader.expected;
      reader.ready_at = static_cast<std::int32_t>(tape_.records().size());
      reader.slot = i;
      parameter_losses_.push_back(p);
    }
  }
  for (auto r = static_cast<std::int32_t>(live.size()) - 1; r >= 0; --r) {
    const Record& record = tape_.records()[static_cast<std::size_t>(r)];
    if (record.gradients == 0 || std::ranges::none_of(tape_.outputs(record), [&](const Value* v) {
          return v->reached == reached;
        })) {
      continue;
    }
    live[static_cast<std::size_t>(r)] = 1;
    const auto inputs = tape_.inputs(record);
    for (std::size_t i = inputs.size(); i-- > 0;) {
      if ((record.gradients >> i & 1u) == 0) {
        continue;
      }
      inputs[i]->reached = reached;
      if (Parameter* p = inputs[i]->parameter) {
        expect_alive(inputs[i]);
        Reader& reader = readers[p];
        if (reader.expected == 0 || reader.ready_at != r) {
          reader.slot = i;  // the highest: contributions come in the order of the inputs
        }
        ++reader.expected;
        reader.ready_at = r;
      }
    }
  }
}

void SweepPlan::restrict_segments() {
  const auto& segments = tape_.segments();
  std::vector<char> has_live(segments.size());
  for (std::size_t r = 0; r < live.size(); ++r) {
    if (live[r] != 0) {
      for (std::int32_t s = tape_.records()[r].segment;
           s >= 0 && has_live[static_cast<std::size_t>(s)] == 0;
           s = segments[static_cast<std::size_t>(s)].parent) {
        has_live[static_cast<std::size_t>(s)] = 1;
      }
    }
  }
  for (std::size_t s = segments.size(); s-- > 0;) {  // a child comes after its parent
    if (has_live[s] == 0) {
      continue;
    }
    Closure closure(tape_, static_cast<std::int32_t>(s));
    for (Value* v : segments[s].keep) {
      closure.at_hand(v);
    }
    each_wanted(static_cast<std::int32_t>(s), [&](Value* v) { closure.ask(v); });
    closure.run([&](std::int32_t r) {
      may_run_[static_cast<std::size_t>(r)] = 1;
      runs[s].push_back(r);
    });
    hold[s] = closure.hold();
    keep[s] = closure.keep();
  }
}

void SweepPlan::find_last_reads() {
  for (auto r = static_cast<std::int32_t>(live.size()) - 1; r >= 0; --r) {
    const auto index = static_cast<std::size_t>(r);
    const Record& record = tape_.records()[index];
    const auto inputs = tape_.inputs(record);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      Parameter* p = parameter_of(inputs[i]);
      const bool saved = live[index] != 0 && (record.saved.inputs >> i & 1u) != 0;
      if (p == nullptr || (may_run_[index] == 0 && !saved)) {
        continue;
      }
      const Value* leaf = inputs[i]->root;
      expect_alive(leaf);
      if (leaf->version != p->version()) {
        const std::string where =
            record.segment < 0
                ? "outside of segments"
                : "in segment " + tape_.segments()[static_cast<std::size_t>(record.segment)].name;
        fail("backward",
             "parameter {} was changed between forward and backward: {} {} read version {}, it is "
             "{} now",
             p->name(), record.op->name(), where, leaf->version, p->version());
      }
      readers[p].last_read = r;
    }
    // A saved output that is a view of a parameter cannot be: views save nothing.
  }
}

void SweepPlan::order(const BackwardOptions& options) {
  std::vector<std::pair<Parameter*, Reader>> reached;
  for (const auto& [p, reader] : readers) {
    if (reader.expected > 0) {
      reached.emplace_back(p, reader);
    }
  }
  std::ranges::sort(reached, [](const auto& a, const auto& b) {
    return std::tuple(-a.second.ready_at, a.second.slot) <
           std::tuple(-b.second.ready_at, b.second.slot);
  });
  std::unordered_set<Parameter*> seen;       // a tied one may be given at each of its places
  for (Parameter* p : options.parameters) {  // in the caller's order
    const auto it = readers.find(p);
    if (p->trainable() && seen.insert(p).second &&
        (it == readers.end() || it->second.expected == 0)) {
      plan.order.push_back({p, 0, it == readers.end() ? -1 : it->second.last_read});
      plan.unreached.push_back(p);
    }
  }
  for (const auto& [p, reader] : reached) {
    plan.order.push_back({p, reader.expected, reader.last_read});
  }
  if (options.reach_all) {
    expect_all_reached();
  }
  plan.contributions = [this] { return contributions(); };
  for (const Ready& ready : plan.order) {
    if (ready.parameter->stale()) {
      fail("backward", "the gradient of {} is stale after a failed backward: zero it first",
           ready.parameter->name());
    }
  }
  if (options.on_last_read) {
    announce_last_reads();
  }
  if (options.list_reads) {
    list_reads();
  }
}

// The order of Sweep::step: a record's segments are entered, outermost first, before its backward.
void SweepPlan::list_reads() {
  const auto read = [&](const Value* input) {
    Parameter* p = parameter_of(input);
    if (p != nullptr && (plan.reads.empty() || plan.reads.back() != p)) {
      plan.reads.push_back(p);
    }
  };
  std::vector<char> entered(tape_.segments().size());
  for (std::size_t r = live.size(); r-- > 0;) {
    if (live[r] == 0) {
      continue;
    }
    const Record& record = tape_.records()[r];
    for (const std::int32_t s : tape_.path(record.segment)) {
      if (std::exchange(entered[static_cast<std::size_t>(s)], char{1}) != 0) {
        continue;
      }
      const std::vector<std::int32_t>& run = runs[static_cast<std::size_t>(s)];
      for (std::size_t i = run.size(); i-- > 0;) {
        std::ranges::for_each(tape_.inputs(tape_.records()[static_cast<std::size_t>(run[i])]),
                              read);
      }
    }
    for (std::size_t i = 0; i < record.input_count; ++i) {
      if ((record.saved.inputs >> i & 1u) != 0) {
        read(tape_.inputs(record)[i]);
      }
    }
  }
}

void SweepPlan::expect_all_reached() const {
  std::string names;
  for (const Parameter* p : plan.unreached) {
    names += (names.empty() ? "" : ", ") + p->name();
  }
  if (!names.empty()) {
    fail("backward", "no path leads from the losses to {}", names);
  }
}

// Frozen parameters too: sharding frees them. In an order that does not depend on addresses.
void SweepPlan::announce_last_reads() {
  last_reads.resize(live.size());
  std::unordered_set<Parameter*> announced;
  auto announce = [&](Parameter* p) {
    if (p != nullptr && announced.insert(p).second) {
      const std::int32_t last = readers[p].last_read;
      (last < 0 ? never_read : last_reads[static_cast<std::size_t>(last)]).push_back(p);
    }
  };
  for (const Record& record : tape_.records()) {
    for (Value* input : tape_.inputs(record)) {
      if (input != nullptr && !input->root->outlived()) {
        announce(parameter_of(input));
      }
    }
  }
  for (const Ready& ready : plan.order) {
    announce(ready.parameter);
  }
}

std::vector<Contribution> SweepPlan::contributions() const {
  std::vector<Contribution> all;
  for (const Parameter* p : parameter_losses_) {
    all.push_back({p, -1, "loss", ""});
  }
  for (auto r = static_cast<std::int64_t>(live.size()) - 1; r >= 0; --r) {
    const Record& record = tape_.records()[static_cast<std::size_t>(r)];
    const auto inputs = tape_.inputs(record);
    for (std::size_t i = 0; live[static_cast<std::size_t>(r)] != 0 && i < inputs.size(); ++i) {
      if ((record.gradients >> i & 1u) == 0 || inputs[i]->parameter == nullptr) {
        continue;
      }
      std::string path;
      for (const std::int32_t s : tape_.path(record.segment)) {
        path += (path.empty() ? "" : "/") + tape_.segments()[static_cast<std::size_t>(s)].name;
      }
      all.push_back({inputs[i]->parameter, r, std::string(record.op->name()), std::move(path)});
    }
  }
  return all;
}

std::string contributors(std::span<const Contribution> all, const Parameter& parameter) {
  constexpr int kShown = 8;
  std::string text;
  int count = 0;
  for (const Contribution& c : all) {
    if (c.parameter != &parameter || ++count > kShown) {
      continue;
    }
    text += fmt::format("{}{} (record {}, {})", count == 1 ? ": " : ", ", c.op, c.record,
                        c.segment.empty() ? "outside of segments" : "segment " + c.segment);
  }
  return fmt::format("{} contribution{}{}{}", count, count == 1 ? "" : "s", text,
                     count > kShown ? ", ..." : "");
}

}  // namespace reprise

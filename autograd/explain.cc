#include <algorithm>
#include <map>
#include <vector>

#include <fmt/ranges.h>

#include "autograd/closure.h"
#include "autograd/tape.h"
#include "autograd/tape_state.h"

namespace reprise {
namespace {

struct ReplayCost {
  std::int64_t records = 0, flops = 0;
};

std::int64_t bytes_in_host(const Segment& segment) {
  std::int64_t bytes = 0;
  for (const auto* values : {&segment.hold, &segment.keep}) {
    for (const Value* v : *values) {
      bytes += v->host != nullptr ? v->tensor.bytes() : 0;
    }
  }
  return bytes;
}

std::int64_t bytes_of(const std::vector<Value*>& values) {
  std::int64_t bytes = 0;
  for (const Value* v : values) {
    bytes += v->tensor.bytes();
  }
  return bytes;
}

int depth_of(const TapeState& tape, const Segment& segment) {
  int depth = 0;
  for (std::int32_t p = segment.parent; p >= 0;
       p = tape.segments()[static_cast<std::size_t>(p)].parent) {
    ++depth;
  }
  return depth;
}

// What a replay of the segment executes when nothing of its inside is pinned by a handle.
ReplayCost replay_cost(TapeState& tape, std::int32_t id) {
  Closure closure(tape, id);
  for (Value* v : tape.segments()[static_cast<std::size_t>(id)].keep) {
    closure.at_hand(v);
  }
  each_wanted(tape, id, [&](Value* v) { closure.ask(v); });
  ReplayCost cost;
  std::vector<Tensor> layouts;
  closure.run([&](std::int32_t r) {
    const Record& record = tape.records()[static_cast<std::size_t>(r)];
    ++cost.records;
    cost.flops += record.op->cost(tape.call(record, layouts)).flops;
  });
  return cost;
}

std::string explain_segments(TapeState& tape) {
  std::string text =
      fmt::format("{:<32} {:>8} {:>14} {:>14} {:>14} {:>8} {:>14}\n", "segment", "records",
                  "held bytes", "kept bytes", "in host bytes", "replays", "replay FLOPs");
  for (std::size_t s = 0; s < tape.segments().size(); ++s) {
    const Segment& segment = tape.segments()[s];
    const ReplayCost cost = replay_cost(tape, static_cast<std::int32_t>(s));
    const std::string name =
        std::string(static_cast<std::size_t>(2 * depth_of(tape, segment)), ' ') + segment.name;
    text += fmt::format("{:<32} {:>8} {:>14} {:>14} {:>14} {:>8} {:>14}\n", name,
                        segment.last - segment.first, bytes_of(segment.hold),
                        bytes_of(segment.keep), bytes_in_host(segment), cost.records, cost.flops);
  }
  return text;
}

std::string explain_parameters(const TapeState& tape) {
  struct Reads {
    const Value* leaf;
    std::size_t order;
    std::map<std::string, int> by_reader = {};
  };
  std::map<const ParameterLife*, Reads> reads;
  for (const Record& record : tape.records()) {
    for (const Value* input : tape.inputs(record)) {
      if (input == nullptr || !input->root->is_parameter()) {
        continue;
      }
      const Value* leaf = input->root;
      Reads& entry = reads.try_emplace(leaf->life.get(), Reads{leaf, reads.size()}).first->second;
      const std::string where =
          record.segment < 0
              ? ""
              : " in " + tape.segments()[static_cast<std::size_t>(record.segment)].name;
      ++entry.by_reader[std::string(record.op->name()) + where];
    }
  }
  std::vector<const Reads*> ordered;
  for (const auto& [life, entry] : reads) {
    ordered.push_back(&entry);
  }
  std::ranges::sort(ordered, {}, &Reads::order);
  std::string text = fmt::format("{:<40} {:>6}  read by\n", "parameter", "reads");
  for (const Reads* entry : ordered) {
    int total = 0;
    std::string readers;
    for (const auto& [reader, count] : entry->by_reader) {
      total += count;
      readers += fmt::format("{}{} x{}", readers.empty() ? "" : ", ", reader, count);
    }
    const Value& leaf = *entry->leaf;
    text += fmt::format("{:<40} {:>6}  {}{}\n",
                        leaf.outlived() ? leaf.life->name : leaf.parameter->name(), total, readers,
                        leaf.needs_gradient ? "" : " (frozen)");
  }
  return text;
}

std::string explain_pinned(const TapeState& tape) {
  std::string text;
  tape.each_pinned([&](const Value* v) {
    const auto& op = *tape.records()[static_cast<std::size_t>(v->producer)].op;
    text += fmt::format("  {} ({}) {} bytes\n",
                        v->names ? fmt::format("{}", fmt::join(*v->names, ", ")) : "unnamed",
                        op.name(), v->tensor.bytes());
  });
  return fmt::format("pinned by handles: {} bytes\n{}", tape.pinned_bytes(), text);
}

}  // namespace

std::string explain(const Tape& tape) {
  // The walks leave marks on values; what the tape records stays as it is.
  auto& state = const_cast<TapeState&>(tape.state());
  return explain_segments(state) + "\n" + explain_parameters(state) + "\n" + explain_pinned(state);
}

}  // namespace reprise

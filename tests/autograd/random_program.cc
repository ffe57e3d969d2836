#include "tests/autograd/random_program.h"

#include <algorithm>
#include <array>
#include <utility>

#include <fmt/format.h>

#include "core/philox.h"

namespace reprise::testing {
namespace {

// Draws a program; keeps for each slot its length and a bound on its elements.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : random_(seed) { program_.seed = seed; }

  Program program() {
    for (int p = 0; p < Program::kParameters; ++p) {
      program_.trainable.push_back(p == 0 || chance(70));
    }
    program_.micro_batches = chance(35) ? 2 : 1;
    max_depth_ = chance(10) ? 0 : 1 + below(4);
    source(0);
    source(1);
    body(0, 12 + below(40));
    losses();
    return std::move(program_);
  }

 private:
  int below(int n) { return static_cast<int>(random_() % static_cast<std::uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  bool full(int slot) const { return length_[static_cast<std::size_t>(slot)] > 0; }
  int& length(int slot) { return length_[static_cast<std::size_t>(slot)]; }
  double& size(int slot) { return size_[static_cast<std::size_t>(slot)]; }
  Instruction& emit(Instruction instruction) {
    instruction.no_gradient = no_gradient_ || chance(4);
    return program_.text.emplace_back(instruction);
  }
  int slot() { return below(Program::kSlots); }
  // Mostly one of the newest values, so that most of what is computed leads to the losses.
  int full_slot() {
    const auto newest = static_cast<int>(written_.size());
    for (int tries = 0; newest > 0 && tries < 3 && chance(75); ++tries) {
      if (const int s = written_[static_cast<std::size_t>(newest - 1 - below(std::min(newest, 3)))];
          full(s)) {
        return s;
      }
    }
    for (;;) {
      if (const int s = slot(); full(s)) {
        return s;
      }
    }
  }
  void set(int slot, int length_now, double size_now) {
    length(slot) = length_now;
    size(slot) = size_now;
    written_.push_back(slot);
  }

  void source(int d) {
    const int kind = below(10);
    const Act act = kind < 1   ? Act::constant
                    : kind < 2 ? Act::shared
                    : kind < 3 ? Act::leaf
                               : Act::parameter;
    emit({.act = act, .d = d, .b = below(act == Act::shared ? 2 : Program::kParameters)});
    set(d, Program::kLength, 1);
  }
  // b of the same length as a, by slicing the longer; the slots' new values live on.
  void fit(int& a, int& b) {
    if (length(a) == length(b)) {
      return;
    }
    int& longer = length(a) > length(b) ? a : b;
    const int d = slot_other_than(a, b);
    emit({.act = Act::slice, .d = d, .a = longer, .b = below(2)});
    set(d, 2, size(longer));
    longer = d;
  }
  int slot_other_than(int a, int b) {
    for (;;) {
      if (const int s = slot(); s != a && s != b) {
        return s;
      }
    }
  }
  unsigned moves(std::initializer_list<int> slots) {
    unsigned moved = 0, bit = 1;
    for (int s : slots) {
      // Of a slot that stands twice only the last one may be moved.
      if (std::count(slots.begin(), slots.end(), s) == 1 && chance(35)) {
        moved |= bit;
        length(s) = 0;
      }
      bit <<= 1;
    }
    return moved;
  }
  void shrink(int s) {
    while (size(s) > 8) {
      emit({.act = Act::scale, .d = s, .a = s, .factor = 0.125f, .moved = 1});
      size(s) /= 8;
    }
  }

  void operation() {
    if (std::ranges::count_if(length_, [](int l) { return l > 0; }) < 2) {
      return source(slot());
    }
    int a = full_slot(), b = full_slot();
    int d = slot();
    for (int tries = 0; full(d) && tries < 3; ++tries) {
      d = slot();
    }
    const int kind = below(100);
    if (kind < 8) {
      return source(d);
    }
    if (kind < 28) {
      fit(a, b);
      const double sum = size(a) + size(b);
      const int l = length(a);
      const unsigned moved = moves({a, b});
      emit({.act = Act::add, .d = d, .a = a, .b = b, .moved = moved});
      set(d, l, sum);
    } else if (kind < 46) {
      fit(a, b);
      const double product = size(a) * size(b);
      const int l = length(a);
      const unsigned moved = moves({a, b});
      emit({.act = Act::mul, .d = d, .a = a, .b = b, .moved = moved});
      set(d, l, product);
    } else if (kind < 52) {
      fit(a, b);
      const int c = chance(50) ? a : b;
      const double result = size(a) * size(b) + size(c);
      const int l = length(a);
      const unsigned moved = moves({a, b, c});
      emit({.act = Act::mul_add, .d = d, .a = a, .b = b, .c = c, .moved = moved});
      set(d, l, result);
    } else if (kind < 85) {
      unary(kind, a, d);
    } else {
      handles(kind, a, d);
    }
    if (full(d)) {
      shrink(d);
    }
  }
  void unary(int kind, int a, int d) {
    const int l = length(a);
    const double s = size(a);
    if (kind < 60) {
      const unsigned moved = moves({a});
      emit({.act = Act::tanh, .d = d, .a = a, .moved = moved});
      set(d, l, std::max(1.0, s));
    } else if (kind < 66) {
      const unsigned moved = moves({a});
      emit({.act = Act::square, .d = d, .a = a, .moved = moved});
      set(d, l, s * s);
    } else if (kind < 70) {
      const float factor = chance(50) ? -0.75f : 1.25f;
      const unsigned moved = moves({a});
      emit({.act = Act::scale, .d = d, .a = a, .factor = factor, .moved = moved});
      set(d, l, s * 1.25);
    } else if (kind < 75) {
      const unsigned moved = moves({a});
      emit({.act = Act::dropout, .d = d, .a = a, .factor = 0.25f, .moved = moved});
      set(d, l, s / 0.75);
    } else if (kind < 79) {
      const unsigned moved = moves({a});
      emit({.act = Act::keep, .d = d, .a = a, .moved = moved});
      set(d, l, 2 * s);
    } else {
      const int second = slot_other_than(d, d);
      const unsigned moved = moves({a});
      emit({.act = Act::split, .d = d, .a = a, .c = second, .moved = moved});
      set(d, l, s * s);
      set(second, l, 3 * s);
      shrink(second);
    }
  }
  void handles(int kind, int a, int d) {
    const int l = length(a);
    const double s = size(a);
    if (kind < 89 && l == Program::kLength) {
      emit({.act = Act::slice, .d = d, .a = a, .b = below(2)});
      set(d, 2, s);
    } else if (kind < 92) {
      emit({.act = Act::detach, .d = d, .a = a});
      set(d, l, s);
    } else if (kind < 94) {
      emit({.act = Act::copy, .d = d, .a = a});
      set(d, l, s);
    } else if (kind < 97) {
      emit({.act = Act::name, .a = a, .b = below(3)});
    } else {
      emit({.act = Act::drop, .a = a});
      length(a) = 0;
    }
  }

  void body(int depth, int steps) {
    for (int i = 0; i < steps && static_cast<int>(program_.text.size()) < 90; ++i) {
      if (depth < max_depth_ && chance(22)) {
        segment(depth, 2 + below(12));
      } else {
        operation();
      }
      if (escaping_ > 0) {
        return;
      }
    }
  }
  void segment(int depth, int steps) {
    const std::vector<int> written_before = std::exchange(written_, {});
    const bool no_gradient_before = no_gradient_;
    no_gradient_ = no_gradient_ || chance(6);
    emit({.act = Act::open, .b = below(3)});
    body(depth + 1, steps);
    if (escaping_ == 0 && chance(4)) {
      escaping_ = 1 + below(depth + 1);
      emit({.act = Act::escape, .b = escaping_});
    } else if (escaping_ == 0) {
      // Locals die; a few values leave, often none that matters (a dead branch).
      const int leave = 1 + below(2);
      if (chance(30)) {
        std::ranges::shuffle(written_, random_);
      }
      std::vector<int> left(written_.end() - std::min<std::ptrdiff_t>(leave, std::ssize(written_)),
                            written_.end());
      for (std::size_t i = 0; i < written_.size(); ++i) {
        if (full(written_[i]) && std::ranges::count(left, written_[i]) == 0 && chance(90)) {
          emit({.act = Act::drop, .a = written_[i]});
          length(written_[i]) = 0;
        }
      }
    }
    emit({.act = Act::close});
    no_gradient_ = no_gradient_before;
    written_.insert(written_.begin(), written_before.begin(), written_before.end());
    escaping_ = std::max(0, escaping_ - 1);
  }

  void losses() {
    no_gradient_ = false;
    auto quiet = [&](Instruction i) { program_.text.push_back(i); };
    if (std::ranges::count_if(length_, [](int l) { return l > 0; }) < 1) {
      quiet({.act = Act::constant, .d = 0});
      set(0, Program::kLength, 1);
    }
    for (int i = below(3); i > 0; --i) {
      quiet({.act = Act::want, .a = full_slot()});
    }
    program_.losses = 1 + below(3);
    program_.first_losses = program_.losses > 1 && chance(50) ? 1 : 0;
    for (int i = 0; i < program_.losses; ++i) {
      const int a = full_slot();
      const int l = length(a);
      const int weight = slot_other_than(a, a);
      quiet({.act = Act::parameter, .d = weight, .b = 0});
      if (l == 2) {
        quiet({.act = Act::slice, .d = weight, .a = weight, .b = below(2)});
      }
      quiet({.act = Act::mul, .d = weight, .a = a, .b = weight});
      quiet({.act = Act::loss, .a = weight, .b = below(2)});
      quiet({.act = Act::drop, .a = weight});
      length(weight) = 0;
      if (chance(50)) {
        quiet({.act = Act::drop, .a = a});
        length(a) = 0;
      }
      if (std::ranges::count_if(length_, [](int n) { return n > 0; }) < 1) {
        program_.losses = i + 1;
        program_.first_losses = std::min(program_.first_losses, program_.losses - 1);
      }
    }
    for (int s = 0; s < Program::kSlots; ++s) {
      if (full(s) && chance(70)) {
        quiet({.act = Act::drop, .a = s});
      }
    }
  }

  Program program_;
  std::mt19937_64 random_;
  std::array<int, Program::kSlots> length_{};
  std::array<double, Program::kSlots> size_{};
  std::vector<int> written_;
  int max_depth_ = 0;
  int escaping_ = 0;
  bool no_gradient_ = false;
};

constexpr const char* kActs[] = {"constant", "shared", "leaf",   "parameter", "add",     "mul",
                                 "mul_add",  "tanh",   "square", "scale",     "dropout", "keep",
                                 "split",    "slice",  "detach", "copy",      "drop",    "name",
                                 "open",     "close",  "escape", "loss",      "want"};

}  // namespace

float Program::number(int micro_batch, std::int64_t n, std::int64_t i) const {
  const auto word =
      philox(seed, static_cast<std::uint64_t>((micro_batch + 1) * 100000 + n * 16 + i));
  return 2 * uniform(word[0]) - 1;
}

Program draw_program(std::uint64_t seed) {
  Program program = Draw(seed).program();
  std::mt19937_64 random(seed + 0x6a09e667f3bcc908u);  // the text of a seed stays what it was
  program.undo = random() % 4 == 0;
  for (int p = 0; p < Program::kParameters; ++p) {
    program.bound.push_back(random() % 4 == 0);
  }
  if (random() % 3 == 0) {
    program.scales = {0.5, -3, 1};
  }
  return program;
}

std::string to_string(const Program& program) {
  std::string text =
      fmt::format("program {}: {} micro-batches, {} losses ({} first, with keep)\n", program.seed,
                  program.micro_batches, program.losses, program.first_losses);
  for (std::size_t p = 0; p < program.trainable.size(); ++p) {
    text += fmt::format("  parameter {} {}{}\n", p, program.trainable[p] ? "trainable" : "frozen",
                        program.bound[p] ? ", its gradient bound" : "");
  }
  text += program.undo ? "  with undo\n" : "";
  text += program.scales.empty() ? "" : "  losses scaled by 0.5, -3, 1 in turn\n";
  int indent = 1;
  for (const Instruction& i : program.text) {
    indent -= i.act == Act::close ? 1 : 0;
    text += std::string(static_cast<std::size_t>(2 * indent), ' ');
    text += fmt::format("{} d={} a={} b={} c={} factor={} moved={}{}\n",
                        kActs[static_cast<std::size_t>(i.act)], i.d, i.a, i.b, i.c, i.factor,
                        i.moved, i.no_gradient ? " no_gradient" : "");
    indent += i.act == Act::open ? 1 : 0;
  }
  return text;
}

namespace {

void draw_offload(std::mt19937_64& random, Policies& policies) {
  auto draw = [&]() -> Offload {
    switch (random() % 3) {
      case 0:
        return offload_ops({"toy_mul", "toy_tanh", "toy_add"});
      case 1:
        return [salt = random()](const Candidate& c) {
          return philox(salt, static_cast<std::uint64_t>(c.ordinal) * 64 + c.op.size())[0] % 2 == 0;
        };
      default:
        return offload_all();
    }
  };
  switch (random() % 4) {
    case 0:
      return;
    case 1:
      policies.offload("s" + std::to_string(random() % 3), draw());
      break;
    default:
      policies.offload("*", draw());
  }
  if (random() % 2 == 0) {
    policies.offload_outside(draw());
  }
  policies.offload_distance(static_cast<int>(random() % 4));
}

}  // namespace

Policies draw_policies(std::mt19937_64& random) {
  auto draw = [&]() -> Policy {
    switch (random() % 6) {
      case 0:
        return keep_inputs();
      case 1:
        return keep_ops({"toy_mul", "toy_tanh"});
      case 2:
        return keep_named({"n0", "n1"}) | keep_ops({"toy_split"});
      default:
        // By op and place, at random but the same for the same question.
        return [salt = random()](const Candidate& c) {
          const auto word = philox(salt, static_cast<std::uint64_t>(c.ordinal) * 64 + c.op.size());
          return static_cast<Keep>(word[0] % 3);
        };
    }
  };
  Policies policies;
  policies.set("s0", draw());
  policies.set("s*", draw());
  draw_offload(random, policies);
  return policies;
}

}  // namespace reprise::testing

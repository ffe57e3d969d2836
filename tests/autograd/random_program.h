// Random programs for the tape: their text, the tape's run of it, and an oracle that shares
// nothing with the tape.
//
// A program is a list of instructions over slots, each of which holds a Variable or nothing. It is
// a step's forward; how the step goes on (losses, keep, micro-batches) is in its other fields.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "autograd/tape.h"

namespace reprise::testing {

enum class Act : std::uint8_t {
  constant,   // d = new constant
  shared,     // d = a constant that lives over both micro-batches (number b)
  leaf,       // d = new leaf with gradient
  parameter,  // d = parameter number b
  add,        // d = a + b
  mul,        // d = a * b
  mul_add,    // d = a * b + c
  tanh,
  square,
  scale,
  dropout,
  keep,    // must_keep
  split,   // d, c = a^2, 3a
  slice,   // d = the first or second half of a: a view
  detach,  // d = detach(a)
  copy,    // d = another handle on a
  drop,    // a = nothing
  name,    // names a
  open,    // a segment begins, its name is s<b>
  close,   // it ends
  escape,  // an exception leaves the b innermost segments; their closes follow
  loss,    // another loss: the sum of a (b: computed in a segment of its own)
  want,    // the gradient of a is asked for
};

struct Instruction {
  Act act;
  int d = 0, a = 0, b = 0, c = 0;
  float factor = 1;
  unsigned moved = 0;  // bit 0: a is moved into the op, bit 1: b, bit 2: c
  bool no_gradient = false;
};

struct Program {
  static constexpr int kSlots = 10;
  static constexpr int kParameters = 4;
  static constexpr int kLength = 4;

  std::uint64_t seed = 0;
  std::vector<Instruction> text;
  std::vector<bool> trainable;
  std::vector<bool> bound;     // the gradient lives in storage of the test's
  bool undo = false;           // of every sweep
  std::vector<double> scales;  // of the losses in turn; empty: 1
  int micro_batches = 1;
  int losses = 0;
  int first_losses = 0;  // swept with keep, before the others
  double scale(std::size_t loss) const { return scales.empty() ? 1 : scales[loss % scales.size()]; }
  // Element i of constant number n of a micro-batch.
  float number(int micro_batch, std::int64_t n, std::int64_t i) const;
};

Program draw_program(std::uint64_t seed);
std::string to_string(const Program& program);

using Numbers = std::vector<float>;
using MaybeNumbers = std::optional<Numbers>;

// What must not depend on the policy.
struct Outcome {
  std::vector<MaybeNumbers> gradients;  // of the parameters
  std::vector<MaybeNumbers> wanted;     // of the last micro-batch
  std::vector<std::string> ready;       // order and expected contributions, of every sweep
  std::vector<MaybeNumbers> handles;    // of the slots, read after the last backward
  bool operator==(const Outcome&) const = default;
};

// What must be the same on meta.
struct Bytes {
  std::int64_t forward_peak = 0, peak = 0, dropped = 0, restored = 0, replayed_records = 0;
  std::int64_t replay_flops = 0, backward_flops = 0;
  std::int64_t host_peak = 0, offloaded = 0, fetched = 0;
  bool operator==(const Bytes&) const = default;
};

struct RunOptions {
  Policies policies;
  bool segments = true;
  Device device = cpu;
  // The sweep of the last micro-batch fails at its k-th op or allocation (from 0); then the step is
  // begun again on the same tape with gradients zeroed.
  std::int64_t fail_at = -1;
  bool fail_allocation = false;
  // Copies to the host and back are done as late as the streams' order allows.
  bool late_copies = false;
  const Outcome* clean = nullptr;  // of the same program without a failure
};

struct RunResult {
  Outcome outcome;
  Bytes bytes;
  bool failed = false;  // the injected failure came to pass
  std::string complaint;
};

// The tape is used as it is, and left empty.
RunResult run_program(const Program& program, const RunOptions& options, Tape& tape);
Policies draw_policies(std::mt19937_64& random);

struct OracleNumbers {
  std::vector<double> value, bound;  // bound: what rounding errors are relative to
};
struct Oracle {
  std::vector<std::optional<OracleNumbers>> gradients, wanted, handles;
};
Oracle run_oracle(const Program& program);

}  // namespace reprise::testing

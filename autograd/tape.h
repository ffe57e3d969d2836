// The tape: records in execution order, segments, and the sweep. See docs/architecture.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "autograd/parameter.h"
#include "autograd/policy.h"
#include "autograd/variable.h"

namespace reprise {

// Counters since the tape was made or reset; those of the sweep are of the last one.
struct TapeReport {
  std::int64_t records = 0;
  std::int64_t segments = 0;
  std::int64_t forward_flops = 0, replay_flops = 0, backward_flops = 0;
  std::int64_t replayed_records = 0;
  std::int64_t dropped_bytes = 0;    // of values that the tape let go and a replay can restore
  std::int64_t restored_bytes = 0;   // by replays
  std::int64_t offloaded_bytes = 0;  // of values that left for host memory
  std::int64_t fetched_bytes = 0;    // of those that came back from there
  std::int64_t pinned_bytes = 0;     // held only by the user's handles when the sweep began
};

class TapeState;  // records, values, segments: autograd/tape_state.h

class Tape {
 public:
  Tape();
  ~Tape();
  Tape(const Tape&) = delete;

  // Forgets everything; Variables keep their tensors but are stale.
  void reset();
  const TapeReport& report() const;
  // While on, every op's floating outputs are looked at as it runs forward, and the first that is
  // not finite throws Error: "[silu] output 0 of shape [2, 3] is not finite, in segment layers.1".
  // Slow: for finding where a loss became NaN. Host tensors only.
  void check_finite(bool on);

  // Makes the tape current on this thread, with these policies for the segments opened meanwhile.
  class Scope {
   public:
    explicit Scope(Tape& tape, Policies policies = {});
    ~Scope();
    Scope(const Scope&) = delete;

   private:
    Tape* before_;
    Tape& tape_;
    Policies policies_before_;
  };
  static Tape* current();
  // The innermost open segment, numbered from 1 in the order in which they are opened until the
  // tape is reset; 0 outside of segments.
  std::int64_t open_segment() const;
  const Policies& policies() const;

  TapeState& state() { return *state_; }
  const TapeState& state() const { return *state_; }

 private:
  std::unique_ptr<TapeState> state_;
};

// Ops called meanwhile on this thread need no gradient.
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;

 private:
  bool before_;
};
template <class F>
decltype(auto) no_grad(F&& f) {
  NoGrad guard;
  return std::forward<F>(f)();
}

// Opens a segment on the current tape; closes it at the end of its life, also when that is an
// exception. Without a current tape it does nothing. When closing throws (a policy did) the tape is
// reset, as nothing that it holds could be swept any more, and the exception goes on; an exception
// that is under way already is the one that goes on.
class OpenSegment {
 public:
  explicit OpenSegment(std::string_view name);
  ~OpenSegment() noexcept(false);
  OpenSegment(const OpenSegment&) = delete;

 private:
  Tape* tape_;
  int exceptions_;  // under way when it was opened
};

// Runs f(args...) once, now, and returns what it returns. The values that its ops made may be
// dropped, as the policy for `name` says; backward replays the records, never f.
template <class F, class... A>
decltype(auto) checkpoint(std::string_view name, F&& f, A&&... args) {
  OpenSegment segment(name);
  return std::invoke(std::forward<F>(f), std::forward<A>(args)...);
}

struct Ready {
  Parameter* parameter;
  int expected;            // contributions of this sweep
  std::int64_t last_read;  // record after which its data may change; -1: not read any more
};

// A term of a parameter's gradient.
struct Contribution {
  const Parameter* parameter;
  std::int64_t record;  // -1: the parameter is a loss itself
  std::string op;       // of the record
  std::string segment;  // that it is in, from the outermost: "block.3/attention"; "" outside
};

struct Plan {
  std::vector<Ready> order;           // in the order of on_ready; expected == 0 first
  std::vector<Parameter*> unreached;  // of BackwardOptions::parameters, trainable, expected 0
  // With BackwardOptions::list_reads: what replays and backwards read, in that order, frozen
  // parameters too; one that is read several times in a row is there once. Where a handle of the
  // user's spares a replay some records it holds their reads all the same.
  std::vector<Parameter*> reads;
  // In the order of the sweep. Valid during the sweep, whatever has run of it.
  std::function<std::vector<Contribution>()> contributions;
};

// The terms of one parameter for a message: "2 contributions: mul (record 7, segment block.3),
// ..."; the first 8.
std::string contributors(std::span<const Contribution> all, const Parameter& parameter);

struct BackwardOptions {
  // The tape and its values stay for another backward.
  bool keep = false;
  // What an upstream gradient would be; 1 when empty, else one factor per loss.
  std::vector<double> scale;
  // Given, the plan covers them all, and names those that the losses do not reach.
  std::span<Parameter* const> parameters;
  bool list_reads = false;
  // A trainable parameter of those that the losses do not reach is an Error that names them all,
  // thrown before on_plan.
  bool reach_all = false;
  std::function<void(const Plan&)> on_plan;      // before any gradient is touched
  std::function<void(Parameter&)> on_ready;      // its gradient is complete
  std::function<void(Parameter&)> on_last_read;  // its data may be updated, freed, resharded
  // Copies of accumulated gradients are kept until the sweep has ended, and restored if it fails.
  bool undo = false;
};

// Gradients of the sum of the losses (scalars on one tape), added to the parameters' gradients.
// Throws Error before anything is touched for all that the caller can do wrong; if the sweep
// fails, every parameter gradient is untouched or complete and all are stale.
void backward(std::span<const Variable> losses, const BackwardOptions& options = {});
void backward(const Variable& loss, const BackwardOptions& options = {});

// Gradients with respect to chosen values (Variable::leaf or interior); undefined where the losses
// do not depend on one. Parameters' gradients are added to as by backward(); a parameter itself as
// a chosen value is an Error: what its gradient() holds is the sum over sweeps.
std::vector<Tensor> grad(std::span<const Variable> losses, std::span<const Variable> wrt,
                         const BackwardOptions& options = {});

// A table for people: per segment the bytes held (made outside of it) and kept (made inside), what
// of them is in host memory by now, and records and FLOPs of its replay were nothing inside pinned;
// per parameter who reads it and how often; the values that only handles keep, by name. To be
// called before backward, which lets go of all that it tells: in BackwardOptions::on_plan at the
// latest.
std::string explain(const Tape& tape);

}  // namespace reprise

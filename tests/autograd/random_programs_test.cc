// Random programs against the run that keeps everything, the run without segments, the dry run on
// meta and a double-precision oracle.
//
// REPRISE_SEED (or --seed N) is the first program's seed, REPRISE_PROGRAMS (or --programs N) their
// number: a failing program is run again by its own seed with --programs 1.
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <string>

#include <fmt/format.h>

#include "tests/autograd/random_program.h"
#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

std::uint64_t option(const char* flag, const char* variable, std::uint64_t otherwise) {
  const auto arguments = ::testing::internal::GetArgvs();
  for (std::size_t i = 1; i + 1 < arguments.size(); ++i) {
    if (arguments[i] == flag) {
      return std::stoull(arguments[i + 1]);
    }
  }
  const char* value = std::getenv(variable);
  return value != nullptr ? std::stoull(value) : otherwise;
}

// Empty when `ours` is within rounding of the oracle's.
std::string differs(const std::vector<MaybeNumbers>& ours,
                    const std::vector<std::optional<OracleNumbers>>& oracle, const char* what) {
  if (ours.size() != oracle.size()) {
    return fmt::format("{} {} and of the oracle {}\n", ours.size(), what, oracle.size());
  }
  for (std::size_t n = 0; n < ours.size(); ++n) {
    if (ours[n].has_value() != oracle[n].has_value()) {
      return fmt::format("{} {} is there in {} only\n", what, n, ours[n] ? "ours" : "the oracle");
    }
    for (std::size_t i = 0; ours[n] && i < ours[n]->size(); ++i) {
      const double expected = oracle[n]->value[i], actual = (*ours[n])[i];
      const double tolerance = 1e-5 * oracle[n]->bound[i] + 1e-9;
      if (!(std::abs(actual - expected) <= tolerance)) {
        return fmt::format("{} {}[{}] is {}, the oracle has {} +- {}\n", what, n, i, actual,
                           expected, tolerance);
      }
    }
  }
  return {};
}

std::string differs(const Outcome& a, const Outcome& b) {
  std::string what;
  what += a.gradients != b.gradients ? "gradients " : "";
  what += a.wanted != b.wanted ? "wanted-gradients " : "";
  what += a.ready != b.ready ? "ready-order " : "";
  what += a.handles != b.handles ? "handles " : "";
  return what;
}

struct Totals {
  std::int64_t runs = 0, records = 0, replayed = 0, dropped = 0, failures = 0, tight = 0,
               gradients = 0, fetched = 0;
};

class Checker {
 public:
  explicit Checker(Totals& totals) : totals_(totals) {}

  // What is wrong with the program; empty when nothing is.
  std::string check(std::uint64_t seed) {
    program_ = draw_program(seed);
    std::mt19937_64 random(seed ^ 0x9e3779b97f4a7c15u);
    const Outcome plain = run("without segments", {.policies = {}, .segments = false}).outcome;
    const Oracle oracle = run_oracle(program_);
    problem_ += differs(plain.gradients, oracle.gradients, "gradient");
    problem_ += differs(plain.wanted, oracle.wanted, "wanted gradient");
    problem_ += differs(plain.handles, oracle.handles, "handle");
    note(oracle);
    for (int draw = -1; draw < 3 && problem_.empty(); ++draw) {
      RunOptions options;
      options.policies = draw < 0 ? Policies::named("keep-all") : draw_policies(random);
      const std::string name = draw < 0 ? "keep-all" : fmt::format("policy draw {}", draw);
      const RunResult real = run(name, options);
      problem_ += prefixed(name, differs(real.outcome, plain));
      options.device = meta;
      const Bytes predicted = run(name + " on meta", options).bytes;
      if (problem_.empty() && !(predicted == real.bytes)) {
        problem_ += fmt::format(
            "{}: predicted and measured: forward peak {} {}, peak {} {}, dropped {} {}, restored "
            "{} {}, replayed records {} {}, in host memory {} {}, left {} {}, fetched {} {}\n",
            name, predicted.forward_peak, real.bytes.forward_peak, predicted.peak, real.bytes.peak,
            predicted.dropped, real.bytes.dropped, predicted.restored, real.bytes.restored,
            predicted.replayed_records, real.bytes.replayed_records, predicted.host_peak,
            real.bytes.host_peak, predicted.offloaded, real.bytes.offloaded, predicted.fetched,
            real.bytes.fetched);
      }
      totals_.replayed += real.bytes.replayed_records;
      totals_.dropped += real.bytes.dropped;
      totals_.fetched += real.bytes.fetched;
      if (draw == 1 && real.bytes.offloaded > 0) {
        options.device = cpu;
        options.late_copies = true;
        const std::string late = name + " with late copies";
        problem_ += prefixed(late, differs(run(late, options).outcome, plain));
        options.late_copies = false;
      }
      if (draw == static_cast<int>(seed % 6) && problem_.empty()) {
        options.device = cpu;
        options.late_copies = seed % 2 == 0;
        options.fail_at = static_cast<std::int64_t>(random() % 16);
        options.fail_allocation = random() % 2 == 0;
        options.clean = &plain;
        const RunResult failed = run(name + " with a failure", options);
        totals_.failures += failed.failed ? 1 : 0;
        problem_ += prefixed(name + " after a failure", differs(failed.outcome, plain));
      }
    }
    return problem_;
  }
  std::string text() const { return to_string(program_); }

 private:
  static std::string prefixed(const std::string& name, const std::string& what) {
    return what.empty() ? "" : name + " differs from the run without segments: " + what + "\n";
  }
  RunResult run(const std::string& name, const RunOptions& options) {
    ++totals_.runs;
    RunResult result;
    try {
      result = run_program(program_, options, tape_);
    } catch (const std::exception& error) {
      problem_ += name + " threw: " + error.what() + "\n";
      tape_.reset();
      allocator(cpu).set_fault(nullptr);
      allocator(host_of(cpu)).set_fault(nullptr);
      return result;
    }
    if (!result.complaint.empty()) {
      problem_ += name + ": " + result.complaint;
    }
    return result;
  }
  // How much the oracle's tolerance leaves: bounds far above the gradient check nothing.
  void note(const Oracle& oracle) {
    for (const auto& g : oracle.gradients) {
      for (std::size_t i = 0; g && i < g->value.size(); ++i) {
        ++totals_.gradients;
        totals_.tight += 1e-5 * g->bound[i] < 1e-2 * std::abs(g->value[i]) ? 1 : 0;
      }
    }
  }

  Totals& totals_;
  Program program_;
  std::string problem_;
  static inline Tape tape_;  // one tape for all: what is left of a program shows in the next
};

class RandomPrograms : public TapeTest, public ::testing::WithParamInterface<int> {};

// Four shards, so that they can run side by side.
constexpr int kShards = 4;

TEST_P(RandomPrograms, AgreeUnderEveryPolicyWithTheDryRunAndWithTheOracle) {
  const std::uint64_t first = option("--seed", "REPRISE_SEED", 20'000'000);
  const std::uint64_t count = option("--programs", "REPRISE_PROGRAMS", 20'000);
  const std::uint64_t begin = count * static_cast<std::uint64_t>(GetParam()) / kShards;
  const std::uint64_t end = count * static_cast<std::uint64_t>(GetParam() + 1) / kShards;
  std::cout << "programs " << first + begin << " to " << first + end << "\n";
  Totals totals;
  for (std::uint64_t i = begin; i < end; ++i) {
    Checker checker(totals);
    const std::string problem = checker.check(first + i);
    ASSERT_EQ(problem, "") << checker.text() << "again: --seed " << first + i << " --programs 1";
  }
  std::cout << totals.runs << " runs, " << totals.replayed << " replayed records, "
            << totals.dropped << " bytes dropped, " << totals.fetched << " brought back, "
            << totals.failures << " failures injected, " << totals.tight << " of "
            << totals.gradients << " derivatives to 1%\n";
  if (end - begin >= 1000) {
    EXPECT_GT(totals.fetched, static_cast<std::int64_t>(end - begin) * 16);
    EXPECT_GT(totals.replayed, static_cast<std::int64_t>(end - begin) * 5);
    EXPECT_GT(totals.failures, static_cast<std::int64_t>(end - begin) / 10);
    EXPECT_GT(totals.tight, totals.gradients / 2);
  }
}

INSTANTIATE_TEST_SUITE_P(Shards, RandomPrograms, ::testing::Range(0, kShards));

}  // namespace
}  // namespace reprise::testing

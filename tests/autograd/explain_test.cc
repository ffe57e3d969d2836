// What explain() prints, to the letter, and what a dry run gives it.
#include <optional>

#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

class Explain : public TapeTest {
 protected:
  // Two nested segments, of which the inner keeps its tanh; a value that a handle pins.
  Variable forward(Device device) {
    Variable x(Tensor::full({4}, DType::f32, 1, device));
    x = checkpoint("outer", [&] {
      Variable y = toy_mul(x, *w_);
      y = checkpoint("inner", [&] { return toy_square(toy_tanh(toy_mul(y, *w_))); });
      pinned_ = named(toy_add(y, *frozen_), "sum");
      return toy_square(toy_tanh(pinned_));
    });
    return toy_sum(toy_mul(x, *w_));
  }
  void make_parameters(Device device) {
    w_.emplace("block.weight", Tensor::full({4}, DType::f32, 0.5, device));
    frozen_.emplace("block.bias", Tensor::full({4}, DType::f32, 2, device), false);
  }
  static Policies policies() { return Policies().set("inner", keep_ops({"toy_tanh"})); }

  std::optional<Parameter> w_, frozen_;
  Variable pinned_;
};

// The outer segment's replay: mul, the inner mul, tanh and square, add, tanh; nobody asks for its
// last square. Then the inner one has its start and its tanh, and replays nothing.
constexpr const char* kExpected =
    "segment                           records     held bytes     kept bytes  in host bytes  "
    "replays   replay FLOPs\n"
    "outer                                   7             16              0              0        "
    "6             24\n"
    "  inner                                 3             16             16              0        "
    "0              0\n"
    "\n"
    "parameter                                 reads  read by\n"
    "block.weight                                  3  toy_mul x1, toy_mul in inner x1, toy_mul in "
    "outer x1\n"
    "block.bias                                    1  toy_add in outer x1 (frozen)\n"
    "\n"
    "pinned by handles: 20 bytes\n"
    "  sum (toy_add) 16 bytes\n"
    "  unnamed (toy_sum) 4 bytes\n";

TEST_F(Explain, NamesSegmentsParametersAndPinnedValues) {
  make_parameters(cpu);
  Tape tape;
  Tape::Scope scope(tape, policies());
  const Variable loss = forward(cpu);
  EXPECT_EQ(explain(tape), kExpected);
  EXPECT_EQ(explain(tape), kExpected) << "it changes nothing";
  backward(loss);
  EXPECT_EQ(tape.report().pinned_bytes, 16 + 4);
  EXPECT_EQ(tape.report().replay_flops, 24 - 8) << "the sum is there, and what only it needs";
}

TEST_F(Explain, CountsWhatAReplayExecutesWhenNothingIsPinned) {
  make_parameters(cpu);
  Tape tape;
  Tape::Scope scope(tape, policies());
  const Variable loss = forward(cpu);
  pinned_ = Variable();
  const std::string text = explain(tape);
  EXPECT_NE(text.find("      6             24\n"), std::string::npos) << text;
  EXPECT_NE(text.find("pinned by handles: 4 bytes\n"), std::string::npos) << text;
  backward(loss);
  EXPECT_EQ(tape.report().replay_flops, 24);
  EXPECT_EQ(tape.report().pinned_bytes, 4);
}

TEST_F(Explain, NamesAViewsBufferByEveryName) {
  make_parameters(cpu);
  Tape tape;
  Tape::Scope scope(tape);
  const Variable view = named(toy_slice(named(toy_square(*w_), "whole"), 0, 1), "part");
  const std::string text = explain(tape);
  EXPECT_NE(text.find("  whole, part (toy_square) 16 bytes\n"), std::string::npos) << text;
}

TEST_F(Explain, ADryRunGivesTheSameTape) {
  make_parameters(meta);
  std::string text;
  const StepReport report = dry_run([&] { return forward(meta); }, policies(),
                                    [&](const Tape& tape) { text = explain(tape); });
  EXPECT_EQ(text, kExpected);
  EXPECT_EQ(report.tape.pinned_bytes, 16 + 4);
}

TEST_F(Explain, ATapeWithoutRecordsHasOnlyTheHeadings) {
  Tape tape;
  EXPECT_EQ(
      explain(tape),
      "segment                           records     held bytes     kept bytes  in host bytes  "
      "replays   replay FLOPs\n"
      "\n"
      "parameter                                 reads  read by\n"
      "\n"
      "pinned by handles: 0 bytes\n");
}

}  // namespace
}  // namespace reprise::testing

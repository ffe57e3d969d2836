// Under which segment the allocators count the bytes: while it is open, and while it is replayed.
#include <optional>
#include <stdexcept>

#include "tests/autograd/tape_fixture.h"

namespace reprise::testing {
namespace {

class Labels : public TapeTest {
 protected:
  static std::string label(Device device = cpu) {
    std::string now = allocator(device).set_segment("");
    allocator(device).set_segment(now);
    return now;
  }
  static std::int64_t peak(const std::string& segment, Device device = cpu) {
    const auto peaks = allocator(device).report().peak_by_segment;
    const auto it = peaks.find(segment);
    return it == peaks.end() ? 0 : it->second;
  }
  ~Labels() override {
    EXPECT_EQ(label(cpu), "");
    EXPECT_EQ(label(meta), "");
  }

  Tape tape_;
  Parameter w_{"w", vec({0.5f, 2})};
};

TEST_F(Labels, CheckpointCountsForwardAndReplayUnderTheSegment) {
  for (const Device device : {cpu, meta}) {
    Parameter w("w", Tensor::full({16}, DType::f32, 0.5, device));
    Tape::Scope scope(tape_);
    allocator(device).reset_peak();
    Variable loss;
    {
      // Three values of 64 bytes are made in "labels.a", of which two are alive at one time.
      Variable x = checkpoint("labels.a", [&] {
        Variable y = toy_square(w);
        y = toy_tanh(y);
        return toy_tanh(y);
      });
      EXPECT_EQ(peak("labels.a", device), 128);
      EXPECT_EQ(peak("labels.b", device), 0);
      x = checkpoint("labels.b", [&] { return toy_tanh(x); });
      EXPECT_EQ(peak("labels.b", device), 64);
      loss = toy_sum(x);
    }
    allocator(device).reset_peak();
    EXPECT_EQ(peak("labels.a", device), 64) << "what labels.b starts from";
    EXPECT_EQ(peak("labels.b", device), 0);
    backward(loss);
    EXPECT_EQ(peak("labels.a", device), 128) << "replayed, two at one time";
    EXPECT_EQ(peak("labels.b", device), 64);
    EXPECT_EQ(tape_.report().replayed_records, 4);
  }
}

TEST_F(Labels, NestedSegmentsAndTapesGiveTheLabelBack) {
  Tape::Scope scope(tape_);
  checkpoint("outer", [&] {
    checkpoint("inner", [&] { EXPECT_EQ(label(), "inner"); });
    EXPECT_EQ(label(), "outer");
    Tape other;
    Tape::Scope nested(other);
    checkpoint("of the other tape", [&] { EXPECT_EQ(label(meta), "of the other tape"); });
    EXPECT_EQ(label(), "outer");
    EXPECT_EQ(label(meta), "outer");
  });
}

TEST_F(Labels, AThrowingCallableGivesTheLabelBack) {
  Tape::Scope scope(tape_);
  EXPECT_THROW(
      checkpoint("outer", [&] { checkpoint("inner", [] { throw std::runtime_error("no"); }); }),
      std::runtime_error);
  EXPECT_EQ(label(), "");
}

TEST_F(Labels, AResetWithOpenSegmentsGivesTheLabelBack) {
  Tape::Scope scope(tape_);
  checkpoint("outer", [&] {
    checkpoint("inner", [&] {
      tape_.reset();
      EXPECT_EQ(label(), "");
    });
  });
  {
    std::optional<Tape> gone(std::in_place);
    Tape::Scope nested(*gone);
    OpenSegment open("of a tape that ends first");
    gone->reset();
    EXPECT_EQ(label(), "");
  }
}

TEST_F(Labels, AReplayGivesEachDeviceItsLabelBackAlsoWhenItThrows) {
  Tape::Scope scope(tape_);
  allocator(cpu).set_segment("mine");
  for (bool fails : {false, true}) {
    Variable loss = toy_sum(checkpoint("s", [&] { return toy_tanh(toy_tanh(w_)); }));
    if (fails) {
      ToyHook::call = [&](std::string_view, bool backward) {
        if (!backward) {
          EXPECT_EQ(label(), "s");
          EXPECT_EQ(label(meta), "s");
          throw std::runtime_error("no");
        }
      };
      EXPECT_THROW(backward(loss), std::runtime_error);
    } else {
      backward(loss);
    }
    EXPECT_EQ(label(cpu), "mine");
    EXPECT_EQ(label(meta), "");
  }
  allocator(cpu).set_segment("");
}

}  // namespace
}  // namespace reprise::testing

// Wrong ids, labels and row numbers in the memory of a device: named where the host waits, absent
// for the kernels.
#include "core/device_faults.h"

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#include "kernels/attention.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/rows.h"
#include "kernels/tokens.h"
#include "tests/error_of.h"
#include "tests/op_case.h"
#include "tests/simt/device_memory.h"

namespace reprise::testing {
namespace {

constexpr Device kDevice{DeviceKind::cuda, 0};

using Numbers = std::vector<std::int64_t>;

Tensor of(const Numbers& numbers, Device device = kDevice) {
  return Tensor::from(numbers, {static_cast<std::int64_t>(numbers.size())}, device);
}
Tensor drawn(const Shape& shape, Device device = kDevice) {
  return draw_normal(7, shape, DType::f32, device);
}
Tensor f32(const Shape& shape) {
  return Tensor::empty(shape, DType::f32, kDevice);
}
std::string found() {
  return error_of([] { cuda_synchronize(kDevice); });
}

// What the host says of a call of the op, after the op has returned.
void expect_found(const std::function<void()>& call, const std::string& message) {
  for (int schedule = 0; schedule < schedule_count(kDevice); ++schedule) {
    set_schedule(kDevice, schedule);
    EXPECT_EQ(error_of(call), "no error");
    EXPECT_EQ(found(), message) << "schedule " << schedule;
    EXPECT_EQ(found(), "no error") << "said twice";
  }
  set_schedule(kDevice, 0);
}

TEST(DeviceFaults, IdsOutOfRangeAreNamed_cuda) {
  const Tensor table = drawn({50, 12}), ids = of({1, 49, 7, 50, -1, 99});
  expect_found(
      [&] {
        kernels::embedding(ids, table, f32({6, 12}));
      },
      "[embedding] id at position 3 must be in [0, V) = [0, 50), got 50");
  expect_found(
      [&] {
        kernels::embedding_gradient(ids, drawn({6, 12}), -1, f32({50, 12}), false);
      },
      "[embedding] id at position 3 must be in [0, V) = [0, 50), got 50");
  Numbers many(5001, 3);
  many[4097] = -100;
  many[4999] = 50;
  expect_found(
      [&] {
        kernels::embedding(of(many), table, f32({5001, 12}));
      },
      "[embedding] id at position 4097 must be in [0, V) = [0, 50), got -100");
}

TEST(DeviceFaults, AWrongIdHasARowOfZerosAndNoGradient_cuda) {
  const Tensor table = drawn({5, 12}), dy = drawn({4, 12});
  const Tensor y = f32({4, 12}), dtable = f32({5, 12});
  kernels::embedding(of({4, 5, 0, -1}), table, y);
  kernels::embedding_gradient(of({4, 5, 0, -1}), dy, -1, dtable, false);
  EXPECT_NE(found(), "no error");
  const Array rows = to_array(y), from = to_array(table), sums = to_array(dtable),
              upstream = to_array(dy);
  for (std::int64_t c = 0; c < 12; ++c) {
    EXPECT_EQ(rows[c], from[4 * 12 + c]);
    EXPECT_EQ(rows[12 + c], 0);
    EXPECT_EQ(rows[36 + c], 0);
    EXPECT_EQ(sums[c], upstream[24 + c]);
    EXPECT_EQ(sums[4 * 12 + c], upstream[c]);
    EXPECT_EQ(sums[2 * 12 + c], 0);
  }
}

TEST(DeviceFaults, LabelsOutOfRangeAreNamedAndIgnored_cuda) {
  const Tensor x = drawn({4, 9}), lse = f32({4}), loss = f32({}), dx = f32({4, 9});
  const Tensor wrong = of({8, 9, -100, 2}), ignored = of({8, -100, -100, 2});
  expect_found([&] { kernels::cross_entropy(x, wrong, loss, lse); },
               "[cross_entropy] label of row 1 must be -100 or in [0, V) = [0, 9), got 9");
  kernels::cross_entropy(x, wrong, loss, lse);
  EXPECT_NE(found(), "no error");
  const float with_wrong = loss.item<float>();
  kernels::cross_entropy(x, ignored, loss, lse);
  EXPECT_EQ(with_wrong, loss.item<float>());
  const Tensor one = Tensor::full({}, DType::f32, 1, kDevice);
  expect_found([&] { kernels::cross_entropy_backward(one, x, wrong, lse, dx); },
               "[cross_entropy_backward] label of row 1 must be -100 or in [0, V) = [0, 9), got 9");
  const Tensor hidden = drawn({4, 8}), head = drawn({9, 8});
  const Tensor dhidden = f32({4, 8}), dhead = f32({9, 8});
  expect_found(
      [&] {
        kernels::linear_cross_entropy(hidden, head, of({8, 3, -7, 9}), loss, dhidden, dhead);
      },
      "[linear_cross_entropy] label of row 2 must be -100 or in [0, V) = [0, 9), got -7");
}

// An index that is in range may be the one that is ignored.
TEST(DeviceFaults, ItemsAreCountedByTheDevice_cuda) {
  const kernels::CrossEntropyOptions options{.ignore_index = 3};
  const Numbers labels = {3, 1, 3, 8, 0};
  float losses[2];
  for (const Device device : {cpu, kDevice}) {
    const Tensor loss = Tensor::empty({}, DType::f32, device);
    kernels::cross_entropy(drawn({5, 9}, device), of(labels, device), loss,
                           Tensor::empty({5}, DType::f32, device), options);
    losses[device == cpu ? 0 : 1] = loss.item<float>();
  }
  EXPECT_NEAR(losses[0], losses[1], 1e-6);
  const Tensor none = Tensor::empty({}, DType::f32, kDevice);
  kernels::cross_entropy(drawn({0, 9}), of({}), none, f32({0}), options);
  EXPECT_TRUE(std::isnan(none.item<float>()));
}

TEST(DeviceFaults, RowNumbers_cuda) {
  const auto check = [](const Numbers& rows, std::int64_t count, const std::string& message) {
    expect_found([&] { kernels::expect_distinct_rows("put_rows", of(rows), count, kDevice); },
                 message);
  };
  check({0, 3, 5}, 6, "no error");
  check({5, 0, 3}, 6, "no error");
  check({5, 6, 3, -1}, 6, "[put_rows] row number at position 1 must be in [0, 6), got 6");
  check({5, 3, 0, 4, 3, 5, 3}, 6,
        "[put_rows] row 3 is chosen at positions 1 and 4, each row may be once");
  Numbers many;
  for (std::int64_t i = 0; i < 1000; ++i) {
    many.push_back(999 - i);
  }
  check(many, 1000, "no error");
  many[900] = many[17];
  check(many, 1000, "[put_rows] row 982 is chosen at positions 17 and 900, each row may be once");
}

TEST(DeviceFaults, RowsThatAreNotThereArePassedOver_cuda) {
  const Tensor x = drawn({6, 8}), y = drawn({3, 8}), rows = of({1, 6, -1});
  const Tensor taken = f32({3, 8}), put = f32({6, 8}), dx = f32({6, 8});
  kernels::take_rows(x, rows, taken);
  kernels::put_rows(x, rows, y, put);
  kernels::take_rows_gradient(rows, y, dx);
  const Array in = to_array(x), narrow = to_array(y), got = to_array(taken), out = to_array(put),
              gradient = to_array(dx);
  for (std::int64_t i = 0; i < 48; ++i) {
    const bool chosen = i / 8 == 1;
    EXPECT_EQ(out[i], chosen ? narrow[i - 8] : in[i]);
    EXPECT_EQ(gradient[i], chosen ? narrow[i - 8] : 0);
    if (i < 24) {
      EXPECT_EQ(got[i], i < 8 ? in[8 + i] : 0);
    }
  }
  kernels::put_rows_gradient(rows, x, dx, false);
  kernels::put_rows_gradient(rows, x, dx, true);
  const Array twice = to_array(dx);
  for (std::int64_t i = 0; i < 48; ++i) {
    EXPECT_EQ(twice[i], i / 8 == 1 ? 0 : 2 * in[i]);
  }
}

TEST(DeviceFaults, WhatAttentionReliesOn_cuda) {
  const Tensor q = drawn({2, 3, 1, 8});
  const auto attend = [&](const Numbers& mask, const Numbers& documents,
                          const kernels::AttentionOptions& options) {
    const auto given = [](const Numbers& numbers) {
      return numbers.empty() ? Tensor() : of(numbers).reshape({2, 3});
    };
    return [&, options, mask = given(mask), documents = given(documents)] {
      kernels::attention({q, q, q, mask, documents}, f32({2, 3, 1, 8}), f32({2, 1, 3}), options);
    };
  };
  expect_found(attend({}, {0, 1, 1, 4, 3, 5}, {.scale = 1, .causal = true}),
               "[attention] documents must not decrease along T, got 3 after 4 at [1, 1]");
  expect_found(attend({}, {0, 1, 1, 0, 0, 2}, {.scale = 1, .causal = true, .most_documents = 3}),
               "[attention] most_documents must not be less than there are, got 3 for 4");
  expect_found(attend({1, 1, 0, 1, 0, 1}, {}, {.scale = 1, .padded_right = true}),
               "[attention] padded_right must hold, but the mask is 1 at [1, 2]");
  expect_found(attend({1, 1, 0, 0, 1, 1}, {}, {.scale = 1, .padded_right = true}),
               "[attention] padded_right must hold, but the mask is 0 at [1, 0]");
  expect_found(attend({1, 1, 0, 0, 1, 1}, {}, {.scale = 1}), "no error");
}

TEST(DeviceFaults, TheFirstOpIsNamedWhereverTheHostReads_cuda) {
  const Tensor table = drawn({5, 4});
  kernels::embedding(of({0, 7}), table, f32({2, 4}));
  kernels::embedding(of({9}), table, f32({1, 4}));
  EXPECT_EQ(error_of([&] { (void)table.to_vector<float>(); }),
            "[embedding] id at position 1 must be in [0, V) = [0, 5), got 7");
  EXPECT_EQ(error_of([&] { (void)table.to_vector<float>(); }), "no error");
}

TEST(DeviceFaults, SitesAreTheSameForTheSameText_cuda) {
  const FaultText text = [](const DeviceFault&) { return std::string("of a test"); };
  const std::int64_t first = fault_site("one", text), second = fault_site("another", text);
  EXPECT_NE(first, second);
  EXPECT_EQ(fault_site("one", text), first);
  DeviceFault fault{.site = second};
  EXPECT_EQ(error_of([&] { throw_fault(fault); }), "[another] of a test");
  EXPECT_EQ(fault.site, 0);
  throw_fault(fault);
}

// REPRISE_CUDA_CHECKED=1: the op itself throws.
TEST(CheckedMode, WrongNumbersAreNamedByTheOp) {
  if (!cuda_checked()) {
    GTEST_SKIP() << "not in checked mode";
  }
  const Tensor table = drawn({5, 4});
  EXPECT_EQ(error_of([&] {
              kernels::embedding(of({0, 7}), table, f32({2, 4}));
            }),
            "[embedding] id at position 1 must be in [0, V) = [0, 5), got 7");
  EXPECT_EQ(error_of([&] {
              kernels::expect_distinct_rows("add_rows", of({1, 1}), 5, kDevice);
            }),
            "[add_rows] row 1 is chosen at positions 0 and 1, each row may be once");
  const Tensor q = drawn({1, 2, 1, 8});
  EXPECT_EQ(error_of([&] {
              kernels::attention({q, q, q, {}, of({4, 3}).reshape({1, 2})}, f32({1, 2, 1, 8}),
                                 f32({1, 1, 2}), {.scale = 1, .causal = true});
            }),
            "[attention] documents must not decrease along T, got 3 after 4 at [0, 1]");
  EXPECT_EQ(found(), "no error");
}

TEST(CheckedMode, AFaultIsThatOfTheFusedAttentionThatMadeIt) {
  if (!cuda_checked()) {
    GTEST_SKIP() << "not in checked mode";
  }
  const Tensor q = draw_normal(3, {2, 5, 2, 8}, DType::bf16, kDevice);
  const auto attend = [&] {
    kernels::attention({q, q, q, {}, {}}, Tensor::empty(q.shape(), q.dtype(), kDevice),
                       f32({2, 2, 5}), {.scale = 1, .causal = true});
  };
  DeviceMemory::instance().next_status = 700;
  EXPECT_EQ(error_of(attend),
            "[attention] CUDA: status 700, asked for q [2, 5, 2, 8], k and v [2, 5, 2, 8] by a "
            "fused kernel");
  EXPECT_EQ(error_of(attend), "no error");
}

TEST(Tokens, LabelsAndPositionsAreThoseOfTheCpu_cuda) {
  for (const Shape shape : {Shape{2, 7}, Shape{3, 1}, Shape{1, 700}, Shape{0, 4}, Shape{2, 0}}) {
    Numbers labels;
    for (std::int64_t i = 0; i < shape.numel(); ++i) {
      labels.push_back(i * i % 97);
    }
    Numbers results[2], positions[2];
    for (const Device device : {cpu, kDevice}) {
      const Tensor targets = Tensor::empty({shape.numel()}, DType::i64, device);
      const Tensor ends = shape.numel() > 3 ? of({0, 3}, device) : Tensor();
      kernels::next_labels(Tensor::from(labels, shape, device), ends, targets);
      results[device == cpu ? 0 : 1] = targets.to_vector<std::int64_t>();
      const Tensor counted = Tensor::empty(shape, DType::i64, device);
      kernels::count_positions(counted);
      positions[device == cpu ? 0 : 1] = counted.to_vector<std::int64_t>();
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(positions[0], positions[1]);
    if (shape == Shape{2, 7}) {
      EXPECT_EQ(results[1], (Numbers{-100, 4, 9, -100, 25, 36, -100, 64, 81, 3, 24, 47, 72, -100}));
      EXPECT_EQ(positions[1], (Numbers{0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6}));
    }
  }
}

TEST(Tokens, Mistakes_cuda) {
  const Tensor labels = Tensor::zeros({2, 3}, DType::i64, cpu);
  const auto says = [](const std::function<void()>& call) { return error_of(call); };
  EXPECT_EQ(says([&] { kernels::next_labels(of({1}, cpu), {}, of({1}, cpu)); }),
            "[next_labels] labels must be [B, T], got [1]");
  EXPECT_EQ(says([&] { kernels::next_labels(labels, {}, of({1}, cpu)); }),
            "[next_labels] targets must be [B T] = [6], got [1]");
  EXPECT_EQ(says([&] {
              kernels::next_labels(labels, labels, of({1, 2, 3, 4, 5, 6}, cpu));
            }),
            "[next_labels] ends must be [N], got [2, 3]");
  EXPECT_EQ(says([&] {
              kernels::next_labels(drawn({2, 3}, cpu), {}, of({1}, cpu));
            }),
            "[next_labels] labels must be i64, got f32");
  EXPECT_EQ(says([&] {
              kernels::next_labels(labels, {}, of({1, 2, 3, 4, 5, 6}));
            }),
            "[next_labels] targets must be on cpu, got cuda:0");
  EXPECT_EQ(says([&] { kernels::count_positions(Tensor::zeros({}, DType::i64, cpu)); }),
            "[count_positions] positions must be [.., T], got a scalar");
}

TEST(CudaWrite, NumbersTravelWithLaunches_cuda) {
  for (const std::size_t count : {1, 255, 256, 257, 1000}) {
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(i) + 0.5f;
    }
    const Tensor there = f32({static_cast<std::int64_t>(count)});
    cuda_write(there.raw(), kDevice, values.data(), count * sizeof(float));
    EXPECT_EQ(there.to_vector<float>(), values);
  }
}

TEST(CudaWrite, FullTensors_cuda) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64, DType::i32, DType::i64}) {
    for (const std::int64_t count : {0, 1, 300}) {
      const Array filled = to_array(Tensor::full({count}, dtype, -3, kDevice));
      EXPECT_EQ(filled.at, std::vector<double>(static_cast<std::size_t>(count), -3.0));
    }
  }
}

}  // namespace
}  // namespace reprise::testing

// Cross-entropy, alone and as the loss head.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "kernels/accumulate.h"
#include "kernels/cross_entropy.h"
#include "kernels/linear_cross_entropy.h"
#include "tests/error_of.h"
#include "tests/random_tensor.h"

namespace reprise::kernels {
namespace {

using testing::error_of;
using testing::normal;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Tensor f32(const Shape& shape, const std::vector<float>& values) {
  return Tensor::from(values, shape);
}
Tensor labels_of(const std::vector<std::int64_t>& values) {
  return Tensor::from(values, Shape{static_cast<std::int64_t>(values.size())});
}
Tensor scalar(double value = 0) {
  return Tensor::full({}, DType::f32, value);
}

std::vector<float> floats(const Tensor& x) {
  if (x.dtype() == DType::f32) {
    return x.to_vector<float>();
  }
  std::vector<float> result;
  for (const bfloat16 value : x.to_vector<bfloat16>()) {
    result.push_back(to_float(value));
  }
  return result;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())) == 0;
}

struct Result {
  Tensor loss = scalar(), lse, dx;
};
Result run(const Tensor& x, const Tensor& labels, const CrossEntropyOptions& options = {},
           double g = 1) {
  Result r;
  r.lse = Tensor::empty(labels.shape(), DType::f32);
  r.dx = Tensor::empty(x.shape(), x.dtype());
  cross_entropy(x, labels, r.loss, r.lse, options);
  cross_entropy_backward(scalar(g), x, labels, r.lse, r.dx, options);
  return r;
}

// Values of PyTorch 2.15: torch.nn.functional.cross_entropy.
TEST(CrossEntropy, AgreesWithPyTorch) {
  const Tensor x = f32({3, 3}, {1, 2, 3, .5f, -.5f, .25f, 3, 1, -2});
  const Result r = run(x, labels_of({2, -100, 1}));
  EXPECT_NEAR(r.loss.item<float>(), 1.2702255249023438, 1e-6);
  const std::vector<double> expected = {
      0.04501529037952423, 0.12236424535512924, -0.1673794984817505, 0, 0, 0,
      0.4378002882003784,  -0.4407501816749573, 0.002949874848127365};
  const std::vector<float> dx = floats(r.dx);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(dx[i], expected[i], 1e-7) << i;
  }
}

TEST(CrossEntropy, ItemsDivideTheSum) {
  const Tensor x = normal({4, 7}, DType::f32, 1);
  const Tensor labels = labels_of({3, -100, 0, 6});
  const Result mean = run(x, labels), items = run(x, labels, {.items = 12}, 4);
  EXPECT_NEAR(items.loss.item<float>(), mean.loss.item<float>() / 4, 1e-7);
  const std::vector<float> a = floats(mean.dx), b = floats(items.dx);
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(a[i], b[i], 1e-7);
  }
}

TEST(CrossEntropy, WithoutValidRows) {
  const Tensor x = normal({2, 5}, DType::f32, 1);
  const Tensor labels = labels_of({-100, -100});
  EXPECT_TRUE(std::isnan(run(x, labels).loss.item<float>()));
  EXPECT_EQ(run(x, labels, {.items = 3}).loss.item<float>(), 0.0f);
  for (const float d : floats(run(x, labels).dx)) {
    EXPECT_EQ(d, 0.0f);
  }
  const Result empty = run(Tensor::empty({0, 5}, DType::bf16), labels_of({}), {.items = 1});
  EXPECT_EQ(empty.loss.item<float>(), 0.0f);
  const Result no_words = run(Tensor::empty({2, 0}, DType::f32), labels, {.items = 1});
  EXPECT_EQ(no_words.loss.item<float>(), 0.0f);
}

TEST(CrossEntropy, AnotherIgnoreIndex) {
  const Tensor x = normal({2, 5}, DType::f32, 1);
  const Result r = run(x, labels_of({-1, 4}), {.ignore_index = -1});
  EXPECT_EQ(floats(r.dx)[0], 0.0f);
  EXPECT_NE(floats(r.dx)[5], 0.0f);
}

// At every place of a row: in whole vectors, in the last elements, at the label and beside it.
TEST(CrossEntropy, NonFiniteLogits) {
  for (const std::int64_t width : {1, 3, 16, 37, 100}) {
    for (const float bad : {std::nanf(""), kInfinity}) {
      for (std::int64_t at = 0; at < width; ++at) {
        const Tensor x = normal({2, width}, DType::f32, 1);
        x.data<float>()[width + at] = bad;
        const Result r = run(x, labels_of({0, width / 2}));
        EXPECT_TRUE(std::isnan(r.loss.item<float>())) << width << " " << at;
        const std::vector<float> dx = floats(r.dx);
        EXPECT_TRUE(std::isfinite(dx[0]));
        for (std::int64_t i = 0; i < width; ++i) {
          EXPECT_TRUE(std::isnan(dx[static_cast<std::size_t>(width + i)]));
        }
        // An ignored row is not looked at.
        EXPECT_TRUE(std::isfinite(run(x, labels_of({0, -100})).loss.item<float>()));
      }
    }
  }
  // Masked words cost nothing; a masked label, everything; nothing but masked words is no number.
  const Tensor masked = f32({1, 3}, {-kInfinity, 1, 1});
  EXPECT_NEAR(run(masked, labels_of({1})).loss.item<float>(), std::log(2.0), 1e-6);
  EXPECT_EQ(floats(run(masked, labels_of({1})).dx)[0], 0.0f);
  EXPECT_EQ(run(masked, labels_of({0})).loss.item<float>(), kInfinity);
  const Tensor all = f32({1, 2}, {-kInfinity, -kInfinity});
  EXPECT_TRUE(std::isnan(run(all, labels_of({0})).loss.item<float>()));
  EXPECT_TRUE(std::isnan(floats(run(all, labels_of({0})).dx)[1]));
}

TEST(CrossEntropy, LargeLogitsNeitherOverflowNorCancel) {
  const Result r = run(f32({1, 3}, {1e4f, 1e4f + 20, -1e30f}), labels_of({1}));
  EXPECT_NEAR(r.loss.item<float>(), std::log1p(std::exp(-20.0)), 1e-3);
  const Result sure = run(f32({1, 2}, {-14, 0}), labels_of({1}));
  EXPECT_NEAR(floats(sure.dx)[1] / -std::exp(-14.0), 1, 1e-2);
}

// Subnormal operands make a matrix product many times slower.
TEST(CrossEntropy, GradientsAreNeverSubnormal) {
  std::vector<float> logits;
  for (int i = 0; i < 1200; ++i) {
    logits.push_back(-0.1f * static_cast<float>(i));
  }
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor x = f32({1, 1200}, logits);
    const Tensor rounded = Tensor::empty({1, 1200}, dtype);
    cast(x, rounded);
    int normal = 0;
    for (const float d : floats(run(rounded, labels_of({0})).dx)) {
      EXPECT_TRUE(d == 0 || std::isnormal(d)) << d;
      normal += d != 0;
    }
    EXPECT_NEAR(normal, 670, 3);  // those above 2^-100: logits to -69.3 + log(10.5)
  }
}

TEST(CrossEntropy, InPlaceAccumulatedStridedAndThreads) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor x = normal({5, 41}, dtype, 3);
    const Tensor labels = labels_of({0, 40, -100, 7, 39});
    const Result r = run(x, labels);

    const Tensor wide = Tensor::zeros({5, 64}, dtype);
    const Tensor strided = wide.slice(1, 3, 44);
    strided.copy_from(x);
    EXPECT_TRUE(same_bits(run(strided, labels).dx, r.dx));

    cross_entropy_backward(scalar(1), strided, labels, r.lse, strided);
    EXPECT_TRUE(same_bits(strided.contiguous(), r.dx));

    const Tensor sum = normal({5, 41}, dtype, 4);
    const Tensor before = sum.clone();
    cross_entropy_backward(scalar(1), x, labels, r.lse, sum, {}, true);
    const std::vector<float> a = floats(sum), b = floats(before), d = floats(r.dx);
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(a[i], b[i] + d[i], dtype == DType::f32 ? 1e-6 : 2e-2) << i;
    }
    const int threads_before = threads();
    for (const int count : {1, 3}) {
      set_threads(count);
      EXPECT_TRUE(same_bits(run(x, labels).dx, r.dx));
      EXPECT_TRUE(same_bits(run(x, labels).loss, r.loss));
    }
    set_threads(threads_before);
  }
}

TEST(CrossEntropy, Errors) {
  const Tensor x = Tensor::zeros({2, 5}, DType::f32), labels = labels_of({1, -100}),
               loss = scalar(), lse = Tensor::zeros({2}, DType::f32);
  const auto forward = [&](const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d,
                           const CrossEntropyOptions& options = {}) {
    return error_of([&] { cross_entropy(a, b, c, d, options); });
  };
  EXPECT_EQ(forward(x, labels_of({1, 5}), loss, lse),
            "[cross_entropy] label of row 1 must be -100 or in [0, V) = [0, 5), got 5");
  EXPECT_EQ(forward(x, labels_of({-1, 5}), loss, lse),
            "[cross_entropy] label of row 0 must be -100 or in [0, V) = [0, 5), got -1");
  EXPECT_EQ(forward(x, labels, loss, lse, {.items = -1}),
            "[cross_entropy] items must be 0 or a positive number, got -1");
  EXPECT_EQ(forward(x, labels, loss, lse, {.items = kInfinity}),
            "[cross_entropy] items must be 0 or a positive number, got inf");
  EXPECT_EQ(forward(scalar(), labels, loss, lse),
            "[cross_entropy] x must be [.., V], got a scalar");
  EXPECT_EQ(forward(labels, labels, loss, lse), "[cross_entropy] x must be f32 or bf16, got i64");
  EXPECT_EQ(forward(x, lse, loss, lse), "[cross_entropy] labels must be i64, got f32");
  EXPECT_EQ(forward(x, labels_of({1}), loss, lse),
            "[cross_entropy] labels must be the leading sizes of x = [2], got [1]");
  EXPECT_EQ(forward(x, labels, lse, lse), "[cross_entropy] loss must be [] = [], got [2]");
  EXPECT_EQ(forward(x, labels, loss, loss),
            "[cross_entropy] lse must be the leading sizes of x = [2], got []");
  EXPECT_EQ(forward(Tensor::zeros({5, 2}, DType::f32).transpose(0, 1), labels, loss, lse),
            "[cross_entropy] x must be rows of unit stride, got shape [2, 5] with other strides: "
            "call contiguous()");
  const auto backward = [&](const Tensor& g, const Tensor& dx) {
    return error_of([&] { cross_entropy_backward(g, x, labels, lse, dx); });
  };
  EXPECT_EQ(backward(lse, x), "[cross_entropy_backward] g must be [] = [], got [2]");
  EXPECT_EQ(backward(loss, lse),
            "[cross_entropy_backward] dx must be the shape of x = [2, 5], got [2]");
  EXPECT_EQ(backward(loss, Tensor::zeros({2, 5}, DType::bf16)),
            "[cross_entropy_backward] dx must be f32, got bf16");
}

// The head.
struct Head {
  Tensor loss = scalar(), dx, dw;
};
Head head(const Tensor& x, const Tensor& w, const Tensor& labels, DType dw_dtype,
          const CrossEntropyOptions& options = {}, bool with_dx = true, bool with_dw = true) {
  Head h;
  h.dx = with_dx ? Tensor::full(x.shape(), x.dtype(), 7) : Tensor();
  h.dw = with_dw ? Tensor::full(w.shape(), dw_dtype, 7) : Tensor();
  linear_cross_entropy(x, w, labels, h.loss, h.dx, h.dw, options);
  return h;
}

struct Exact {
  double loss = 0;
  std::vector<double> dx, dw;
};
Exact exact(const Tensor& x, const Tensor& w, const Tensor& labels, double items) {
  const std::vector<float> xs = floats(x), ws = floats(w);
  const auto width = static_cast<std::size_t>(x.size(1)),
             words = static_cast<std::size_t>(w.size(0));
  Exact e;
  e.dx.resize(xs.size());
  e.dw.resize(ws.size());
  std::vector<double> logits(words);
  for (std::size_t n = 0; n < static_cast<std::size_t>(x.size(0)); ++n) {
    const std::int64_t label = labels.data<std::int64_t>()[n];
    if (label < 0) {
      continue;
    }
    double sum = 0;
    for (std::size_t v = 0; v < words; ++v) {
      logits[v] = 0;
      for (std::size_t c = 0; c < width; ++c) {
        logits[v] += double{xs[n * width + c]} * ws[v * width + c];
      }
      sum += std::exp(logits[v]);
    }
    e.loss += (std::log(sum) - logits[static_cast<std::size_t>(label)]) / items;
    for (std::size_t v = 0; v < words; ++v) {
      const double d =
          (std::exp(logits[v]) / sum - (static_cast<std::int64_t>(v) == label ? 1 : 0)) / items;
      for (std::size_t c = 0; c < width; ++c) {
        e.dx[n * width + c] += d * ws[v * width + c];
        e.dw[v * width + c] += d * xs[n * width + c];
      }
    }
  }
  return e;
}

// |a - b| / |b|, in the 2-norm.
double relative_error(const Tensor& actual, const std::vector<double>& expected) {
  const std::vector<float> a = floats(actual);
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference += (a[i] - expected[i]) * (a[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

TEST(LinearCrossEntropy, SeveralChunksAgreeWithDouble) {
  constexpr std::int64_t kTokens = 450, kWidth = 3, kWords = 120'000;
  const Tensor labels = Tensor::empty({kTokens}, DType::i64);
  for (std::int64_t n = 0; n < kTokens; ++n) {
    labels.data<std::int64_t>()[n] = n % 5 == 0 ? -100 : n * 997 % kWords;
  }
  for (const DType dtype : {DType::f32, DType::bf16}) {
    ASSERT_LT(linear_cross_entropy_rows(kTokens, kWidth, kWords, dtype), kTokens);
    const Tensor x = normal({kTokens, kWidth}, dtype, 1), w = normal({kWords, kWidth}, dtype, 2);
    const Exact e = exact(x, w, labels, 360);
    for (const DType dw_dtype : {DType::f32, dtype}) {
      const Head h = head(x, w, labels, dw_dtype);
      // bf16: logits and their gradients are rounded to eight bits.
      const double tolerance = dtype == DType::f32 ? 5e-6 : 8e-3;
      EXPECT_NEAR(h.loss.item<float>() / e.loss, 1, dtype == DType::f32 ? 1e-6 : 1e-3);
      EXPECT_LE(relative_error(h.dx, e.dx), tolerance);
      EXPECT_LE(relative_error(h.dw, e.dw), tolerance);
      const int before = threads();
      set_threads(3);
      const Head other = head(x, w, labels, dw_dtype);
      set_threads(before);
      EXPECT_TRUE(same_bits(h.loss, other.loss) && same_bits(h.dx, other.dx) &&
                  same_bits(h.dw, other.dw));
    }
  }
}

TEST(LinearCrossEntropy, OnlyWhatIsWanted) {
  const Tensor x = normal({70, 12}, DType::f32, 1), w = normal({33, 12}, DType::f32, 2);
  const Tensor labels = Tensor::full({70}, DType::i64, 5);
  const Head both = head(x, w, labels, DType::f32);
  EXPECT_TRUE(same_bits(head(x, w, labels, DType::f32, {}, true, false).dx, both.dx));
  EXPECT_TRUE(same_bits(head(x, w, labels, DType::f32, {}, false, true).dw, both.dw));
  EXPECT_TRUE(same_bits(head(x, w, labels, DType::f32, {}, false, false).loss, both.loss));
}

TEST(LinearCrossEntropy, NothingToLearnFrom) {
  const Tensor w = normal({33, 12}, DType::f32, 2);
  const Head empty =
      head(Tensor::empty({0, 12}, DType::f32), w, labels_of({}), DType::f32, {.items = 2});
  EXPECT_EQ(empty.loss.item<float>(), 0.0f);
  const Head ignored = head(normal({2, 12}, DType::f32, 1), w, labels_of({-100, -100}), DType::f32);
  EXPECT_TRUE(std::isnan(ignored.loss.item<float>()));
  for (const Tensor& gradient : {empty.dw, ignored.dx, ignored.dw}) {
    for (const float value : floats(gradient)) {
      EXPECT_EQ(value, 0.0f);
    }
  }
}

TEST(LinearCrossEntropy, ChunksAreBounded) {
  constexpr std::int64_t kMiB = 1 << 20;
  // GPT-2, batch 4 of 512.
  EXPECT_EQ(linear_cross_entropy_rows(2048, 768, 50257, DType::f32), 512);
  EXPECT_EQ(linear_cross_entropy_rows(2048, 768, 50257, DType::bf16), 1024);
  EXPECT_EQ(linear_cross_entropy_rows(256, 768, 50257, DType::f32), 256);
  // A quarter of the weight, where that is more.
  EXPECT_EQ(linear_cross_entropy_rows(8192, 4096, 128256, DType::bf16), 1024);
  EXPECT_EQ(linear_cross_entropy_rows(0, 768, 50257, DType::f32), 0);
  for (const std::int64_t tokens : {1, 63, 65, 1000, 4097}) {
    const std::int64_t rows = linear_cross_entropy_rows(tokens, 64, 100'000, DType::f32);
    EXPECT_LE(rows * 400'000, 100 * kMiB);
    EXPECT_GE(rows, 1);
  }
}

TEST(LinearCrossEntropy, TheSameWorkspaceOnMeta) {
  const auto peak = [](Device device) {
    const Tensor x = Tensor::zeros({300, 4}, DType::bf16, device),
                 w = Tensor::zeros({300'000, 4}, DType::bf16, device),
                 labels = Tensor::full({300}, DType::i64, 1, device),
                 loss = Tensor::zeros({}, DType::f32, device),
                 dx = Tensor::zeros(x.shape(), DType::bf16, device),
                 dw = Tensor::zeros(w.shape(), DType::bf16, device);
    allocator(device).reset_peak();
    linear_cross_entropy(x, w, labels, loss, dx, dw);
    const MemoryReport report = allocator(device).report();
    return report.peak[static_cast<std::size_t>(MemoryKind::workspace)];
  };
  EXPECT_EQ(peak(cpu), peak(meta));
  EXPECT_GT(peak(meta), std::int64_t{128} * 300'000 * 2 + std::int64_t{300'000} * 4 * 4);
  EXPECT_LT(peak(meta), std::int64_t{300} * 300'000 * 2);  // the full logits
}

TEST(LinearCrossEntropy, BackwardScales) {
  for (const DType from : {DType::f32, DType::bf16}) {
    for (const DType to : {DType::f32, DType::bf16}) {
      const Tensor at_one = normal({3, 50}, from, 1), gradient = normal({3, 50}, to, 2);
      const std::vector<float> a = floats(at_one), before = floats(gradient);
      linear_cross_entropy_backward(scalar(0.5), at_one, gradient, true);
      const std::vector<float> sum = floats(gradient);
      linear_cross_entropy_backward(scalar(0.5), at_one, gradient);
      const std::vector<float> product = floats(gradient);
      const double tolerance = to == DType::f32 ? 1e-6 : 2e-2;
      for (std::size_t i = 0; i < a.size(); ++i) {
        EXPECT_NEAR(product[i], a[i] / 2, tolerance);
        EXPECT_NEAR(sum[i], before[i] + a[i] / 2, tolerance);
      }
    }
  }
}

TEST(LinearCrossEntropy, Errors) {
  const Tensor x = Tensor::zeros({2, 3}, DType::f32), w = Tensor::zeros({5, 3}, DType::f32),
               labels = labels_of({1, 2});
  const auto message = [&](const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& dx = {},
                           const Tensor& dw = {}, const Tensor& loss = scalar()) {
    return error_of([&] { linear_cross_entropy(a, b, c, loss, dx, dw); });
  };
  EXPECT_EQ(message(x, w, labels_of({0, 5})),
            "[linear_cross_entropy] label of row 1 must be -100 or in [0, V) = [0, 5), got 5");
  EXPECT_EQ(message(labels, w, labels), "[linear_cross_entropy] x must be f32 or bf16, got i64");
  EXPECT_EQ(message(scalar(), w, labels), "[linear_cross_entropy] x must be [N, C], got []");
  EXPECT_EQ(message(x, Tensor::zeros({5, 4}, DType::f32), labels),
            "[linear_cross_entropy] w must be [V, C] with C = 3 as x [2, 3] has, got [5, 4]");
  EXPECT_EQ(message(x, Tensor::zeros({5, 3}, DType::bf16), labels),
            "[linear_cross_entropy] w must be f32, got bf16");
  EXPECT_EQ(message(x, w, labels_of({1})),
            "[linear_cross_entropy] labels must be [N] = [2], got [1]");
  EXPECT_EQ(message(x, w, labels, w),
            "[linear_cross_entropy] dx must be [N, C] = [2, 3], got [5, 3]");
  EXPECT_EQ(message(x, w, labels, {}, x),
            "[linear_cross_entropy] dw must be [V, C] = [5, 3], got [2, 3]");
  EXPECT_EQ(message(x, w, labels, {}, Tensor::zeros({5, 3}, DType::bf16)),
            "[linear_cross_entropy] dw must be f32, or f32 as w, got bf16");
  EXPECT_EQ(message(x, w, labels, {}, {}, x),
            "[linear_cross_entropy] loss must be [] = [], got [2, 3]");
  const auto backward = [&](const Tensor& g, const Tensor& a, const Tensor& b) {
    return error_of([&] { linear_cross_entropy_backward(g, a, b); });
  };
  EXPECT_EQ(backward(x, w, w), "[linear_cross_entropy_backward] g must be [] = [], got [2, 3]");
  EXPECT_EQ(backward(scalar(), labels, w),
            "[linear_cross_entropy_backward] at_one must be f32 or bf16, got i64");
  EXPECT_EQ(
      backward(scalar(), w, x),
      "[linear_cross_entropy_backward] gradient must be the shape of at_one = [5, 3], got [2, 3]");
}

}  // namespace
}  // namespace reprise::kernels

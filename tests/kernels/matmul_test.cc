#include "kernels/matmul.h"

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "kernels/matmul_sides.h"
#include "kernels/matmul_tile.h"
#include "tests/error_of.h"

namespace reprise::kernels {
namespace {

using testing::error_of;

// A random matrix [rows, columns] whose rows lie `stride` apart, `offset` elements into its
// storage.
struct Random {
  std::mt19937_64 engine{7};

  Tensor matrix(std::int64_t rows, std::int64_t columns, DType dtype, std::int64_t stride = 0,
                std::int64_t offset = 0) {
    stride = std::max(stride, columns);
    const Tensor all = Tensor::empty(Shape{offset + rows * stride + 1}, dtype);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < all.numel(); ++i) {
      const float x = normal(engine);
      if (dtype == DType::f32) {
        all.data<float>()[i] = x;
      } else {
        all.data<bfloat16>()[i] = to_bfloat16(x);
      }
    }
    Tensor::Strides strides{stride, 1};
    return all.as_view(Shape{rows, columns}, strides, offset);
  }
};

double at(const Tensor& x, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * x.strides()[0] + column * x.strides()[1];
  return x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<bfloat16>()[i]);
}

// Largest difference, in units of what the dtype and the length of the sums allow.
double error_of(const Tensor& a, const Tensor& b, const Tensor& before, const Tensor& c,
                const MatmulOptions& o, const Tensor& bias) {
  const std::int64_t k = o.transpose_a ? a.size(0) : a.size(1);
  double worst = 0;
  for (std::int64_t i = 0; i < c.size(0); ++i) {
    for (std::int64_t j = 0; j < c.size(1); ++j) {
      double sum = 0, size = 1;
      for (std::int64_t l = 0; l < k; ++l) {
        const double term = (o.transpose_a ? at(a, l, i) : at(a, i, l)) *
                            (o.transpose_b ? at(b, j, l) : at(b, l, j));
        sum += term;
        size += std::abs(term);
      }
      if (bias.defined()) {
        sum +=
            bias.dtype() == DType::f32 ? bias.data<float>()[j] : to_float(bias.data<bfloat16>()[j]);
      }
      if (o.accumulate) {
        sum += at(before, i, j);
      }
      const double allowed = 1e-6 * size + (c.dtype() == DType::bf16 ? std::abs(sum) / 256 : 0);
      worst = std::max(worst, std::abs(at(c, i, j) - sum) / allowed);
    }
  }
  return worst;
}

struct Dtypes {
  DType inputs, output;
};
constexpr Dtypes kDtypes[] = {{DType::f32, DType::f32},
                              {DType::bf16, DType::bf16},
                              {DType::bf16, DType::f32},
                              {DType::f32, DType::bf16}};

struct Size {
  std::int64_t m, n, k;
};

TEST(Matmul, AgreesWithTheFormula) {
  Random random;
  for (const auto [m, n, k] : {Size{1, 1, 1}, Size{3, 5, 7}, Size{17, 33, 65}, Size{64, 64, 64},
                               Size{1, 130, 48}, Size{129, 1, 31}, Size{70, 200, 300}}) {
    for (const auto [in, out] : kDtypes) {
      for (int bits = 0; bits < 16; ++bits) {
        const MatmulOptions o{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
        const bool strided = (bits & 8) != 0;
        const std::int64_t extra = strided ? 5 : 0;
        const Tensor a = o.transpose_a ? random.matrix(k, m, in, m + extra, extra)
                                       : random.matrix(m, k, in, k + extra, extra);
        const Tensor b = o.transpose_b ? random.matrix(n, k, in, k + extra, extra)
                                       : random.matrix(k, n, in, n + extra, extra);
        const Tensor c = random.matrix(m, n, out, n + 2 * extra, extra);
        const Tensor bias = o.accumulate ? Tensor() : random.matrix(1, n, out).reshape(Shape{n});
        const Tensor before = c.clone();
        matmul(a, b, c, o, bias);
        EXPECT_LT(error_of(a, b, before, c, o, bias), 1.0)
            << m << " " << n << " " << k << " " << name(in) << " " << name(out) << " case " << bits;
      }
    }
  }
}

TEST(Matmul, CutsLargeProductsInEveryDirection) {
  Random random;
  const Size s{1100, 800, 1600};
  bool rows = false, columns = false, depth = false;
  for (const auto [in, out] : kDtypes) {
    for (int bits = 0; bits < 8; ++bits) {
      const MatmulOptions o{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
      const Tensor a = o.transpose_a ? random.matrix(s.k, s.m, in) : random.matrix(s.m, s.k, in);
      const Tensor b = o.transpose_b ? random.matrix(s.n, s.k, in) : random.matrix(s.k, s.n, in);
      const Tensor c = random.matrix(s.m, s.n, out);
      const Tensor before = c.clone();
      matmul(a, b, c, o);
      TileShape shape;
      shape.m = s.m;
      shape.n = s.n;
      shape.k = s.k;
      shape.transpose_a = o.transpose_a;
      shape.transpose_b = o.transpose_b;
      shape.inputs = in;
      shape.output = out;
      const cpu::MatmulCut cut = cpu::matmul_cut(shape);
      rows = rows || cut.rows < s.m;
      columns = columns || cut.columns < s.n;
      depth = depth || cut.depth < s.k;
      // The formula on both sides of the borders of the cut, and at the ends.
      for (const std::int64_t row : {std::int64_t{0}, cut.rows - 1, cut.rows, s.m - 1}) {
        for (const std::int64_t column : {std::int64_t{0}, cut.columns - 1, cut.columns, s.n - 1}) {
          if (row >= s.m || column >= s.n) {
            continue;
          }
          const auto element = [&](const Tensor& x) {
            return x.slice(0, row, row + 1).slice(1, column, column + 1);
          };
          EXPECT_LT(error_of(a.slice(o.transpose_a ? 1 : 0, row, row + 1),
                             b.slice(o.transpose_b ? 0 : 1, column, column + 1), element(before),
                             element(c), o, Tensor()),
                    1.0)
              << name(in) << " " << name(out) << " case " << bits << " at " << row << ", "
              << column;
        }
      }
    }
  }
  EXPECT_TRUE(rows && columns && depth);
}

TEST(Matmul, LeadingDimensionsAreTakenTogether) {
  Random random;
  const Tensor a = random.matrix(6, 4, DType::f32), b = random.matrix(5, 4, DType::f32);
  const Tensor flat = Tensor::empty(Shape{6, 5}, DType::f32);
  const Tensor deep = Tensor::empty(Shape{2, 3, 5}, DType::f32);
  matmul(a, b, flat, {.transpose_b = true});
  matmul(a.contiguous().reshape(Shape{2, 3, 4}), b, deep, {.transpose_b = true});
  EXPECT_EQ(flat.to_vector<float>(), deep.to_vector<float>());
}

std::vector<char> bytes_of(const Tensor& x) {
  const Tensor whole = x.contiguous();
  std::vector<char> bytes(static_cast<std::size_t>(whole.bytes()));
  std::memcpy(bytes.data(), whole.raw(), bytes.size());
  return bytes;
}

TEST(Matmul, SameBitsForAnyNumberOfThreads) {
  Random random;
  const int before = threads();
  for (const auto [m, n, k] : {Size{768, 768, 1024}, Size{300, 1000, 777}, Size{40, 50, 5000}}) {
    for (const auto [in, out] : kDtypes) {
      for (int bits = 0; bits < 4; ++bits) {
        const MatmulOptions o{(bits & 1) != 0, (bits & 2) != 0};
        const Tensor a = o.transpose_a ? random.matrix(k, m, in) : random.matrix(m, k, in);
        const Tensor b = o.transpose_b ? random.matrix(n, k, in) : random.matrix(k, n, in);
        const Tensor c = Tensor::empty(Shape{m, n}, out);
        std::vector<char> first;
        for (const int count : {1, 2, 5, 2}) {
          set_threads(count);
          matmul(a, b, c, o);
          if (first.empty()) {
            first = bytes_of(c);
          }
          EXPECT_TRUE(first == bytes_of(c)) << m << " " << n << " " << k << " " << name(in)
                                            << " case " << bits << ", " << count << " threads";
        }
      }
    }
  }
  set_threads(before);
}

TEST(Matmul, SameBitsAtAnyAddress) {
  Random random;
  for (const auto [m, n, k] : {Size{70, 130, 257}, Size{33, 17, 64}, Size{256, 768, 768}}) {
    for (const auto [in, out] : kDtypes) {
      for (int bits = 0; bits < 4; ++bits) {
        const MatmulOptions o{(bits & 1) != 0, (bits & 2) != 0};
        const Tensor a = o.transpose_a ? random.matrix(k, m, in) : random.matrix(m, k, in);
        const Tensor b = o.transpose_b ? random.matrix(n, k, in) : random.matrix(k, n, in);
        const Tensor c = Tensor::empty(Shape{m, n}, out);
        matmul(a, b, c, o);
        for (const std::int64_t offset : {1, 3, 8, 13}) {
          const Tensor a2 = random.matrix(a.size(0), a.size(1), in, 0, offset);
          const Tensor b2 = random.matrix(b.size(0), b.size(1), in, 0, offset + 2);
          const Tensor c2 = random.matrix(m, n, out, 0, offset + 4);
          a2.copy_from(a);
          b2.copy_from(b);
          matmul(a2, b2, c2, o);
          EXPECT_TRUE(bytes_of(c) == bytes_of(c2))
              << m << " " << n << " " << k << " " << name(in) << " case " << bits << " " << offset;
        }
      }
    }
  }
}

TEST(Matmul, ManyThreadsAtOnce) {
  Random random;
  const Tensor a = random.matrix(90, 110, DType::f32), b = random.matrix(110, 100, DType::f32);
  const Tensor c = Tensor::empty(Shape{90, 100}, DType::f32);
  matmul(a, b, c);
  std::vector<Tensor> results;
  for (int i = 0; i < 4; ++i) {
    results.push_back(Tensor::empty(c.shape(), DType::f32));
  }
  std::vector<std::thread> workers;
  for (const Tensor& result : results) {
    workers.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        matmul(a, b, result);
      }
    });
  }
  for (std::thread& worker : workers) {
    worker.join();
  }
  for (const Tensor& result : results) {
    EXPECT_TRUE(bytes_of(c) == bytes_of(result));
  }
}

TEST(Matmul, EmptySizes) {
  Random random;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor bias = random.matrix(1, 3, DType::f32).reshape(Shape{3});
    matmul(Tensor::empty(Shape{0, 4}, dtype), Tensor::empty(Shape{4, 3}, dtype),
           Tensor::empty(Shape{0, 3}, dtype));
    matmul(Tensor::empty(Shape{2, 4}, dtype), Tensor::empty(Shape{4, 0}, dtype),
           Tensor::empty(Shape{2, 0}, dtype));
    const Tensor c = random.matrix(2, 3, dtype), before = c.clone();
    const Tensor a = Tensor::empty(Shape{2, 0}, dtype), b = Tensor::empty(Shape{0, 3}, dtype);
    matmul(a, b, c, {.accumulate = true});
    EXPECT_TRUE(bytes_of(c) == bytes_of(before));
    matmul(a, b, c, {}, bias);
    for (std::int64_t j = 0; j < 3; ++j) {
      const float want = dtype == DType::f32 ? bias.data<float>()[j]
                                             : to_float(to_bfloat16(bias.data<float>()[j]));
      EXPECT_EQ(at(c, 1, j), want);
    }
    matmul(a, b, c);
    EXPECT_EQ(at(c, 1, 2), 0.0);
  }
}

// Where the library has no bf16 product, it is made of one for f32; and Eigen's is the other
// library.
TEST(Matmul, LibrariesAgree) {
  Random random;
  for (const auto [in, out] : kDtypes) {
    for (int bits = 0; bits < 48; ++bits) {
      TileShape s;
      s.m = 21;
      s.n = 35;
      s.k = std::array{50, 2048,
                       2500}[static_cast<std::size_t>(bits / 16)];  // one, whole, broken parts
      s.transpose_a = (bits & 1) != 0;
      s.transpose_b = (bits & 2) != 0;
      s.accumulate = (bits & 4) != 0;
      s.inputs = in;
      s.output = out;
      const Tensor a =
          s.transpose_a ? random.matrix(s.k, s.m, in, 60) : random.matrix(s.m, s.k, in, s.k + 10);
      const Tensor b =
          s.transpose_b ? random.matrix(s.n, s.k, in, s.k + 20) : random.matrix(s.k, s.n, in, 70);
      const Tensor c = random.matrix(s.m, s.n, out, 40), before = c.clone();
      const Tensor bias = random.matrix(1, s.n, out).reshape(Shape{s.n});
      const bool with_bias = !s.accumulate && (bits & 8) != 0;
      s.lda = s.transpose_a ? 60 : s.k + 10;
      s.ldb = s.transpose_b ? s.k + 20 : 70;
      s.ldc = 40;
      if (with_bias) {
        s.bias = out;
      }
      const auto product = widened_tile_product(s, &eigen::tile_product);
      std::vector<char> scratch(static_cast<std::size_t>(product->scratch_bytes()) + 64);
      product->run(a.raw(), b.raw(), c.raw(), bias.raw(), scratch.data());
      EXPECT_LT(error_of(a, b, before, c, {s.transpose_a, s.transpose_b, s.accumulate},
                         with_bias ? bias : Tensor()),
                1.0)
          << name(in) << " " << name(out) << " case " << bits;
    }
  }
}

TEST(Matmul, WorkspaceOnMetaIsThatOfTheDevice) {
  const auto peak = [](Device device, DType dtype) {
    const Tensor a = Tensor::empty(Shape{500, 300}, dtype, device);
    const Tensor b = Tensor::empty(Shape{500, 400}, dtype, device);
    const Tensor c = Tensor::empty(Shape{300, 400}, dtype, device);
    if (!a.is_meta()) {
      a.zero();
      b.zero();
    }
    allocator(device).reset_peak();
    matmul(a, b, c, {.transpose_a = true});  // copies parts of a, whatever the library
    const MemoryReport report = allocator(device).report();
    EXPECT_EQ(report.live[static_cast<std::size_t>(MemoryKind::workspace)], 0);
    return report.peak[static_cast<std::size_t>(MemoryKind::workspace)];
  };
  for (const DType dtype : {DType::f32, DType::bf16}) {
    EXPECT_EQ(peak(reprise::cpu, dtype), peak(reprise::meta, dtype));
    EXPECT_GT(peak(reprise::cpu, dtype), 0);
  }
}

TEST(ColumnSums, AgreeWithTheFormula) {
  Random random;
  for (const DType in : {DType::f32, DType::bf16}) {
    for (const DType out : {DType::f32, DType::bf16}) {
      for (const std::int64_t rows : {0, 1, 7, 64, 200}) {
        for (const std::int64_t columns : {0, 1, 5, 256, 300}) {
          for (const bool accumulate : {false, true}) {
            const Tensor x = random.matrix(rows, columns, in, columns + 3, 1);
            const Tensor sums = random.matrix(1, columns, out).reshape(Shape{columns});
            const Tensor before = sums.clone();
            column_sums(x, sums, accumulate);
            for (std::int64_t j = 0; j < columns; ++j) {
              double sum = 0;
              for (std::int64_t i = 0; i < rows; ++i) {
                sum += at(x, i, j);
              }
              const Shape row{1, columns};
              sum += accumulate ? at(before.reshape(row), 0, j) : 0;
              EXPECT_NEAR(at(sums.reshape(row), 0, j), sum,
                          1e-5 * (1 + std::sqrt(static_cast<double>(rows))) +
                              (out == DType::bf16 ? std::abs(sum) / 256 : 0));
            }
          }
        }
      }
    }
  }
}

TEST(Matmul, Mistakes) {
  const auto f32 = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32); };
  const Tensor a = f32({2, 3}), b = f32({3, 4}), c = f32({2, 4});
  EXPECT_EQ(error_of([&] {
              matmul(a, f32({4, 4}), c);
            }),
            "[matmul] b must have K = 3 as a [2, 3] has, got [4, 4]");
  EXPECT_EQ(error_of([&] {
              matmul(a, b, f32({2, 5}));
            }),
            "[matmul] c must be [M, N] = [2, 4], got [2, 5]");
  EXPECT_EQ(error_of([&] { matmul(a, b, c, {}, f32({3})); }),
            "[matmul] bias must be [N] = [4], got [3]");
  EXPECT_EQ(error_of([&] { matmul(a, b, c, {.accumulate = true}, f32({4})); }),
            "[matmul] bias must be absent when the product is added to c");
  EXPECT_EQ(error_of([&] {
              matmul(Tensor::zeros({2, 3}, DType::f64), b, c);
            }),
            "[matmul] a must be f32 or bf16, got f64");
  EXPECT_EQ(error_of([&] {
              matmul(a, Tensor::zeros({3, 4}, DType::bf16), c);
            }),
            "[matmul] b must be f32, got bf16");
  EXPECT_EQ(error_of([&] { matmul(f32({}), b, c); }), "[matmul] a must be a matrix, got a scalar");
  EXPECT_EQ(error_of([&] {
              matmul(f32({3, 2}).transpose(0, 1), b, c);
            }),
            "[matmul] a must be rows of unit stride, got shape [2, 3] with other strides: call "
            "contiguous()");
  EXPECT_EQ(error_of([&] {
              matmul(Tensor::zeros({2, 3}, DType::f32, meta), b, c);
            }),
            "[matmul] a must be on cpu, got meta");
  EXPECT_EQ(error_of([&] { column_sums(a, f32({4})); }),
            "[column_sums] sums must be [N] = [3], got [4]");
  EXPECT_EQ(error_of([&] { column_sums(a, Tensor::zeros({3}, DType::i64)); }),
            "[column_sums] sums must be f32 or bf16, got i64");
}

}  // namespace
}  // namespace reprise::kernels

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "core/parallel.h"
#include "kernels/accumulate_sides.h"
#include "kernels/matmul_sides.h"
#include "kernels/scratch.h"

namespace reprise::kernels::cpu {
namespace {

constexpr std::int64_t kFewTasks = 8;

std::int64_t parts(std::int64_t size, std::int64_t of) {
  return (size + of - 1) / of;
}

// `size` in equal parts of at most `most`, whole multiples of `grain` but for the last.
std::int64_t even(std::int64_t size, std::int64_t most, std::int64_t grain) {
  if (size <= most) {
    return size;
  }
  const std::int64_t part = parts(size, parts(size, most));
  return parts(part, grain) * grain;
}

// The products of a task, by what differs: its rows, columns and depth are whole or the last ones,
// and it overwrites C or adds to it.
class Products {
 public:
  Products(const TileShape& whole, const MatmulCut& cut) : whole_(whole), cut_(cut) {
    for (const std::int64_t m : sizes(whole.m, cut.rows)) {
      for (const std::int64_t n : sizes(whole.n, cut.columns)) {
        for (const std::int64_t k : sizes(whole.k, cut.depth)) {
          const bool several = whole.k > cut.depth;
          const bool is_first = k == cut.depth || !several;
          if (is_first) {
            add(m, n, k, whole.accumulate, true);
          }
          if (several) {
            add(m, n, k, true, false);
          }
        }
      }
    }
  }

  const TileProduct& find(std::int64_t m, std::int64_t n, std::int64_t k, bool first) const {
    return *products_.at({m, n, k, first});
  }

  std::int64_t scratch_bytes() const {
    std::int64_t most = 0;
    for (const auto& [key, product] : products_) {
      most = std::max(most, product->scratch_bytes());
    }
    return most;
  }

 private:
  static std::vector<std::int64_t> sizes(std::int64_t whole, std::int64_t part) {
    if (whole % part == 0) {
      return {part};
    }
    return whole < part ? std::vector{whole} : std::vector{part, whole % part};
  }

  void add(std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate, bool first) {
    TileShape s = whole_;
    s.m = m;
    s.n = n;
    s.k = k;
    s.accumulate = accumulate;
    if (!first) {
      s.bias.reset();
    }
    if (cut_.turn_a || cut_.deep) {
      s.transpose_a = false;
      s.lda = s.k;
    }
    if (cut_.deep) {
      s.accumulate = !first;
      s.output = DType::f32;
      s.ldc = n;
    }
    products_[{m, n, k, first}] = tile_product(s);
  }

  const TileShape whole_;
  const MatmulCut cut_;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>,
           std::shared_ptr<const TileProduct>>
      products_;
};

const char* part_of(const void* at, bool transposed, std::int64_t row, std::int64_t column,
                    std::int64_t stride, std::int64_t bytes) {
  return static_cast<const char*>(at) +
         (transposed ? column * stride + row : row * stride + column) * bytes;
}

struct Operands {
  const TileShape& whole;
  const char *a, *b;
  char* c;
  const char* bias;
};

void copy_rows(const char* from, std::int64_t stride, char* to, std::int64_t rows,
               std::int64_t row_bytes) {
  for (std::int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * row_bytes, from + row * stride, static_cast<std::size_t>(row_bytes));
  }
}

// All of K for one tile of C, whose sums in f32 lie at `sums` and are rounded once.
void run_deep(const Operands& with, const MatmulCut& cut, const Products& products,
              std::int64_t row, std::int64_t column, char* dense, char* sums, char* scratch) {
  const TileShape& s = with.whole;
  const auto in = static_cast<std::int64_t>(size_bytes(s.inputs));
  const std::int64_t m = std::min(cut.rows, s.m - row), n = std::min(cut.columns, s.n - column);
  const char* const bias =
      s.bias ? with.bias + column * static_cast<std::int64_t>(size_bytes(*s.bias)) : nullptr;
  for (std::int64_t depth = 0; depth < s.k; depth += cut.depth) {
    const std::int64_t k = std::min(cut.depth, s.k - depth);
    copy_rows(part_of(with.a, false, row, depth, s.lda, in), s.lda * in, dense, m, k * in);
    products.find(m, n, k, depth == 0)
        .run(dense, part_of(with.b, s.transpose_b, depth, column, s.ldb, in), sums, bias, scratch);
  }
  const Matrix from{sums, DType::f32, n};
  const Matrix to{with.c + (row * s.ldc + column) * static_cast<std::int64_t>(size_bytes(s.output)),
                  s.output, s.ldc};
  s.accumulate ? accumulate(to, from, {m, n}) : cast(from, to, {m, n});
}

void run_task(const Operands& with, const MatmulCut& cut, const Products& products,
              std::int64_t row, std::int64_t column, char* turned, char* scratch) {
  const TileShape& s = with.whole;
  const auto in = static_cast<std::int64_t>(size_bytes(s.inputs));
  const auto out = static_cast<std::int64_t>(size_bytes(s.output));
  const std::int64_t m = std::min(cut.rows, s.m - row), end = std::min(s.n, column + cut.across);
  for (std::int64_t depth = 0; depth < s.k; depth += cut.depth) {
    const std::int64_t k = std::min(cut.depth, s.k - depth);
    const char* a = part_of(with.a, s.transpose_a, row, depth, s.lda, in);
    if (cut.turn_a) {
      transpose(a, s.lda, turned, m, k, in);
      a = turned;
    }
    for (std::int64_t at = column; at < end; at += cut.columns) {
      const std::int64_t n = std::min(cut.columns, s.n - at);
      const char* const b = part_of(with.b, s.transpose_b, depth, at, s.ldb, in);
      const char* const bias =
          s.bias ? with.bias + at * static_cast<std::int64_t>(size_bytes(*s.bias)) : nullptr;
      products.find(m, n, k, depth == 0)
          .run(a, b, with.c + (row * s.ldc + at) * out, bias, scratch);
    }
  }
}

// Of a task: its copy of a part of A, and its sums.
std::int64_t turned_bytes(const TileShape& s, const MatmulCut& cut) {
  return cut.turn_a || cut.deep ? aligned_bytes(std::min(cut.rows, s.m) * std::min(cut.depth, s.k) *
                                                static_cast<std::int64_t>(size_bytes(s.inputs)))
                                : 0;
}
std::int64_t sums_bytes(const TileShape& s, const MatmulCut& cut) {
  return cut.deep ? aligned_bytes(std::min(cut.rows, s.m) * std::min(cut.columns, s.n) * 4) : 0;
}

std::int64_t slots(const TileShape& s, const MatmulCut& cut, int threads) {
  return std::min<std::int64_t>(threads, parts(s.m, cut.rows) * parts(s.n, cut.across));
}

}  // namespace

// Measured choices. oneDNN's brgemm takes dense operands only, and is the better one for bf16 with
// a short K; its gemm, taken for parts of wider rows, copies both operands, which f32 needs where
// the rows of B are far apart and fall on few sets of the cache. It is also the better one for a
// longer K in parts, with A copied to dense ones: a head's input gradient, K = V, runs twice as
// fast.
MatmulCut matmul_cut(const TileShape& s) {
  MatmulCut cut{};
  const bool f32 = s.inputs == DType::f32;
  if (s.transpose_a) {
    cut.turn_a = true;
    cut.rows = even(s.m, 384, 64);
    cut.across = s.n;
    cut.columns = even(s.n, 768, 64);
    cut.depth = s.k;
    return cut;
  }
  const bool dense = !f32 && s.k <= 1536 && s.n <= 4096;
  cut.deep = !f32 && !dense && !s.transpose_b && s.n <= 4096;
  cut.columns = even(s.n, dense || cut.deep ? 4096 : f32 ? 768 : 384, 64);
  cut.rows = even(s.m, f32 ? 1024 : 512, 64);
  // Few rows or few columns make few tasks: smaller ones, or most threads would have none.
  const auto tasks = [&] { return parts(s.m, cut.rows) * parts(s.n, cut.columns); };
  while (f32 && tasks() < kFewTasks && cut.columns > 256) {
    cut.columns = even(s.n, cut.columns / 2, 64);
  }
  while (tasks() < kFewTasks && cut.rows > 128) {
    cut.rows = even(s.m, cut.rows / 2, 64);
  }
  cut.across = cut.columns;
  cut.depth = cut.deep || (f32 && s.output == DType::f32) ? even(s.k, 1024, 64) : s.k;
  return cut;
}

std::int64_t matmul_workspace_bytes(const TileShape& s, int threads) {
  const MatmulCut cut = matmul_cut(s);
  return slots(s, cut, threads) * (aligned_bytes(Products(s, cut).scratch_bytes()) +
                                   turned_bytes(s, cut) + sums_bytes(s, cut));
}

void matmul(const TileShape& s, const void* a, const void* b, void* c, const void* bias,
            void* workspace, int threads) {
  const MatmulCut cut = matmul_cut(s);
  const Products products(s, cut);
  const std::int64_t turned = turned_bytes(s, cut), sums = sums_bytes(s, cut);
  ScratchSlots scratch(workspace, slots(s, cut, threads),
                       aligned_bytes(products.scratch_bytes()) + turned + sums);
  const Operands with{s, static_cast<const char*>(a), static_cast<const char*>(b),
                      static_cast<char*>(c), static_cast<const char*>(bias)};
  const std::int64_t across = parts(s.n, cut.across);
  parallel_for(parts(s.m, cut.rows) * across, 1, [&](std::int64_t task, std::int64_t) {
    const ScratchSlots::Use slot(scratch);
    const std::int64_t row = task / across * cut.rows, column = task % across * cut.across;
    if (cut.deep) {
      run_deep(with, cut, products, row, column, slot.at(), slot.at() + turned,
               slot.at() + turned + sums);
    } else {
      run_task(with, cut, products, row, column, slot.at(), slot.at() + turned);
    }
  });
}

}  // namespace reprise::kernels::cpu

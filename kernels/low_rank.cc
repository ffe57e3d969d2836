#include "kernels/low_rank.h"

#include <algorithm>
#include <functional>
#include <string_view>

#include "kernels/accumulate.h"
#include "kernels/dispatch.h"
#include "kernels/dropout.h"
#include "kernels/elementwise.h"
#include "kernels/l2_normalize.h"
#include "kernels/matmul.h"
#include "kernels/matrix.h"

namespace reprise::kernels {
namespace {

// A multiple of 4: a mask has four elements to a block of random words.
constexpr std::int64_t kChunkRows = 512;
constexpr std::int64_t kNormRows = 128;

Tensor workspace(const Shape& shape, DType dtype, Device device) {
  return Tensor::empty(shape, dtype, device, MemoryKind::workspace);
}

// [rows, columns] of a tensor whose leading dimensions are taken together.
Tensor as_matrix(std::string_view op, std::string_view argument, const Tensor& x) {
  const std::int64_t stride = expect_rows(op, argument, x);
  return x.as_view(Shape{x.shape().rows(), x.shape().back()}, {stride, 1}, x.offset());
}

Tensor rows_of(const Tensor& matrix, std::int64_t begin, std::int64_t end) {
  return matrix.slice(0, begin, end);
}

void expect_matrix(std::string_view op, std::string_view argument, const Tensor& x,
                   std::string_view form, const Shape& shape, const Tensor& model) {
  if (x.shape() != shape) {
    fail(op, "{} must be {} = {}, got {}", argument, form, to_string(shape), to_string(x.shape()));
  }
  expect_device(op, argument, x, model.device());
}

// The types of an adapter beside those of its layer.
void expect_types(std::string_view op, std::string_view of_layer, const Tensor& layer,
                  std::string_view of_adapter, const Tensor& adapter) {
  expect_trainable(op, of_layer, layer);
  expect_trainable(op, of_adapter, adapter);
  if (adapter.dtype() == DType::bf16 && layer.dtype() != DType::bf16) {
    fail(op, "{} must be f32 as {}, got bf16", of_adapter, of_layer);
  }
}

void expect_same_type(std::string_view op, std::string_view argument, const Tensor& x,
                      const Tensor& model) {
  if (x.dtype() != model.dtype()) {
    fail(op, "{} must be {}, got {}", argument, name(model.dtype()), name(x.dtype()));
  }
}

struct LowRankShapes {
  std::int64_t rows, in, rank;
};

LowRankShapes check_low_rank(const Tensor& x, const Tensor& a, const Tensor& u,
                             std::string_view u_name) {
  constexpr std::string_view op = "low_rank";
  expect_types(op, "x", x, "a", a);
  if (x.rank() == 0 || a.rank() != 2 || a.size(1) != x.shape().back()) {
    fail(op, "a must be [R, I] with the I of x {}, got {}", to_string(x.shape()),
         to_string(a.shape()));
  }
  expect_device(op, "a", a, x.device());
  expect_matrix(op, u_name, u, "[.., R]", x.shape().with(x.rank() - 1, a.size(0)), x);
  expect_same_type(op, u_name, u, a);
  return {x.shape().rows(), a.size(1), a.size(0)};
}

// The rows of x as the product takes them: dropped, and in the dtype of A.
void drop_rows(const Tensor& x, std::int64_t begin, const LowRankOptions& options,
               const Tensor& to) {
  if (options.probability > 0) {
    const auto first = static_cast<std::uint64_t>(begin * x.size(1) / 4);
    dropout(x, options.probability, options.seed, options.offset + first, to);
  } else {
    cast(x, to);
  }
}

// run(begin, end) over rows in chunks.
void each_chunk(std::int64_t rows, const std::function<void(std::int64_t, std::int64_t)>& run) {
  for (std::int64_t begin = 0; begin < rows; begin += kChunkRows) {
    run(begin, std::min(rows, begin + kChunkRows));
  }
}

// The gradient of a small weight as a sum over chunks: in f32, and rounded at the end.
class ChunkedSum {
 public:
  ChunkedSum(const LowRankGradient& to, std::int64_t rows) : to_(to), sum_(to.tensor) {
    if (to.tensor.defined() && to.tensor.dtype() == DType::bf16 && rows > kChunkRows) {
      sum_ = workspace(to.tensor.shape(), DType::f32, to.tensor.device());
      apart_ = true;
    }
    add_ = to.accumulate && !apart_;
    if (to.tensor.defined() && rows == 0 && !to.accumulate) {
      to.tensor.zero();
    }
  }
  bool wanted() const { return to_.tensor.defined(); }
  // += left^T right.
  void add(const Tensor& left, const Tensor& right) {
    matmul(left, right, sum_, {.transpose_a = true, .accumulate = add_});
    add_ = true;
  }
  void finish() {
    if (apart_ && to_.accumulate) {
      accumulate(to_.tensor, sum_);
    } else if (apart_) {
      cast(sum_, to_.tensor);
    }
  }

 private:
  const LowRankGradient& to_;
  Tensor sum_;
  bool apart_ = false, add_ = false;
};

}  // namespace

void low_rank(const Tensor& x, const Tensor& a, const LowRankOptions& options, const Tensor& u) {
  const LowRankShapes size = check_low_rank(x, a, u, "u");
  const Tensor rows = as_matrix("low_rank", "x", x), result = as_matrix("low_rank", "u", u);
  if (options.probability == 0 && x.dtype() == a.dtype()) {
    matmul(rows, a, result, {.transpose_b = true});
  } else {
    const Tensor work =
        workspace({std::min(size.rows, kChunkRows), size.in}, a.dtype(), x.device());
    each_chunk(size.rows, [&](std::int64_t begin, std::int64_t end) {
      const Tensor part = rows_of(work, 0, end - begin);
      drop_rows(rows_of(rows, begin, end), begin, options, part);
      matmul(part, a, rows_of(result, begin, end), {.transpose_b = true});
    });
  }
  if (options.scale != 1) {
    scale(u, options.scale, u);
  }
}

void low_rank_backward(const Tensor& du, const Tensor& x, const Tensor& a,
                       const LowRankOptions& options, const LowRankGradient& dx,
                       const LowRankGradient& da) {
  const LowRankShapes size = check_low_rank(x, a, du, "du");
  Tensor scaled = du;
  if (options.scale != 1) {
    scaled = workspace(du.shape(), du.dtype(), du.device());
    scale(du, options.scale, scaled);
  }
  scaled = as_matrix("low_rank", "du", scaled);
  const bool dropped = options.probability > 0, direct = !dropped && x.dtype() == a.dtype();
  const Tensor to = dx.tensor.defined() ? as_matrix("low_rank", "dx", dx.tensor) : Tensor();
  if (direct && to.defined()) {
    matmul(scaled, a, to, {.accumulate = dx.accumulate});
  }
  ChunkedSum sum(da, direct ? std::min(size.rows, std::int64_t{1}) : size.rows);
  if (direct) {
    if (sum.wanted() && size.rows > 0) {
      sum.add(scaled, as_matrix("low_rank", "x", x));
    }
    return;
  }
  // On x only its layout may be read where A needs no gradient.
  const Tensor rows = sum.wanted() ? as_matrix("low_rank", "x", x) : Tensor();
  const Tensor work = workspace({std::min(size.rows, kChunkRows), size.in}, a.dtype(), x.device());
  each_chunk(size.rows, [&](std::int64_t begin, std::int64_t end) {
    const Tensor part = rows_of(work, 0, end - begin), upstream = rows_of(scaled, begin, end);
    if (sum.wanted()) {
      drop_rows(rows_of(rows, begin, end), begin, options, part);
      sum.add(upstream, part);
    }
    if (to.defined()) {
      const Tensor out = rows_of(to, begin, end);
      matmul(upstream, a, part);
      if (dropped) {
        const auto first = static_cast<std::uint64_t>(begin * size.in / 4);
        dropout(part, options.probability, options.seed, options.offset + first, out,
                dx.accumulate);
      } else if (dx.accumulate) {
        accumulate(out, part);
      } else {
        cast(part, out);
      }
    }
  });
  sum.finish();
}

namespace {

std::int64_t check_add(const Tensor& y, std::string_view y_name, const Tensor& u, const Tensor& b) {
  constexpr std::string_view op = "add_low_rank";
  expect_types(op, y_name, y, "b", b);
  expect_same_type(op, "u", u, b);
  if (y.rank() == 0 || b.rank() != 2 || b.size(0) != y.shape().back()) {
    fail(op, "b must be [O, R] with the O of {} {}, got {}", y_name, to_string(y.shape()),
         to_string(b.shape()));
  }
  expect_device(op, "b", b, y.device());
  expect_matrix(op, "u", u, "[.., R]", y.shape().with(y.rank() - 1, b.size(1)), y);
  return y.shape().rows();
}

}  // namespace

void add_low_rank(const Tensor& y, const Tensor& u, const Tensor& b, const Tensor& z) {
  constexpr std::string_view op = "add_low_rank";
  check_add(y, "y", u, b);
  expect_like(op, "z", z, y, "y");
  expect_same_type(op, "z", z, y);
  if (z.is_meta() || z.raw() != y.raw()) {
    cast(y, z);
  }
  matmul(as_matrix(op, "u", u), b, as_matrix(op, "z", z),
         {.transpose_b = true, .accumulate = true});
}

void add_low_rank_backward(const Tensor& dz, const Tensor& u, const Tensor& b,
                           const LowRankGradient& du, const LowRankGradient& db) {
  constexpr std::string_view op = "add_low_rank";
  const std::int64_t count = check_add(dz, "dz", u, b);
  const Tensor rows = as_matrix(op, "dz", dz);
  const Tensor to = du.tensor.defined() ? as_matrix(op, "du", du.tensor) : Tensor();
  const bool direct = dz.dtype() == b.dtype();
  ChunkedSum sum(db, direct ? std::min(count, std::int64_t{1}) : count);
  const Tensor left = sum.wanted() ? as_matrix(op, "u", u) : Tensor();
  const auto step = [&](const Tensor& part, std::int64_t begin, std::int64_t end) {
    if (to.defined()) {
      matmul(part, b, rows_of(to, begin, end), {.accumulate = du.accumulate});
    }
    if (sum.wanted()) {
      sum.add(part, rows_of(left, begin, end));
    }
  };
  if (direct) {
    if (count > 0) {
      step(rows, 0, count);
    }
    return;
  }
  const Tensor work = workspace({std::min(count, kChunkRows), b.size(0)}, b.dtype(), dz.device());
  each_chunk(count, [&](std::int64_t begin, std::int64_t end) {
    const Tensor part = rows_of(work, 0, end - begin);
    cast(rows_of(rows, begin, end), part);
    step(part, begin, end);
  });
  sum.finish();
}

void merged_norms(const Tensor& w, bool in_out, const Tensor& a, const Tensor& b, double factor,
                  const Tensor& v) {
  constexpr std::string_view op = "merged_norms";
  expect_trainable(op, "w", w);
  expect_trainable(op, "a", a);
  expect_same_type(op, "b", b, a);
  if (w.rank() != 2) {
    fail(op, "w must be a matrix, got {}", to_string(w.shape()));
  }
  const std::int64_t out = w.size(in_out ? 1 : 0), in = w.size(in_out ? 0 : 1);
  if (a.rank() != 2) {
    fail(op, "a must be [R, I], got {}", to_string(a.shape()));
  }
  expect_matrix(op, "a", a, "[R, I]", Shape{a.size(0), in}, w);
  expect_matrix(op, "b", b, "[O, R]", Shape{out, a.size(0)}, w);
  expect_matrix(op, "v", v, "[O]", Shape{out}, w);
  if (v.dtype() != DType::f32) {
    fail(op, "v must be f32, got {}", name(v.dtype()));
  }
  const Tensor work = workspace({std::min(out, kNormRows), in}, DType::f32, w.device());
  const Tensor scaled = workspace(b.shape(), b.dtype(), w.device());
  scale(b, factor, scaled);
  for (std::int64_t begin = 0; begin < out; begin += kNormRows) {
    const std::int64_t end = std::min(out, begin + kNormRows);
    const Tensor part = rows_of(work, 0, end - begin);
    matmul(rows_of(scaled, begin, end), a, part);
    accumulate(part, in_out
                         ? w.slice(1, begin, end).transpose(0, 1).contiguous(MemoryKind::workspace)
                         : rows_of(w, begin, end));
    l2_normalize(part, part, v.slice(0, begin, end));
  }
}

}  // namespace reprise::kernels

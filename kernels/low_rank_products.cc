// The products are the library's; what they take is made in a workspace, some rows at a time. Of
// ops alone, so for every device.
#include <algorithm>
#include <functional>

#include "kernels/accumulate.h"
#include "kernels/dropout.h"
#include "kernels/elementwise.h"
#include "kernels/l2_normalize.h"
#include "kernels/low_rank.h"
#include "kernels/low_rank_sides.h"
#include "kernels/matmul.h"
#include "kernels/matrix.h"

namespace reprise::kernels::products {
namespace {

// A multiple of 4: a mask has four elements to a block of random words.
constexpr std::int64_t kChunkRows = 512;
constexpr std::int64_t kNormRows = 128;
// On a cuda device: enough work for a launch, and most of it stays in the cache of the device.
constexpr std::int64_t kChunkBytesOnCuda = std::int64_t{32} << 20;

// Rows that are made at a time, of `width` elements each.
std::int64_t chunk_rows(std::int64_t width, DType dtype, Device device) {
  if (side_of(device) != DeviceKind::cuda || width == 0) {
    return kChunkRows;
  }
  const std::int64_t rows =
      kChunkBytesOnCuda / (width * static_cast<std::int64_t>(size_bytes(dtype)));
  return std::max(rows / kChunkRows * kChunkRows, kChunkRows);
}

Tensor workspace(const Shape& shape, DType dtype, Device device) {
  return Tensor::empty(shape, dtype, device, MemoryKind::workspace);
}

// [rows, columns] of a tensor whose leading dimensions are taken together.
Tensor as_matrix(const Tensor& x) {
  const std::int64_t stride = *x.row_stride();
  return x.as_view(Shape{x.shape().rows(), x.shape().back()}, {stride, 1}, x.offset());
}

Tensor rows_of(const Tensor& matrix, std::int64_t begin, std::int64_t end) {
  return matrix.slice(0, begin, end);
}

// The rows of x as the product takes them: dropped, and in the dtype of A.
void drop_rows(const Tensor& x, std::int64_t begin, const LowRankOptions& options,
               const Tensor& to) {
  if (options.probability > 0) {
    const auto first = static_cast<std::uint64_t>(begin * x.size(1) / 4);
    kernels::dropout(x, options.probability, options.seed, options.offset + first, to);
  } else {
    kernels::cast(x, to);
  }
}

// run(begin, end) over rows in chunks.
void each_chunk(std::int64_t rows, std::int64_t chunk,
                const std::function<void(std::int64_t, std::int64_t)>& run) {
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    run(begin, std::min(rows, begin + chunk));
  }
}

// The gradient of a small weight as a sum over chunks: in f32, and rounded at the end.
class ChunkedSum {
 public:
  ChunkedSum(const LowRankGradient& to, std::int64_t rows, std::int64_t chunk)
      : to_(to), sum_(to.tensor) {
    if (to.tensor.defined() && to.tensor.dtype() == DType::bf16 && rows > chunk) {
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
    kernels::matmul(left, right, sum_, {.transpose_a = true, .accumulate = add_});
    add_ = true;
  }
  void finish() {
    if (apart_ && to_.accumulate) {
      kernels::accumulate(to_.tensor, sum_);
    } else if (apart_) {
      kernels::cast(sum_, to_.tensor);
    }
  }

 private:
  const LowRankGradient& to_;
  Tensor sum_;
  bool apart_ = false, add_ = false;
};

}  // namespace

void low_rank(const Tensor& x, const Tensor& a, const LowRankOptions& options, const Tensor& u) {
  const std::int64_t count = x.shape().rows(), in = a.size(1);
  const Tensor rows = as_matrix(x), result = as_matrix(u);
  if (options.probability == 0 && x.dtype() == a.dtype()) {
    kernels::matmul(rows, a, result, {.transpose_b = true});
  } else {
    const std::int64_t chunk = chunk_rows(in, a.dtype(), x.device());
    const Tensor work = workspace({std::min(count, chunk), in}, a.dtype(), x.device());
    each_chunk(count, chunk, [&](std::int64_t begin, std::int64_t end) {
      const Tensor part = rows_of(work, 0, end - begin);
      drop_rows(rows_of(rows, begin, end), begin, options, part);
      kernels::matmul(part, a, rows_of(result, begin, end), {.transpose_b = true});
    });
  }
  if (options.scale != 1) {
    kernels::scale(u, options.scale, u);
  }
}

void low_rank_backward(const Tensor& du, const Tensor& x, const Tensor& a,
                       const LowRankOptions& options, const LowRankGradient& dx,
                       const LowRankGradient& da) {
  const std::int64_t count = x.shape().rows(), in = a.size(1);
  Tensor scaled = du;
  if (options.scale != 1) {
    scaled = workspace(du.shape(), du.dtype(), du.device());
    kernels::scale(du, options.scale, scaled);
  }
  scaled = as_matrix(scaled);
  const bool dropped = options.probability > 0, direct = !dropped && x.dtype() == a.dtype();
  const Tensor to = dx.tensor.defined() ? as_matrix(dx.tensor) : Tensor();
  if (direct && to.defined()) {
    kernels::matmul(scaled, a, to, {.accumulate = dx.accumulate});
  }
  const std::int64_t chunk = chunk_rows(in, a.dtype(), x.device());
  ChunkedSum sum(da, direct ? std::min(count, std::int64_t{1}) : count, chunk);
  if (direct) {
    if (sum.wanted() && count > 0) {
      sum.add(scaled, as_matrix(x));
    }
    return;
  }
  // On x only its layout may be read where A needs no gradient.
  const Tensor rows = sum.wanted() ? as_matrix(x) : Tensor();
  const Tensor work = workspace({std::min(count, chunk), in}, a.dtype(), x.device());
  each_chunk(count, chunk, [&](std::int64_t begin, std::int64_t end) {
    const Tensor part = rows_of(work, 0, end - begin), upstream = rows_of(scaled, begin, end);
    if (sum.wanted()) {
      drop_rows(rows_of(rows, begin, end), begin, options, part);
      sum.add(upstream, part);
    }
    if (to.defined()) {
      const Tensor out = rows_of(to, begin, end);
      kernels::matmul(upstream, a, part);
      if (dropped) {
        const auto first = static_cast<std::uint64_t>(begin * in / 4);
        kernels::dropout(part, options.probability, options.seed, options.offset + first, out,
                         dx.accumulate);
      } else if (dx.accumulate) {
        kernels::accumulate(out, part);
      } else {
        kernels::cast(part, out);
      }
    }
  });
  sum.finish();
}

void add_low_rank(const Tensor& y, const Tensor& u, const Tensor& b, const Tensor& z) {
  if (z.is_meta() || z.raw() != y.raw()) {
    kernels::cast(y, z);
  }
  kernels::matmul(as_matrix(u), b, as_matrix(z), {.transpose_b = true, .accumulate = true});
}

void add_low_rank_backward(const Tensor& dz, const Tensor& u, const Tensor& b,
                           const LowRankGradient& du, const LowRankGradient& db) {
  const std::int64_t count = dz.shape().rows();
  const Tensor rows = as_matrix(dz);
  const Tensor to = du.tensor.defined() ? as_matrix(du.tensor) : Tensor();
  const bool direct = dz.dtype() == b.dtype();
  const std::int64_t chunk = chunk_rows(b.size(0), b.dtype(), dz.device());
  ChunkedSum sum(db, direct ? std::min(count, std::int64_t{1}) : count, chunk);
  const Tensor left = sum.wanted() ? as_matrix(u) : Tensor();
  const auto step = [&](const Tensor& part, std::int64_t begin, std::int64_t end) {
    if (to.defined()) {
      kernels::matmul(part, b, rows_of(to, begin, end), {.accumulate = du.accumulate});
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
  const Tensor work = workspace({std::min(count, chunk), b.size(0)}, b.dtype(), dz.device());
  each_chunk(count, chunk, [&](std::int64_t begin, std::int64_t end) {
    const Tensor part = rows_of(work, 0, end - begin);
    kernels::cast(rows_of(rows, begin, end), part);
    step(part, begin, end);
  });
  sum.finish();
}

void merged_norms(const Tensor& w, bool in_out, const Tensor& a, const Tensor& b, double factor,
                  const Tensor& v) {
  const std::int64_t out = w.size(in_out ? 1 : 0), in = w.size(in_out ? 0 : 1);
  const Tensor work = workspace({std::min(out, kNormRows), in}, DType::f32, w.device());
  const Tensor scaled = workspace(b.shape(), b.dtype(), w.device());
  kernels::scale(b, factor, scaled);
  for (std::int64_t begin = 0; begin < out; begin += kNormRows) {
    const std::int64_t end = std::min(out, begin + kNormRows);
    const Tensor part = rows_of(work, 0, end - begin);
    kernels::matmul(rows_of(scaled, begin, end), a, part);
    kernels::accumulate(
        part, in_out ? w.slice(1, begin, end).transpose(0, 1).contiguous(MemoryKind::workspace)
                     : rows_of(w, begin, end));
    kernels::l2_normalize(part, part, v.slice(0, begin, end));
  }
}

}  // namespace reprise::kernels::products

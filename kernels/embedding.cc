#include "kernels/embedding.h"

#include <limits>
#include <string>
#include <vector>

#include "core/cuda_device.h"
#include "kernels/embedding_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {
namespace {

Shape shape_of_rows(const Tensor& ids, std::int64_t width) {
  if (ids.rank() == Shape::kMaxRank) {
    fail("embedding", "ids must have at most {} dimensions, got {}", Shape::kMaxRank - 1,
         to_string(ids.shape()));
  }
  std::vector<std::int64_t> sizes(ids.shape().sizes().begin(), ids.shape().sizes().end());
  sizes.push_back(width);
  return Shape(std::span<const std::int64_t>(sizes));
}

std::string wrong_id(const DeviceFault& fault) {
  return fmt::format("id at position {} must be in [0, V) = [0, {}), got {}", fault.index,
                     fault.limit, fault.value);
}

void expect_in_range(const Tensor& ids, std::int64_t rows) {
  const std::int64_t* at = ids.numel() == 0 ? nullptr : ids.data<std::int64_t>();
  for (std::int64_t i = 0; i < ids.numel(); ++i) {
    if (at[i] < 0 || at[i] >= rows) {
      fail("embedding", "{}", wrong_id({.index = i, .value = at[i], .limit = rows}));
    }
  }
}

// The ids, checked where they are.
const std::int64_t* checked(const Tensor& ids, std::int64_t rows) {
  expect_dtype("embedding", "ids", ids, DType::i64);
  expect_contiguous("embedding", "ids", ids);
  const std::int64_t* at = ids.numel() == 0 ? nullptr : ids.data<std::int64_t>();
  if (ids.device().kind == DeviceKind::cuda) {
    check_indices(
        {.at = at, .count = ids.numel(), .limit = rows, .site = fault_site("embedding", wrong_id)},
        ids.device());
  } else {
    expect_in_range(ids, rows);
  }
  return at;
}

}  // namespace

void embedding(const Tensor& ids, const Tensor& table, const Tensor& y) {
  expect_trainable("embedding", "table", table);
  if (table.rank() != 2) {
    fail("embedding", "table must be [V, C], got {}", to_string(table.shape()));
  }
  expect_device("embedding", "ids", ids, table.device());
  const std::int64_t* all = checked(ids, table.size(0));
  expect_dtype("embedding", "y", y, table.dtype());
  expect_shape("embedding", "y", y, shape_of_rows(ids, table.size(1)), "[.., C]");
  expect_device("embedding", "y", y, table.device());
  const Matrix rows = matrix("embedding", "table", table), to = matrix("embedding", "y", y);
  if (y.is_meta() || y.numel() == 0) {
    return;
  }
  const EmbeddingCall call{all, ids.numel(), rows, to, table.size(0), table.size(1)};
  if (y.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("embedding", cuda::embedding(call, cuda_stream(y.device())));
    return;
  }
  cpu::embedding(call);
}

void embedding_gradient(const Tensor& ids, const Tensor& dy, std::int64_t padding,
                        const Tensor& dtable, bool accumulate) {
  expect_trainable("embedding", "dtable", dtable);
  if (dtable.rank() != 2) {
    fail("embedding", "dtable must be [V, C], got {}", to_string(dtable.shape()));
  }
  expect_device("embedding", "ids", ids, dtable.device());
  const std::int64_t rows = dtable.size(0), width = dtable.size(1);
  const std::int64_t* all = checked(ids, rows);
  expect_trainable("embedding", "dy", dy);
  expect_shape("embedding", "dy", dy, shape_of_rows(ids, width), "[.., C]");
  expect_device("embedding", "dy", dy, dtable.device());
  const Matrix from = matrix("embedding", "dy", dy), to = matrix("embedding", "dtable", dtable);
  const std::int64_t bytes = side_of(dtable.device()) == DeviceKind::cuda
                                 ? cuda::EmbeddingWorkspace(ids.numel(), width).bytes
                                 : cpu::embedding_workspace_bytes(ids.numel());
  const Tensor workspace =
      Tensor::empty({bytes / 4}, DType::f32, ids.device(), MemoryKind::workspace);
  if (dtable.is_meta() || dtable.numel() == 0) {
    return;
  }
  ensure(rows < std::numeric_limits<std::int32_t>::max() &&
             ids.numel() < std::numeric_limits<std::int32_t>::max(),
         "an embedding of {} rows and {} ids", rows, ids.numel());
  const EmbeddingGradient call{all,     ids.numel(), from,
                               to,      rows,        width,
                               padding, accumulate,  ids.numel() == 0 ? nullptr : workspace.raw()};
  if (dtable.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("embedding", cuda::embedding_gradient(call, cuda_stream(dtable.device())));
    return;
  }
  cpu::embedding_gradient(call);
}

}  // namespace reprise::kernels

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/embedding_cpu.cc"
#include <algorithm>
#include <cstring>

#include "hwy/foreach_target.h"
#include "kernels/embedding_sides.h"
#include "kernels/pieces.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

// Row `id` of the table's gradient from the rows of dy at the `count` positions.
void sum_rows_run(const EmbeddingGradient& call, std::int64_t id, const std::int64_t* keys,
                  std::int64_t count) {
  HWY_ALIGN float block[kBlock];
  HWY_ALIGN float total[kBlock];
  for (std::int64_t begin = 0; begin < call.width; begin += kBlock) {
    const std::int64_t size = std::min(kBlock, call.width - begin);
    std::fill_n(total, size, 0.0f);
    for (std::int64_t i = 0; i < count; ++i) {
      const Matrix row = call.dy.run(keys[i] & 0xffffffff, begin);
      map(Plus(), static_cast<const float*>(total), staged(row.at, row.dtype, size, block), total,
          size);
    }
    const Matrix to = call.dtable.run(id, begin);
    write_block(total, to.at, to.dtype, call.accumulate, size);
  }
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(sum_rows_run);

std::int64_t grain_of(std::int64_t width) {
  return std::max<std::int64_t>(1, kPieceElements / std::max<std::int64_t>(1, width));
}

// In the workspace: (id, position) sorted, and where each id starts in that.
struct Grouped {
  std::int64_t *order, *runs;
  std::int64_t count = 0;  // of runs
};

Grouped group(const EmbeddingGradient& call) {
  const std::int64_t count = call.count;
  auto* const order = static_cast<std::int64_t*>(call.workspace);
  Grouped grouped{order, order + count};
  for (std::int64_t i = 0; i < count; ++i) {
    order[i] = call.ids[i] << 32 | i;
  }
  std::sort(order, order + count);
  for (std::int64_t i = 0; i < count; ++i) {
    if (i == 0 || order[i] >> 32 != order[i - 1] >> 32) {
      grouped.runs[grouped.count++] = i;
    }
  }
  return grouped;
}

}  // namespace

void embedding(const EmbeddingCall& call) {
  const auto row_bytes = static_cast<std::size_t>(call.width) * size_bytes(call.table.dtype);
  parallel_for(call.count, grain_of(call.width), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::memcpy(call.y.element(i, 0), call.table.element(call.ids[i], 0), row_bytes);
    }
  });
}

void embedding_gradient(const EmbeddingGradient& call) {
  if (!call.accumulate) {
    const auto row_bytes = static_cast<std::size_t>(call.width) * size_bytes(call.dtable.dtype);
    parallel_for(call.rows, grain_of(call.width), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        std::memset(call.dtable.element(row, 0), 0, row_bytes);
      }
    });
  }
  if (call.count == 0) {
    return;
  }
  const auto [order, runs, run_count] = group(call);
  parallel_for(run_count, grain_of(4 * call.width), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t run = begin; run < end; ++run) {
      const std::int64_t first = runs[run];
      const std::int64_t id = order[first] >> 32;
      if (id != call.padding) {
        const std::int64_t last = run + 1 < run_count ? runs[run + 1] : call.count;
        HWY_DYNAMIC_DISPATCH(sum_rows_run)(call, id, order + first, last - first);
      }
    }
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE

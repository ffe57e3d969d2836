#include "kernels/matmul_tile.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "core/error.h"

namespace reprise::kernels {
namespace {

struct Hash {
  std::size_t operator()(const TileShape& s) const {
    std::size_t hash = 0;
    const auto mix = [&hash](std::int64_t value) {
      hash = (hash ^ static_cast<std::size_t>(value)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    };
    for (const std::int64_t value : {s.m, s.n, s.k, s.lda, s.ldb, s.ldc}) {
      mix(value);
    }
    mix(s.transpose_a + 2 * s.transpose_b + 4 * s.accumulate + 8 * static_cast<int>(s.inputs) +
        64 * static_cast<int>(s.output) + 512 * (s.bias ? 1 + static_cast<int>(*s.bias) : 0));
    return hash;
  }
};

// Products are made once and shared. When sizes never repeat (a new length at every step) the cache
// starts again rather than grow for ever; who runs a product holds it meanwhile.
class Cache {
 public:
  std::shared_ptr<const TileProduct> find(const TileShape& shape) {
    {
      const std::shared_lock lock(mutex_);
      if (const auto at = products_.find(shape); at != products_.end()) {
        return at->second;
      }
    }
    std::shared_ptr<const TileProduct> made = make(shape);
    const std::unique_lock lock(mutex_);
    if (products_.size() >= kMost) {
      products_.clear();
    }
    return products_.emplace(shape, std::move(made)).first->second;
  }

 private:
  static constexpr std::size_t kMost = 4096;

  static std::unique_ptr<TileProduct> make(const TileShape& shape) {
    if (auto product = cpu::library_tile_product(shape)) {
      return product;
    }
    return widened_tile_product(shape, &cpu::library_tile_product);
  }

  std::shared_mutex mutex_;
  std::unordered_map<TileShape, std::shared_ptr<const TileProduct>, Hash> products_;
};

void widen(const void* from, DType dtype, std::int64_t stride, std::int64_t rows,
           std::int64_t width, float* to) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int64_t at = row * stride + i;
      to[row * width + i] = dtype == DType::bf16 ? to_float(static_cast<const bfloat16*>(from)[at])
                                                 : static_cast<const float*>(from)[at];
    }
  }
}

std::int64_t padded(std::int64_t floats) {
  return (floats + 15) / 16 * 16;
}

// Goes along K in parts, so that the widened copies stay small.
class Widened final : public TileProduct {
 public:
  Widened(const TileShape& shape, std::unique_ptr<TileProduct> (*f32_product)(const TileShape&))
      : shape_(shape), part_(std::min(shape.k, kPart)) {
    TileShape inner = shape;
    inner.ldc = shape.n;
    inner.inputs = inner.output = DType::f32;
    if (shape.bias) {
      inner.bias = DType::f32;
    }
    const auto make = [&](std::int64_t k) {
      inner.k = k;
      inner.lda = shape.transpose_a ? shape.m : k;
      inner.ldb = shape.transpose_b ? k : shape.n;
      auto product = f32_product(inner);
      ensure(product != nullptr, "there is a product of f32 matrices");
      return product;
    };
    first_ = make(part_);
    inner.accumulate = true;
    inner.bias.reset();
    if (shape.k >= 2 * part_) {
      next_ = make(part_);
    }
    if (shape.k % part_ != 0) {
      last_ = make(shape.k % part_);
    }
  }

  std::int64_t scratch_bytes() const override {
    std::int64_t most = 0;
    for (const auto* product : {&first_, &next_, &last_}) {
      most = std::max(most, *product ? (*product)->scratch_bytes() : 0);
    }
    return 4 * (padded(shape_.m * part_) + padded(part_ * shape_.n) + padded(shape_.m * shape_.n) +
                padded(shape_.n)) +
           most;
  }

  void run(const void* a, const void* b, void* c, const void* bias, void* scratch) const override {
    float* const wide_a = static_cast<float*>(scratch);
    float* const wide_b = wide_a + padded(shape_.m * part_);
    float* const wide_c = wide_b + padded(part_ * shape_.n);
    float* const wide_bias = wide_c + padded(shape_.m * shape_.n);
    if (shape_.accumulate) {
      widen(c, shape_.output, shape_.ldc, shape_.m, shape_.n, wide_c);
    }
    if (shape_.bias) {
      widen(bias, *shape_.bias, 0, 1, shape_.n, wide_bias);
    }
    for (std::int64_t at = 0; at < shape_.k; at += part_) {
      const std::int64_t k = std::min(part_, shape_.k - at);
      widen_part(a, shape_.lda, shape_.transpose_a, at, k, shape_.m, wide_a);
      widen_part(b, shape_.ldb, !shape_.transpose_b, at, k, shape_.n, wide_b);
      const TileProduct& product = at == 0 ? *first_ : k == part_ ? *next_ : *last_;
      product.run(wide_a, wide_b, wide_c, wide_bias, wide_bias + padded(shape_.n));
    }
    narrow(wide_c, c);
  }

 private:
  static constexpr std::int64_t kPart = 1024;

  // `k` steps of K from `at` on: rows of `width` where K goes down the rows, else columns.
  void widen_part(const void* from, std::int64_t stride, bool k_is_rows, std::int64_t at,
                  std::int64_t k, std::int64_t width, float* to) const {
    const std::int64_t skip = k_is_rows ? at * stride : at;
    const void* const part = static_cast<const char*>(from) +
                             skip * static_cast<std::int64_t>(size_bytes(shape_.inputs));
    widen(part, shape_.inputs, stride, k_is_rows ? k : width, k_is_rows ? width : k, to);
  }

  void narrow(const float* wide, void* c) const {
    for (std::int64_t row = 0; row < shape_.m; ++row) {
      const float* const from = wide + row * shape_.n;
      if (shape_.output == DType::bf16) {
        std::transform(from, from + shape_.n, static_cast<bfloat16*>(c) + row * shape_.ldc,
                       to_bfloat16);
      } else {
        std::copy(from, from + shape_.n, static_cast<float*>(c) + row * shape_.ldc);
      }
    }
  }

  TileShape shape_;
  std::int64_t part_;
  std::unique_ptr<TileProduct> first_, next_, last_;  // of K: overwrites or adds to what was there
};

}  // namespace

std::shared_ptr<const TileProduct> tile_product(const TileShape& shape) {
  // Never destroyed: kernels may still run while the process ends.
  static Cache& cache = *new Cache;
  return cache.find(shape);
}

std::unique_ptr<TileProduct> widened_tile_product(
    const TileShape& shape, std::unique_ptr<TileProduct> (*f32_product)(const TileShape&)) {
  return std::make_unique<Widened>(shape, f32_product);
}

}  // namespace reprise::kernels

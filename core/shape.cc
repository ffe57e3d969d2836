#include "core/shape.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/error.h"

namespace reprise {

Shape::Shape(std::initializer_list<std::int64_t> sizes)
    : Shape(std::span<const std::int64_t>(sizes.begin(), sizes.size())) {}

Shape::Shape(std::span<const std::int64_t> sizes) {
  if (sizes.size() > kMaxRank) {
    fail("shape", "rank must be at most {}, got {}", kMaxRank, sizes.size());
  }
  std::int64_t numel = 1;
  for (std::int64_t size : sizes) {
    if (size < 0) {
      fail("shape", "sizes must not be negative, got [{}]", fmt::join(sizes, ", "));
    }
    if (__builtin_mul_overflow(numel, size, &numel)) {
      fail("shape", "number of elements overflows 63 bits: [{}]", fmt::join(sizes, ", "));
    }
    sizes_[rank_++] = size;
  }
}

std::int64_t Shape::numel() const {
  std::int64_t product = 1;
  for (int dim = 0; dim < rank_; ++dim) {
    product *= sizes_[dim];
  }
  return product;
}

std::int64_t Shape::rows() const {
  std::int64_t product = 1;
  for (int dim = 0; dim + 1 < rank_; ++dim) {
    product *= sizes_[dim];
  }
  return product;
}

Shape Shape::with(int dim, std::int64_t size) const {
  Shape copy = *this;
  copy.sizes_[dim] = size;
  return copy;
}

std::string to_string(const Shape& shape) {
  return fmt::format("[{}]", fmt::join(shape.sizes(), ", "));
}

}  // namespace reprise

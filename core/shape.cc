#include "core/shape.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/error.h"

namespace reprise {

namespace {

// Bytes of any dtype then fit in 63 bits.
constexpr std::int64_t kMostElements = std::int64_t{1} << 60;

}  // namespace

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
    sizes_[rank_++] = size;
    // A size of 0 does not excuse the others: products of some of them are taken, as rows() does.
    if (__builtin_mul_overflow(numel, std::max<std::int64_t>(1, size), &numel) ||
        numel > kMostElements) {
      fail("shape", "must have at most 2^60 elements, got [{}]", fmt::join(sizes, ", "));
    }
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
  auto sizes = sizes_;
  sizes[static_cast<std::size_t>(dim)] = size;
  return Shape(std::span<const std::int64_t>(sizes.data(), static_cast<std::size_t>(rank_)));
}

std::string to_string(const Shape& shape) {
  return fmt::format("[{}]", fmt::join(shape.sizes(), ", "));
}

}  // namespace reprise

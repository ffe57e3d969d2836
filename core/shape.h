// Sizes of up to six dimensions, outermost first. Zero-sized dimensions are allowed.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

namespace reprise {

class Shape {
 public:
  static constexpr int kMaxRank = 6;

  Shape() = default;  // rank 0: a scalar, one element
  // Throws Error when there are more than six sizes, a negative one, or more than 2^60 elements.
  Shape(std::initializer_list<std::int64_t> sizes);
  explicit Shape(std::span<const std::int64_t> sizes);

  int rank() const { return rank_; }
  std::int64_t operator[](int dim) const { return sizes_[dim]; }
  // Counted from the end: back(0) is the innermost size.
  std::int64_t back(int from_end = 0) const { return sizes_[rank_ - 1 - from_end]; }
  // Product of the sizes; 1 for a scalar.
  std::int64_t numel() const;
  // Product of all sizes but the innermost: the rows of a tensor seen as a matrix.
  std::int64_t rows() const;
  // A copy with one size replaced.
  Shape with(int dim, std::int64_t size) const;
  std::span<const std::int64_t> sizes() const {
    return {sizes_.data(), static_cast<std::size_t>(rank_)};
  }
  friend bool operator==(const Shape&, const Shape&) = default;

 private:
  std::array<std::int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

// "[2, 3, 4]".
std::string to_string(const Shape& shape);

}  // namespace reprise

#include "distributed/rank_tree.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <type_traits>
#include <vector>

namespace reprise::distributed {
namespace {

constexpr std::int64_t kBlock = 1024;

template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

template <class T>
void combine(T* into, const T* x, std::int64_t count, Reduce reduce) {
  switch (reduce) {
    case Reduce::sum:
      for (std::int64_t i = 0; i < count; ++i) {
        into[i] = wrapping_add(into[i], x[i]);
      }
      break;
    case Reduce::max:  // a != a: NaN wins
      for (std::int64_t i = 0; i < count; ++i) {
        into[i] = (into[i] > x[i] || into[i] != into[i]) ? into[i] : x[i];
      }
      break;
    case Reduce::min:
      for (std::int64_t i = 0; i < count; ++i) {
        into[i] = (into[i] < x[i] || into[i] != into[i]) ? into[i] : x[i];
      }
      break;
  }
}

// T as it is stored, A as it is added.
template <class T, class A>
class Tree {
 public:
  Tree(std::span<const void* const> parts, Reduce reduce)
      : parts_(parts),
        reduce_(reduce),
        blocks_(static_cast<std::size_t>(std::bit_width(parts.size()) + 1)) {}

  void run(void* out, std::int64_t count) {
    for (std::int64_t at = 0; at < count; at += kBlock) {
      const std::int64_t n = std::min(kBlock, count - at);
      node(0, parts_.size(), at, n, 0);
      T* to = static_cast<T*>(out) + at;
      const A* sum = blocks_[0].data();
      for (std::int64_t i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          to[i] = to_bfloat16(sum[i]);
        } else {
          to[i] = sum[i];
        }
      }
    }
  }

 private:
  void node(std::size_t first, std::size_t n, std::int64_t at, std::int64_t count,
            std::size_t depth) {
    A* into = blocks_[depth].data();
    if (n == 1) {
      const T* from = static_cast<const T*>(parts_[first]) + at;
      for (std::int64_t i = 0; i < count; ++i) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          into[i] = to_float(from[i]);
        } else {
          into[i] = from[i];
        }
      }
      return;
    }
    const std::size_t left = std::bit_floor(n - 1);
    node(first, left, at, count, depth);
    node(first + left, n - left, at, count, depth + 1);
    combine(into, blocks_[depth + 1].data(), count, reduce_);
  }

  std::span<const void* const> parts_;
  Reduce reduce_;
  std::vector<std::array<A, kBlock>> blocks_;
};

}  // namespace

void reduce_tree(std::span<const void* const> parts, void* out, std::int64_t count, DType dtype,
                 Reduce reduce) {
  switch (dtype) {
    case DType::f32:
      return Tree<float, float>(parts, reduce).run(out, count);
    case DType::bf16:
      return Tree<bfloat16, float>(parts, reduce).run(out, count);
    case DType::f64:
      return Tree<double, double>(parts, reduce).run(out, count);
    case DType::i32:
      return Tree<std::int32_t, std::int32_t>(parts, reduce).run(out, count);
    case DType::i64:
      return Tree<std::int64_t, std::int64_t>(parts, reduce).run(out, count);
  }
}

}  // namespace reprise::distributed

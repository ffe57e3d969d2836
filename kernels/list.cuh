// A kernel over a list of tensors: blocks take chunks of them, whichever tensor a chunk is of. The
// list travels as the kernel's argument, so nothing is copied and a captured launch keeps it; lists
// that are longer are launched in several parts.
#pragma once

#include <algorithm>
#include <span>

#include "kernels/device.cuh"

namespace reprise::kernels::cuda {

inline constexpr int kMostListed = 256;

template <class Item>
struct Listed {
  int count;
  int firsts[kMostListed + 1];  // the first chunk of each
  Item items[kMostListed];
};
// Of a kernel's arguments, from CUDA 12.1 on.
inline constexpr std::size_t kMostArgumentBytes = 32764;

// Which tensor a chunk is of: the last one that begins at it or before, of those that have any.
template <class Item>
__device__ __forceinline__ int listed_at(const Listed<Item>& list, int chunk) {
  int low = 0, high = list.count;  // firsts[low] <= chunk < firsts[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.firsts[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Item has `std::int64_t count`, its elements. Calls start(list, chunks) for each part.
template <class Item, class Start>
void for_lists(std::span<const Item> items, std::int64_t chunk_elements, const Start& start) {
  for (std::size_t begin = 0; begin < items.size(); begin += kMostListed) {
    static_assert(sizeof(Listed<Item>) <= kMostArgumentBytes);
    Listed<Item> list;
    list.count = static_cast<int>(std::min<std::size_t>(kMostListed, items.size() - begin));
    list.firsts[0] = 0;
    for (int i = 0; i < list.count; ++i) {
      list.items[i] = items[begin + static_cast<std::size_t>(i)];
      list.firsts[i + 1] =
          list.firsts[i] +
          static_cast<int>((list.items[i].count + chunk_elements - 1) / chunk_elements);
    }
    start(list, list.firsts[list.count]);
  }
}

}  // namespace reprise::kernels::cuda

// How gradients are laid into buckets.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/dtype.h"

namespace reprise::distributed {

struct BucketOptions {
  std::int64_t first_bucket_bytes = std::int64_t{1} << 20;  // small: communication starts early
  std::int64_t bucket_bytes = std::int64_t{25} << 20;
};

struct BucketEntry {
  std::size_t parameter;  // as numbered by the caller
  std::int64_t numel;
  DType dtype;
};

struct Bucket {
  struct Slot {
    std::size_t parameter;
    std::int64_t offset, numel;  // elements; slots start at multiples of 64 bytes
  };
  DType dtype = DType::f32;
  std::int64_t numel = 0;
  std::vector<Slot> slots;
};

// Entries in the order in which they become ready. A bucket holds one dtype and at most its limit,
// or one entry that is larger; the first of each dtype has the first limit. Buckets stand in the
// order in which they can be launched: by their last entry.
std::vector<Bucket> lay_out(std::span<const BucketEntry> entries, const BucketOptions& options);

}  // namespace reprise::distributed

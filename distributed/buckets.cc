#include "distributed/buckets.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace reprise::distributed {

std::vector<Bucket> lay_out(std::span<const BucketEntry> entries, const BucketOptions& options) {
  if (options.first_bucket_bytes <= 0 || options.bucket_bytes <= 0) {
    fail("buckets", "limits must be positive, got {} and {} bytes", options.first_bucket_bytes,
         options.bucket_bytes);
  }
  struct Open {
    Bucket bucket;
    std::size_t last = 0;
    bool first = true;
  };
  std::vector<std::pair<DType, Open>> open;
  std::vector<std::pair<std::size_t, Bucket>> closed;
  auto close = [&](Open& o) {
    closed.emplace_back(o.last, std::move(o.bucket));
    o.bucket = {};
    o.first = false;
  };
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const BucketEntry& entry = entries[i];
    auto it = std::ranges::find(open, entry.dtype, [](const auto& pair) { return pair.first; });
    if (it == open.end()) {
      it = open.emplace(open.end(), entry.dtype, Open{});
    }
    Open& o = it->second;
    const auto width = static_cast<std::int64_t>(size_bytes(entry.dtype));
    const std::int64_t align = 64 / width;
    const std::int64_t limit = o.first ? options.first_bucket_bytes : options.bucket_bytes;
    std::int64_t offset = (o.bucket.numel + align - 1) / align * align;
    if (!o.bucket.slots.empty() && (offset + entry.numel) * width > limit) {
      close(o);
      offset = 0;
    }
    o.bucket.dtype = entry.dtype;
    o.bucket.slots.push_back({entry.parameter, offset, entry.numel});
    o.bucket.numel = offset + entry.numel;
    o.last = i;
  }
  for (auto& [dtype, o] : open) {
    if (!o.bucket.slots.empty()) {
      close(o);
    }
  }
  std::ranges::sort(closed, {}, [](const auto& pair) { return pair.first; });
  std::vector<Bucket> buckets;
  for (auto& [last, bucket] : closed) {
    buckets.push_back(std::move(bucket));
  }
  return buckets;
}

}  // namespace reprise::distributed

#include "core/allocator.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "core/arena.h"
#include "core/cuda_device.h"
#include "core/error.h"
#include "core/out_of_memory.h"

namespace reprise {
namespace {

constexpr std::size_t kGuardBytes = 64;
constexpr unsigned char kGuardByte = 0xA5;
constexpr unsigned char kPoisonByte = 0xFF;  // a NaN in every floating type

bool intact(const unsigned char* guard) {
  return std::all_of(guard, guard + kGuardBytes, [](unsigned char c) { return c == kGuardByte; });
}

// Who holds what, for whoever got no more.
std::string holders(std::int64_t live_bytes, const BytesByKind& live,
                    const std::vector<std::string>& labels,
                    const std::vector<std::int64_t>& live_by_label) {
  constexpr std::size_t kMostSegments = 5;
  std::string text = fmt::format("held are {} bytes", live_bytes);
  const char* before = ": ";
  for (std::size_t kind = 0; kind < kMemoryKinds; ++kind) {
    if (live[kind] > 0) {
      text += fmt::format("{}{} {}", before, name(static_cast<MemoryKind>(kind)), live[kind]);
      before = ", ";
    }
  }
  std::vector<std::pair<std::int64_t, std::string_view>> segments;
  for (std::size_t i = 1; i < labels.size(); ++i) {
    if (live_by_label[i] > 0) {
      segments.emplace_back(live_by_label[i], labels[i]);
    }
  }
  std::sort(segments.begin(), segments.end(), std::greater<>());
  before = "; segments: ";
  for (std::size_t i = 0; i < std::min(segments.size(), kMostSegments); ++i) {
    text += fmt::format("{}{} {}", before, segments[i].second, segments[i].first);
    before = ", ";
  }
  const std::int64_t policies = live[static_cast<std::size_t>(MemoryKind::activations)] +
                                live[static_cast<std::size_t>(MemoryKind::saved)];
  return text + fmt::format(
                    "; policies that keep less share {} of them, `reprise memory` says "
                    "which one fits",
                    policies);
}

}  // namespace

std::string_view name(MemoryKind kind) {
  constexpr std::string_view kNames[kMemoryKinds] = {
      "parameters", "gradients", "optimizer", "activations", "saved", "workspace", "communication"};
  return kNames[static_cast<std::size_t>(kind)];
}

Allocator::Allocator(Device device, std::unique_ptr<MemorySource> source)
    : device_(device),
      source_(std::move(source), device != cpu && device.kind != DeviceKind::meta),
      start_(std::chrono::steady_clock::now()) {}

std::int64_t Allocator::transient_bytes() const {
  return live_[static_cast<std::size_t>(MemoryKind::activations)] +
         live_[static_cast<std::size_t>(MemoryKind::saved)] +
         live_[static_cast<std::size_t>(MemoryKind::workspace)];
}

void Allocator::count(std::int64_t delta_bytes, MemoryKind kind, std::uint32_t segment) {
  const auto k = static_cast<std::size_t>(kind);
  live_bytes_ += delta_bytes;
  live_[k] += delta_bytes;
  live_by_label_[segment] += delta_bytes;
  if (delta_bytes > 0) {
    peak_[k] = std::max(peak_[k], live_[k]);
    peak_by_label_[segment] = std::max(peak_by_label_[segment], live_by_label_[segment]);
    peak_transient_bytes_ = std::max(peak_transient_bytes_, transient_bytes());
    if (live_bytes_ > peak_bytes_) {
      peak_bytes_ = live_bytes_;
      at_peak_ = live_;
    }
  }
  add_event(delta_bytes, kind, segment);
}

void Allocator::add_event(std::int64_t delta_bytes, MemoryKind kind, std::uint32_t segment) {
  if (timeline_) {
    const auto now = std::chrono::steady_clock::now() - start_;
    events_.push_back({std::chrono::duration_cast<std::chrono::microseconds>(now).count(),
                       live_bytes_, delta_bytes, kind, segment});
  }
}

void* Allocator::allocate(std::size_t bytes, MemoryKind kind, bool real, std::uint32_t& segment,
                          std::uint64_t& number) {
  std::lock_guard lock(mutex_);
  if (fault_) {
    fault_(bytes);
  }
  void* at = nullptr;
  const auto explained = [&](const Error& error) {
    return fmt::format("{}; wanted as {}{}{}; {}", error.what(), name(kind),
                       label_ == 0 ? "" : " in ", labels_[label_],
                       holders(live_bytes_, live_, labels_, live_by_label_));
  };
  const auto take = [&](std::size_t count) {
    try {
      return source_.allocate(count);
    } catch (const OutOfMemory& error) {
      throw OutOfMemory(explained(error), error.device(), error.available_bytes() + live_bytes_);
    } catch (const Error& error) {
      throw Error(explained(error));
    }
  };
  if (real && bytes > 0) {
    if (guard_ && device_.kind != DeviceKind::cuda) {
      auto* block = static_cast<unsigned char*>(take(bytes + 2 * kGuardBytes));
      std::memset(block, kGuardByte, kGuardBytes);
      std::memset(block + kGuardBytes + bytes, kGuardByte, kGuardBytes);
      at = block + kGuardBytes;
    } else {
      at = take(bytes);
    }
  }
  segment = label_;
  number = 0;
  if (tracing_ && bytes > 0) {
    number = trace_begin_ + trace_.size();
    trace_.push_back({static_cast<std::int64_t>(bytes), trace_clock_++, Lifetime::kOpen});
  }
  count(static_cast<std::int64_t>(bytes), kind, segment);
  return at;
}

void Allocator::free(void* at, std::size_t bytes, MemoryKind kind, std::uint32_t segment,
                     std::uint64_t number) noexcept {
  std::lock_guard lock(mutex_);
  if (tracing_ && number >= trace_begin_) {
    trace_[number - trace_begin_].end = trace_clock_++;
  }
  count(-static_cast<std::int64_t>(bytes), kind, segment);
  if (at == nullptr) {
    return;
  }
  const bool host = device_.kind != DeviceKind::cuda;
  if (poison_ && host) {
    std::memset(at, kPoisonByte, bytes);
  }
  if (guard_ && host) {
    auto* block = static_cast<unsigned char*>(at) - kGuardBytes;
    if (!intact(block) || !intact(block + kGuardBytes + bytes)) {
      ++damaged_;
    }
    source_.free(block, bytes + 2 * kGuardBytes);
  } else {
    source_.free(at, bytes);
  }
}

void Allocator::reclassify(std::size_t bytes, MemoryKind from, MemoryKind to,
                           std::uint32_t segment) {
  std::lock_guard lock(mutex_);
  add_event(-static_cast<std::int64_t>(bytes), from, segment);
  add_event(static_cast<std::int64_t>(bytes), to, segment);
  live_[static_cast<std::size_t>(from)] -= static_cast<std::int64_t>(bytes);
  auto& live = live_[static_cast<std::size_t>(to)];
  live += static_cast<std::int64_t>(bytes);
  auto& peak = peak_[static_cast<std::size_t>(to)];
  peak = std::max(peak, live);
}

MemoryReport Allocator::report() const {
  std::lock_guard lock(mutex_);
  MemoryReport report{live_bytes_, peak_bytes_, live_, at_peak_, peak_, peak_transient_bytes_, {}};
  for (std::size_t i = 1; i < labels_.size(); ++i) {
    report.peak_by_segment[labels_[i]] = peak_by_label_[i];
  }
  return report;
}

void Allocator::reset_peak() {
  std::lock_guard lock(mutex_);
  peak_bytes_ = live_bytes_;
  at_peak_ = peak_ = live_;
  peak_transient_bytes_ = transient_bytes();
  peak_by_label_ = live_by_label_;
}

std::string Allocator::set_segment(std::string label) {
  std::lock_guard lock(mutex_);
  auto [it, fresh] = label_ids_.try_emplace(label, static_cast<std::uint32_t>(labels_.size()));
  if (fresh) {
    labels_.push_back(std::move(label));
    live_by_label_.push_back(0);
    peak_by_label_.push_back(0);
  }
  return labels_[std::exchange(label_, it->second)];
}

void Allocator::set_guard(bool on) {
  std::lock_guard lock(mutex_);
  ensure(live_bytes_ == 0,
         "guard bytes can only be switched while nothing is allocated ({} bytes are)", live_bytes_);
  guard_ = on;
}

std::int64_t Allocator::damaged_guards() const {
  std::lock_guard lock(mutex_);
  return damaged_;
}

void Allocator::set_poison(bool on) {
  std::lock_guard lock(mutex_);
  poison_ = on;
}

void Allocator::set_fault(std::function<void(std::size_t)> fault) {
  std::lock_guard lock(mutex_);
  fault_ = std::move(fault);
}

void Allocator::set_trace(bool on) {
  std::lock_guard lock(mutex_);
  tracing_ = on;
  if (on) {
    trace_begin_ += trace_.size();
    trace_.clear();
    trace_clock_ = 0;
  }
}

std::vector<Lifetime> Allocator::trace() const {
  std::lock_guard lock(mutex_);
  return trace_;
}

void Allocator::begin_plan(std::shared_ptr<const MemoryPlan> plan) {
  std::lock_guard lock(mutex_);
  source_.begin(std::move(plan));
}

Allocator::PlanUse Allocator::end_plan() {
  std::lock_guard lock(mutex_);
  source_.end();
  return {source_.reserved_bytes(), source_.strays(), source_.gone(), source_.reserved()};
}

void Allocator::set_timeline(bool on) {
  std::lock_guard lock(mutex_);
  timeline_ = on;
  if (on) {
    events_.clear();
    start_ = std::chrono::steady_clock::now();
  }
}

std::string Allocator::timeline_json() const {
  std::lock_guard lock(mutex_);
  std::string json = fmt::format("{{\"device\": \"{}\", \"events\": [", to_string(device_));
  for (std::size_t i = 0; i < events_.size(); ++i) {
    const Event& e = events_[i];
    std::string label;  // labels are segment names: quote and backslash are escaped
    for (char c : labels_[e.segment]) {
      if (c == '"' || c == '\\') {
        label += '\\';
      }
      label += c;
    }
    json += fmt::format("{}[{}, {}, {}, \"{}\", \"{}\"]", i ? ",\n" : "\n", e.microseconds,
                        e.live_bytes, e.delta_bytes, name(e.kind), label);
  }
  return json + "\n]}\n";
}

Allocator& allocator(Device device) {
  if (device == cpu) {
    static Allocator instance(cpu, std::make_unique<Arena>());
    return instance;
  }
  if (device == meta) {
    static Allocator instance(meta, std::make_unique<Arena>());
    return instance;
  }
  if (device == host_of(cpu)) {
    static Allocator instance(host_of(cpu), std::make_unique<Arena>());
    return instance;
  }
  if (device == host_of(meta)) {
    static Allocator instance(host_of(meta), std::make_unique<Arena>());
    return instance;
  }
  return cuda_allocator(device);
}

Storage* Storage::allocate(std::size_t bytes, Device device, MemoryKind kind, bool real) {
  auto storage = std::make_unique<Storage>();
  storage->bytes = bytes;
  storage->kind = kind;
  storage->device = device;
  storage->data = allocator(device).allocate(bytes, kind, real, storage->segment, storage->number);
  return storage.release();
}

Storage* Storage::wrap(void* data, std::size_t bytes, Device device, std::shared_ptr<void> owner) {
  auto* storage = new Storage;
  storage->data = data;
  storage->bytes = bytes;
  storage->device = device;
  storage->owner = owner ? std::move(owner) : std::shared_ptr<void>(data, [](void*) {});
  return storage;
}

void Storage::reclassify(MemoryKind to) {
  if (!owner && kind != to) {
    allocator(device).reclassify(bytes, kind, to, segment);
    kind = to;
  }
}

void Storage::release() noexcept {
  if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    if (!owner) {
      allocator(device).free(data, bytes, kind, segment, number);
    }
    delete this;
  }
}

}  // namespace reprise

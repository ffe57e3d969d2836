#include "core/tensor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/cuda_device.h"

namespace reprise {
namespace {

// Dimensions of a strided copy after neighbours that lie together were merged.
std::vector<CopyLoop> merged_loops(const Shape& shape, const Tensor::Strides& to,
                                   const Tensor::Strides& from) {
  std::vector<CopyLoop> loops;
  for (int dim = 0; dim < shape.rank(); ++dim) {
    if (shape[dim] == 1) {
      continue;
    }
    if (!loops.empty() && loops.back().to_stride == to[dim] * shape[dim] &&
        loops.back().from_stride == from[dim] * shape[dim]) {
      loops.back() = {loops.back().size * shape[dim], to[dim], from[dim]};
    } else {
      loops.push_back({shape[dim], to[dim], from[dim]});
    }
  }
  return loops;
}

void copy_loops(std::span<const CopyLoop> loops, char* to, const char* from, std::int64_t bytes) {
  if (loops.empty()) {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return;
  }
  const CopyLoop& loop = loops.front();
  if (loops.size() == 1 && loop.to_stride == 1 && loop.from_stride == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(loop.size * bytes));
    return;
  }
  for (std::int64_t i = 0; i < loop.size; ++i) {
    copy_loops(loops.subspan(1), to + i * loop.to_stride * bytes,
               from + i * loop.from_stride * bytes, bytes);
  }
}

void zero_loops(std::span<const CopyLoop> loops, char* at, std::int64_t bytes) {
  if (loops.empty() || (loops.size() == 1 && loops.front().to_stride == 1)) {
    std::memset(at, 0, static_cast<std::size_t>((loops.empty() ? 1 : loops.front().size) * bytes));
    return;
  }
  for (std::int64_t i = 0; i < loops.front().size; ++i) {
    zero_loops(loops.subspan(1), at + i * loops.front().to_stride * bytes, bytes);
  }
}

template <class T>
void fill(void* at, std::int64_t count, T value) {
  std::fill_n(static_cast<T*>(at), count, value);
}

}  // namespace

Tensor::Strides contiguous_strides(const Shape& shape) {
  Tensor::Strides strides{};
  std::int64_t stride = 1;
  for (int dim = shape.rank() - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= shape[dim];
  }
  return strides;
}

Tensor::Tensor(const Tensor& other)
    : storage_(other.storage_),
      offset_(other.offset_),
      shape_(other.shape_),
      strides_(other.strides_),
      dtype_(other.dtype_),
      device_(other.device_),
      defined_(other.defined_) {
  if (storage_ != nullptr) {
    storage_->references.fetch_add(1, std::memory_order_relaxed);
  }
}

Tensor::Tensor(Tensor&& other) noexcept
    : storage_(std::exchange(other.storage_, nullptr)),
      offset_(other.offset_),
      shape_(other.shape_),
      strides_(other.strides_),
      dtype_(other.dtype_),
      device_(other.device_),
      defined_(std::exchange(other.defined_, false)) {}

Tensor& Tensor::operator=(Tensor other) noexcept {
  std::swap(storage_, other.storage_);
  offset_ = other.offset_;
  shape_ = other.shape_;
  strides_ = other.strides_;
  dtype_ = other.dtype_;
  device_ = other.device_;
  defined_ = other.defined_;
  return *this;
}

Tensor::~Tensor() {
  if (storage_ != nullptr) {
    storage_->release();
  }
}

Tensor Tensor::empty(const Shape& shape, DType dtype, Device device, MemoryKind kind) {
  Tensor tensor;
  tensor.shape_ = shape;
  tensor.strides_ = contiguous_strides(shape);
  tensor.dtype_ = dtype;
  tensor.device_ = device;
  tensor.defined_ = true;
  tensor.storage_ =
      Storage::allocate(static_cast<std::size_t>(tensor.bytes()), device, kind, !tensor.is_meta());
  return tensor;
}

Tensor Tensor::zeros(const Shape& shape, DType dtype, Device device, MemoryKind kind) {
  Tensor tensor = empty(shape, dtype, device, kind);
  tensor.zero();
  return tensor;
}

Tensor Tensor::full(const Shape& shape, DType dtype, double value, Device device, MemoryKind kind) {
  Tensor tensor = empty(shape, dtype, device, kind);
  if (tensor.is_meta() || tensor.numel() == 0) {
    return tensor;
  }
  // On a cuda device one element is written here, and a kernel has the others.
  const bool on_host = device.kind != DeviceKind::cuda;
  alignas(8) char element[8];
  void* const to = on_host ? tensor.raw() : element;
  const std::int64_t count = on_host ? tensor.numel() : 1;
  switch (dtype) {
    case DType::f32:
      fill(to, count, static_cast<float>(value));
      break;
    case DType::bf16:
      fill(to, count, to_bfloat16(static_cast<float>(value)));
      break;
    case DType::f64:
      fill(to, count, value);
      break;
    case DType::i32:
      fill(to, count, static_cast<std::int32_t>(value));
      break;
    case DType::i64:
      fill(to, count, static_cast<std::int64_t>(value));
      break;
  }
  if (!on_host) {
    cuda_fill(tensor.raw(), device, tensor.numel(), element, size_bytes(dtype));
  }
  return tensor;
}

Tensor Tensor::wrap(void* data, const Shape& shape, DType dtype, Device device,
                    std::shared_ptr<void> owner) {
  Tensor tensor;
  tensor.shape_ = shape;
  tensor.strides_ = contiguous_strides(shape);
  tensor.dtype_ = dtype;
  tensor.device_ = device;
  tensor.defined_ = true;
  tensor.storage_ =
      Storage::wrap(data, static_cast<std::size_t>(tensor.bytes()), device, std::move(owner));
  return tensor;
}

void* Tensor::raw() const {
  if (is_meta()) {
    fail("data",
         "a floating tensor on meta has no elements (shape {}): a data-dependent branch in a dry "
         "run?",
         to_string(shape_));
  }
  if (storage_ == nullptr) {
    fail("data", "the tensor has no storage (shape {})", to_string(shape_));
  }
  return static_cast<char*>(storage_->data) +
         offset_ * static_cast<std::int64_t>(size_bytes(dtype_));
}

bool Tensor::is_contiguous() const {
  std::int64_t stride = 1;
  for (int dim = rank() - 1; dim >= 0; --dim) {
    if (shape_[dim] != 1 && strides_[dim] != stride) {
      return numel() == 0;
    }
    stride *= shape_[dim];
  }
  return true;
}

std::optional<std::int64_t> Tensor::row_stride() const {
  if (is_contiguous()) {
    return rank() == 0 ? 1 : shape_.back();
  }
  const int last = rank() - 1;
  if (shape_[last] != 1 && strides_[last] != 1) {
    return std::nullopt;
  }
  std::optional<std::int64_t> stride;
  std::int64_t expected = 0;
  for (int dim = last - 1; dim >= 0; --dim) {
    if (shape_[dim] == 1) {
      continue;
    }
    if (!stride) {
      stride = strides_[dim];
    } else if (strides_[dim] != expected) {
      return std::nullopt;
    }
    expected = strides_[dim] * shape_[dim];
  }
  return stride ? stride : shape_[last];
}

bool Tensor::can_reshape(const Shape& shape) const {
  if (shape.numel() != numel()) {
    return false;
  }
  if (is_contiguous()) {
    return true;
  }
  // A matrix with a row stride can change its leading dimensions, or split its innermost one.
  const auto row = row_stride();
  if (!row || rank() == 0) {
    return false;
  }
  std::int64_t inner = 1;
  for (int dim = shape.rank() - 1; dim >= 0 && inner < shape_.back(); --dim) {
    inner *= shape[dim];
  }
  return inner == shape_.back();
}

Tensor Tensor::reshape(const Shape& shape) const {
  if (shape.numel() != numel()) {
    fail("reshape", "shape must have {} elements as {}, got {}", numel(), to_string(shape_),
         to_string(shape));
  }
  if (!can_reshape(shape)) {
    fail("reshape", "strides of {} do not allow {}: call contiguous() first", to_string(shape_),
         to_string(shape));
  }
  if (is_contiguous()) {
    return as_view(shape, contiguous_strides(shape), offset_);
  }
  const std::int64_t width = shape_.back();
  Strides strides{};
  std::int64_t inner = 1;
  std::int64_t outer = *row_stride();
  for (int dim = shape.rank() - 1; dim >= 0; --dim) {
    if (inner < width) {
      strides[dim] = inner;
      inner *= shape[dim];
    } else {
      strides[dim] = outer;
      outer *= shape[dim];
    }
  }
  return as_view(shape, strides, offset_);
}

Tensor Tensor::slice(int dim, std::int64_t begin, std::int64_t end) const {
  if (dim < 0 || dim >= rank()) {
    fail("slice", "dimension must be in [0, {}), got {}", rank(), dim);
  }
  if (begin < 0 || end < begin || end > shape_[dim]) {
    fail("slice", "range must lie in [0, {}), got [{}, {})", shape_[dim], begin, end);
  }
  return as_view(shape_.with(dim, end - begin), strides_, offset_ + begin * strides_[dim]);
}

Tensor Tensor::transpose(int a, int b) const {
  if (a < 0 || b < 0 || a >= rank() || b >= rank()) {
    fail("transpose", "dimensions must be in [0, {}), got {} and {}", rank(), a, b);
  }
  Strides strides = strides_;
  std::swap(strides[a], strides[b]);
  return as_view(shape_.with(a, shape_[b]).with(b, shape_[a]), strides, offset_);
}

Tensor Tensor::as_view(const Shape& shape, const Strides& strides, std::int64_t offset) const {
  Tensor view = *this;
  view.shape_ = shape;
  view.strides_ = strides;
  view.offset_ = offset;
  return view;
}

Tensor Tensor::contiguous(MemoryKind kind) const {
  return is_contiguous() ? *this : clone(kind);
}

Tensor Tensor::clone(MemoryKind kind) const {
  Tensor copy = empty(shape_, dtype_, device_, kind);
  if (!is_meta()) {
    copy.copy_from(*this);
  }
  return copy;
}

void Tensor::copy_from(const Tensor& source) const {
  if (source.shape_ != shape_ || source.dtype_ != dtype_) {
    fail("copy", "source must be {} {}, got {} {}", name(dtype_), to_string(shape_),
         name(source.dtype_), to_string(source.shape_));
  }
  if (numel() == 0 || is_meta()) {
    return;
  }
  const bool cuda = device_.kind == DeviceKind::cuda;
  if (cuda && source.device_ == device_ && !(is_contiguous() && source.is_contiguous())) {
    cuda_copy_strided(raw(), source.raw(), device_, merged_loops(shape_, strides_, source.strides_),
                      size_bytes(dtype_));
    return;
  }
  if (cuda || source.device_.kind == DeviceKind::cuda) {
    // What is strided goes through a dense copy on its own side.
    const Tensor from = source.contiguous(MemoryKind::workspace);
    const Tensor to =
        is_contiguous() ? *this : empty(shape_, dtype_, device_, MemoryKind::workspace);
    cuda_copy(to.raw(), to.device_, from.raw(), from.device_, static_cast<std::size_t>(bytes()));
    if (!is_contiguous()) {
      copy_from(to);
    }
    return;
  }
  const auto loops = merged_loops(shape_, strides_, source.strides_);
  copy_loops(loops, static_cast<char*>(raw()), static_cast<const char*>(source.raw()),
             static_cast<std::int64_t>(size_bytes(dtype_)));
}

void Tensor::zero() const {
  if (is_meta() || numel() == 0) {
    return;
  }
  if (!is_contiguous() && device_.kind == DeviceKind::cuda) {
    cuda_copy_strided(raw(), nullptr, device_, merged_loops(shape_, strides_, strides_),
                      size_bytes(dtype_));
  } else if (!is_contiguous()) {
    zero_loops(merged_loops(shape_, strides_, strides_), static_cast<char*>(raw()),
               static_cast<std::int64_t>(size_bytes(dtype_)));
  } else if (device_.kind == DeviceKind::cuda) {
    cuda_zero(raw(), device_, static_cast<std::size_t>(bytes()));
  } else {
    std::memset(raw(), 0, static_cast<std::size_t>(bytes()));
  }
}

Tensor Tensor::to(Device device, MemoryKind kind) const {
  if (device == device_) {
    return *this;
  }
  if (is_meta()) {
    fail("to", "a floating tensor on meta has no elements to copy to {}", to_string(device));
  }
  Tensor copy = empty(shape_, dtype_, device, kind);
  if (!copy.is_meta()) {
    copy.copy_from(*this);
  }
  return copy;
}

Tensor Tensor::to_host() const {
  return device_.kind == DeviceKind::cuda ? to(cpu) : *this;
}

void Tensor::drop_storage() {
  if (storage_ != nullptr) {
    std::exchange(storage_, nullptr)->release();
  }
}

void Tensor::set_storage(const Tensor& source) {
  Tensor keep = source;  // `source` may share what is dropped here
  drop_storage();
  storage_ = std::exchange(keep.storage_, nullptr);
}

std::int32_t Tensor::storage_references() const {
  return storage_ == nullptr ? 0 : storage_->references.load(std::memory_order_acquire);
}

std::int64_t Tensor::storage_bytes() const {
  return storage_ == nullptr ? 0 : static_cast<std::int64_t>(storage_->bytes);
}

bool Tensor::is_external() const {
  return storage_ != nullptr && storage_->owner != nullptr;
}

MemoryKind Tensor::kind() const {
  return storage_ == nullptr ? MemoryKind::activations : storage_->kind;
}

void Tensor::reclassify(MemoryKind kind) const {
  if (storage_ != nullptr) {
    storage_->reclassify(kind);
  }
}

}  // namespace reprise

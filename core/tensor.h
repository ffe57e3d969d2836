// Tensor: storage, shape, strides, dtype, device. It knows nothing of gradients.
//
// Copies share storage. Kernels take contiguous tensors or matrices with a row stride
// (see row_stride); any other view is copied by contiguous().
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/allocator.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/shape.h"

namespace reprise {

class Tensor {
 public:
  using Strides = std::array<std::int64_t, Shape::kMaxRank>;

  Tensor() = default;  // undefined
  Tensor(const Tensor& other);
  Tensor(Tensor&& other) noexcept;
  Tensor& operator=(Tensor other) noexcept;
  ~Tensor();

  // Uninitialised, contiguous, from the device's allocator.
  static Tensor empty(const Shape& shape, DType dtype, Device device = cpu,
                      MemoryKind kind = MemoryKind::activations);
  static Tensor zeros(const Shape& shape, DType dtype, Device device = cpu,
                      MemoryKind kind = MemoryKind::activations);
  // All elements `value`, converted to dtype.
  static Tensor full(const Shape& shape, DType dtype, double value, Device device = cpu,
                     MemoryKind kind = MemoryKind::activations);
  // Memory of somebody else, kept alive by `owner`; contiguous, not counted by the allocator.
  static Tensor wrap(void* data, const Shape& shape, DType dtype, Device device = cpu,
                     std::shared_ptr<void> owner = nullptr);
  // Copies of host values. On meta floating values are not kept.
  template <class T>
  static Tensor from(std::span<const T> values, const Shape& shape, Device device = cpu);
  template <class T>
  static Tensor from(const std::vector<T>& values, const Shape& shape, Device device = cpu) {
    return from(std::span<const T>(values), shape, device);
  }

  bool defined() const { return defined_; }
  const Shape& shape() const { return shape_; }
  int rank() const { return shape_.rank(); }
  std::int64_t size(int dim) const { return shape_[dim]; }
  std::int64_t numel() const { return shape_.numel(); }
  std::int64_t bytes() const { return numel() * static_cast<std::int64_t>(size_bytes(dtype_)); }
  const Strides& strides() const { return strides_; }
  std::int64_t offset() const { return offset_; }  // elements from the start of the storage
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }

  // First element. Throws Error when T is not the dtype, when the storage was dropped, or when
  // it has no memory: "[data] a floating tensor on meta has no elements ...".
  template <class T>
  T* data() const {
    if (dtype_of<T>() != dtype_) {
      fail("data", "dtype must be {}, got {}", name(dtype_of<T>()), name(dtype_));
    }
    return static_cast<T*>(raw());
  }
  // As data, untyped.
  void* raw() const;
  // True when the kernels must not touch elements: a floating tensor on meta.
  bool is_meta() const { return device_.kind == DeviceKind::meta && is_floating(dtype_); }
  // The only element, as T. Throws Error unless numel() == 1.
  template <class T>
  T item() const {
    if (numel() != 1) {
      fail("item", "tensor must have one element, got shape {}", to_string(shape_));
    }
    return *to_host().data<T>();
  }
  // All elements in row-major order.
  template <class T>
  std::vector<T> to_vector() const {
    const Tensor host = to_host().contiguous();
    const T* first = host.data<T>();
    return std::vector<T>(first, first + host.numel());
  }

  bool is_contiguous() const;
  // The distance between rows (elements) when the tensor, its leading dimensions taken together,
  // is a matrix [rows, back()] with unit inner stride; nothing when it is not.
  std::optional<std::int64_t> row_stride() const;

  // Views: they share the storage.
  // Same number of elements; throws Error when the strides do not allow it.
  Tensor reshape(const Shape& shape) const;
  bool can_reshape(const Shape& shape) const;
  // [begin, end) of one dimension.
  Tensor slice(int dim, std::int64_t begin, std::int64_t end) const;
  Tensor transpose(int a, int b) const;
  // As given, over the same storage.
  Tensor as_view(const Shape& shape, const Strides& strides, std::int64_t offset) const;

  // Itself when contiguous, else a contiguous copy.
  Tensor contiguous(MemoryKind kind = MemoryKind::activations) const;
  Tensor clone(MemoryKind kind = MemoryKind::activations) const;
  // Elements of `source` (same shape and dtype), any strides on both sides. Devices may differ.
  void copy_from(const Tensor& source) const;
  void zero() const;
  // A copy on another device; itself when it is there already. Floating elements do not survive
  // meta: to(meta) drops them, from meta it is an error.
  Tensor to(Device device, MemoryKind kind = MemoryKind::activations) const;

  // Storage
  bool has_storage() const { return storage_ != nullptr; }
  // Shape, strides, dtype and device stay.
  void drop_storage();
  // This tensor's layout over another's storage.
  void set_storage(const Tensor& source);
  bool shares_storage(const Tensor& other) const {
    return storage_ != nullptr && storage_ == other.storage_;
  }
  // References to the storage, this one counted.
  std::int32_t storage_references() const;
  std::int64_t storage_bytes() const;
  // Whether the memory is somebody else's (wrap).
  bool is_external() const;
  MemoryKind kind() const;
  void reclassify(MemoryKind kind) const;

 private:
  Tensor to_host() const;

  Storage* storage_ = nullptr;
  std::int64_t offset_ = 0;
  Shape shape_;
  Strides strides_{};
  DType dtype_ = DType::f32;
  Device device_;
  bool defined_ = false;
};

Tensor::Strides contiguous_strides(const Shape& shape);

template <class T>
Tensor Tensor::from(std::span<const T> values, const Shape& shape, Device device) {
  if (static_cast<std::int64_t>(values.size()) != shape.numel()) {
    fail("tensor", "{} values do not fill shape {}", values.size(), to_string(shape));
  }
  Tensor host = wrap(const_cast<T*>(values.data()), shape, dtype_of<T>());
  Tensor result = empty(shape, dtype_of<T>(), device);
  if (!result.is_meta()) {
    result.copy_from(host);
  }
  return result;
}

}  // namespace reprise

#include "nn/weights/safetensors.h"

#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/parallel.h"

namespace reprise::nn {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are stored little-endian");

// IEEE binary16, exact.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = half >> 10 & 0x1fu;
  const std::uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t widened = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | widened << 23 | fraction << 13);
}

template <class To>
To rounded(double x) {
  if constexpr (std::is_same_v<To, bfloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

// Stored elements may lie at any address: each is copied out of its bytes.
template <class Stored, class To, class Widen>
void convert(const std::byte* from, void* to, std::int64_t count, Widen widen) {
  parallel_for(count, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      Stored value;
      std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof value), sizeof value);
      static_cast<To*>(to)[i] = rounded<To>(widen(value));
    }
  });
}

template <class To>
bool convert_floats(StoredType type, const std::byte* from, void* to, std::int64_t count) {
  switch (type) {
    case StoredType::F16:
      convert<std::uint16_t, To>(from, to, count, half_to_float);
      return true;
    case StoredType::BF16:
      convert<bfloat16, To>(from, to, count, [](bfloat16 x) { return to_float(x); });
      return true;
    case StoredType::F32:
      convert<float, To>(from, to, count, [](float x) { return x; });
      return true;
    case StoredType::F64:
      convert<double, To>(from, to, count, [](double x) { return x; });
      return true;
    default:
      return false;
  }
}

// Elements into contiguous host memory; false when the types do not convert.
bool convert(StoredType type, const std::byte* from, const Tensor& to) {
  const std::int64_t count = to.numel();
  if (type == stored_type(to.dtype())) {
    if (count > 0) {
      std::memcpy(to.raw(), from, static_cast<std::size_t>(to.bytes()));
    }
    return true;
  }
  switch (to.dtype()) {
    case DType::f32:
      return convert_floats<float>(type, from, to.raw(), count);
    case DType::bf16:
      return convert_floats<bfloat16>(type, from, to.raw(), count);
    case DType::f64:
      return convert_floats<double>(type, from, to.raw(), count);
    case DType::i64:
      if (type == StoredType::I32) {
        convert<std::int32_t, std::int64_t>(from, to.raw(), count,
                                            [](std::int32_t x) { return x; });
        return true;
      }
      return false;
    case DType::i32:
      return false;
  }
  return false;
}

std::optional<DType> dtype_of_stored(StoredType type) {
  switch (type) {
    case StoredType::F32:
    case StoredType::F16:
      return DType::f32;
    case StoredType::BF16:
      return DType::bf16;
    case StoredType::F64:
      return DType::f64;
    case StoredType::I32:
      return DType::i32;
    case StoredType::I64:
      return DType::i64;
    default:
      return std::nullopt;
  }
}

std::string shape_text(const std::vector<std::uint64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// A file's dimensions as a Shape, where a tensor may have them.
absl::StatusOr<Shape> shape_of(const StoredTensor& tensor, const std::string& path) {
  if (tensor.shape.size() > static_cast<std::size_t>(Shape::kMaxRank)) {
    return absl::InvalidArgumentError(
        fmt::format("{}: tensor \"{}\" has {} dimensions, {} are the most", path, tensor.name,
                    tensor.shape.size(), Shape::kMaxRank));
  }
  std::vector<std::int64_t> sizes;
  for (const std::uint64_t size : tensor.shape) {
    if (!std::in_range<std::int64_t>(size)) {
      return absl::InvalidArgumentError(fmt::format("{}: tensor \"{}\" of shape {} is too large",
                                                    path, tensor.name, shape_text(tensor.shape)));
    }
    sizes.push_back(static_cast<std::int64_t>(size));
  }
  return Shape(sizes);
}

struct Mapping {
  void* at = nullptr;
  std::size_t bytes = 0;
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  ~Mapping() {
    if (at != nullptr) {
      ::munmap(at, bytes);
    }
  }
};

struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) {
      ::close(number);
    }
  }
};

}  // namespace

StoredType stored_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return StoredType::F32;
    case DType::bf16:
      return StoredType::BF16;
    case DType::f64:
      return StoredType::F64;
    case DType::i32:
      return StoredType::I32;
    case DType::i64:
      return StoredType::I64;
  }
  return StoredType::U8;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::open(const std::string& path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat info {};
  if (file.number < 0 || ::fstat(file.number, &info) != 0) {
    return absl::ErrnoToStatus(errno, path);
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(path + ": not a file");
  }
  auto mapping = std::make_shared<Mapping>();
  if (info.st_size > 0) {
    // Private and writable: a tensor over it may be written, the file stays as it is.
    const auto bytes = static_cast<std::size_t>(info.st_size);
    void* const at =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.number, 0);
    if (at == MAP_FAILED) {
      return absl::ErrnoToStatus(errno, path);
    }
    mapping->at = at;
    mapping->bytes = bytes;
  }
  absl::StatusOr<SafetensorsHeader> header =
      parse_safetensors({static_cast<const std::byte*>(mapping->at), mapping->bytes}, path);
  if (!header.ok()) {
    return header.status();
  }
  SafetensorsFile result;
  result.path_ = path;
  result.header_ = *std::move(header);
  for (std::size_t i = 0; i < result.header_.tensors.size(); ++i) {
    result.index_.emplace(result.header_.tensors[i].name, i);
  }
  result.mapping_ = std::move(mapping);
  return result;
}

const StoredTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = index_.find(std::string(name));
  return found == index_.end() ? nullptr : &header_.tensors[found->second];
}

absl::StatusOr<const StoredTensor*> SafetensorsFile::get(std::string_view name) const {
  const StoredTensor* const tensor = find(name);
  if (tensor == nullptr) {
    return absl::NotFoundError(fmt::format("{}: there is no tensor \"{}\"", path_, name));
  }
  return tensor;
}

std::byte* SafetensorsFile::at(const StoredTensor& tensor) const {
  const auto& mapping = *static_cast<const Mapping*>(mapping_.get());
  return static_cast<std::byte*>(mapping.at) + header_.data_begin + tensor.begin;
}

absl::StatusOr<Tensor> SafetensorsFile::read(std::string_view name) const {
  const absl::StatusOr<const StoredTensor*> found = get(name);
  if (!found.ok()) {
    return found.status();
  }
  const StoredTensor& tensor = **found;
  const std::optional<DType> dtype = dtype_of_stored(tensor.type);
  if (!dtype) {
    return absl::UnimplementedError(fmt::format("{}: tensor \"{}\" of type {} cannot be read",
                                                path_, name, nn::name(tensor.type)));
  }
  const absl::StatusOr<Shape> shape = shape_of(tensor, path_);
  if (!shape.ok()) {
    return shape.status();
  }
  std::byte* const bytes = at(tensor);
  const bool aligned = reinterpret_cast<std::uintptr_t>(bytes) % size_bytes(*dtype) == 0;
  if (aligned && tensor.type == stored_type(*dtype)) {
    return Tensor::wrap(bytes, *shape, *dtype, cpu, mapping_);
  }
  Tensor copy = Tensor::empty(*shape, *dtype);
  convert(tensor.type, bytes, copy);
  return copy;
}

absl::Status SafetensorsFile::read_into(std::string_view name, const Tensor& to) const {
  const absl::StatusOr<const StoredTensor*> found = get(name);
  if (!found.ok()) {
    return found.status();
  }
  const StoredTensor& tensor = **found;
  const absl::StatusOr<Shape> shape = shape_of(tensor, path_);
  if (!shape.ok()) {
    return shape.status();
  }
  if (*shape != to.shape()) {
    return absl::InvalidArgumentError(fmt::format("{}: tensor \"{}\" must have shape {}, got {}",
                                                  path_, name, to_string(to.shape()),
                                                  shape_text(tensor.shape)));
  }
  return convert_into(tensor, at(tensor), to);
}

absl::Status SafetensorsFile::read_rows_into(std::string_view name, std::int64_t first,
                                             const Tensor& to) const {
  const absl::StatusOr<const StoredTensor*> found = get(name);
  if (!found.ok()) {
    return found.status();
  }
  const StoredTensor& tensor = **found;
  const absl::StatusOr<Shape> shape = shape_of(tensor, path_);
  if (!shape.ok()) {
    return shape.status();
  }
  const bool within = shape->rank() > 0 && to.rank() == shape->rank() && first >= 0 &&
                      first <= (*shape)[0] - to.size(0) && shape->with(0, to.size(0)) == to.shape();
  if (!within) {
    return absl::InvalidArgumentError(
        fmt::format("{}: tensor \"{}\" must have rows {} and on of shape {}, got {}", path_, name,
                    first, to_string(to.shape()), shape_text(tensor.shape)));
  }
  const std::int64_t skipped = (*shape)[0] == 0 ? 0 : first * (shape->numel() / (*shape)[0]);
  return convert_into(tensor, at(tensor) + skipped * size_bits(tensor.type) / 8, to);
}

absl::Status SafetensorsFile::convert_into(const StoredTensor& tensor, const std::byte* bytes,
                                           const Tensor& to) const {
  const bool direct = to.device().kind != DeviceKind::cuda && to.is_contiguous();
  // On meta the conversion of nothing tells whether the types convert.
  const Tensor host = to.is_meta() ? Tensor::empty(Shape{0}, to.dtype())
                      : direct     ? to
                                   : Tensor::empty(to.shape(), to.dtype());
  if (!convert(tensor.type, bytes, host)) {
    return absl::InvalidArgumentError(
        fmt::format("{}: tensor \"{}\" of type {} cannot be read as {}", path_, tensor.name,
                    nn::name(tensor.type), reprise::name(to.dtype())));
  }
  if (!direct && !to.is_meta()) {
    to.copy_from(host);
  }
  return absl::OkStatus();
}

}  // namespace reprise::nn

#include "nn/weights/safetensors.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/parallel.h"
#include "core/progress.h"
#include "nn/weights/replace_file.h"

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

// `count` elements at any address.
using Convert = void (*)(const std::byte* from, void* to, std::int64_t count);

template <class Stored, class To, auto widen>
void convert(const std::byte* from, void* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof value), sizeof value);
    static_cast<To*>(to)[i] = rounded<To>(widen(value));
  }
}

double of_float(float x) {
  return static_cast<double>(x);
}
double of_double(double x) {
  return x;
}
double of_bfloat16(bfloat16 x) {
  return static_cast<double>(to_float(x));
}
double of_half(std::uint16_t x) {
  return static_cast<double>(half_to_float(x));
}
void widen_integers(const std::byte* from, void* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::int32_t value;
    std::memcpy(&value, from + i * 4, sizeof value);
    static_cast<std::int64_t*>(to)[i] = value;
  }
}

template <class To>
Convert conversion_of_floats(StoredType type) {
  switch (type) {
    case StoredType::F16:
      return convert<std::uint16_t, To, of_half>;
    case StoredType::BF16:
      return convert<bfloat16, To, of_bfloat16>;
    case StoredType::F32:
      return convert<float, To, of_float>;
    case StoredType::F64:
      return convert<double, To, of_double>;
    default:
      return nullptr;
  }
}

// Null when the types do not convert. For two that are the same there is nothing to convert.
Convert conversion(StoredType type, DType to) {
  switch (to) {
    case DType::f32:
      return conversion_of_floats<float>(type);
    case DType::bf16:
      return conversion_of_floats<bfloat16>(type);
    case DType::f64:
      return conversion_of_floats<double>(type);
    case DType::i64:
      return type == StoredType::I32 ? widen_integers : nullptr;
    case DType::i32:
      return nullptr;
  }
  return nullptr;
}

// False when the file ends before, or cannot be read: errno says which.
bool read_at(int file, std::byte* to, std::size_t count, std::uint64_t from) {
  while (count > 0) {
    const ssize_t got =
        ::pread(file, to, std::min(count, kFilePieceBytes), static_cast<off_t>(from));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      errno = got == 0 ? ENODATA : errno;
      return false;
    }
    progress().tick();
    to += got;
    from += static_cast<std::uint64_t>(got);
    count -= static_cast<std::size_t>(got);
  }
  return true;
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

// A file that is open and mapped.
struct Mapping {
  int file = -1;
  void* at = nullptr;
  std::size_t bytes = 0;
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  ~Mapping() {
    if (at != nullptr) {
      ::munmap(at, bytes);
    }
    if (file >= 0) {
      ::close(file);
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
  auto mapping = std::make_shared<Mapping>();
  mapping->file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info {};
  if (mapping->file < 0 || ::fstat(mapping->file, &info) != 0) {
    return absl::ErrnoToStatus(errno, path);
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(path + ": not a file");
  }
  if (info.st_size > 0) {
    // Private and writable: a tensor over it may be written, the file stays as it is.
    const auto bytes = static_cast<std::size_t>(info.st_size);
    void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
                            mapping->file, 0);
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

bool SafetensorsFile::in_place(std::string_view name) const {
  const StoredTensor* const tensor = find(name);
  const std::optional<DType> dtype =
      tensor != nullptr ? dtype_of_stored(tensor->type) : std::nullopt;
  return dtype && tensor->type == stored_type(*dtype) &&
         reinterpret_cast<std::uintptr_t>(at(*tensor)) % size_bytes(*dtype) == 0;
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
  if (in_place(name)) {
    return Tensor::wrap(at(tensor), *shape, *dtype, cpu, mapping_);
  }
  const Tensor copy = Tensor::empty(*shape, *dtype);
  const absl::Status status = copy_elements(tensor, 0, copy);
  return status.ok() ? absl::StatusOr<Tensor>(copy) : status;
}

absl::Status SafetensorsFile::copy_elements(const StoredTensor& tensor, std::uint64_t skipped_bytes,
                                            const Tensor& to) const {
  // Small enough for the bytes of a conversion to stay in a cache.
  constexpr std::int64_t kChunk = 1 << 18;  // elements
  const auto& mapping = *static_cast<const Mapping*>(mapping_.get());
  const auto stored_bytes = static_cast<std::int64_t>(size_bits(tensor.type) / 8);
  const auto own_bytes = static_cast<std::int64_t>(size_bytes(to.dtype()));
  const Convert convert =
      tensor.type == stored_type(to.dtype()) ? nullptr : conversion(tensor.type, to.dtype());
  const std::uint64_t first = header_.data_begin + tensor.begin + skipped_bytes;
  std::atomic<int> problem = 0;
  const std::int64_t count = to.numel(), chunks = (count + kChunk - 1) / kChunk;
  parallel_for(chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::byte> buffer;
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t at = chunk * kChunk, elements = std::min(kChunk, count - at);
      const auto bytes = static_cast<std::size_t>(elements * stored_bytes);
      std::byte* const result = static_cast<std::byte*>(to.raw()) + at * own_bytes;
      if (convert != nullptr) {
        buffer.resize(bytes);
      }
      std::byte* const into = convert != nullptr ? buffer.data() : result;
      if (!read_at(mapping.file, into, bytes,
                   first + static_cast<std::uint64_t>(at * stored_bytes))) {
        problem = errno;
        return;
      }
      if (convert != nullptr) {
        convert(into, result, elements);
      }
    }
  });
  return problem == 0
             ? absl::OkStatus()
             : absl::ErrnoToStatus(problem, fmt::format("{}: tensor \"{}\"", path_, tensor.name));
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
  return convert_into(tensor, 0, to);
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
  return convert_into(tensor, static_cast<std::uint64_t>(skipped * size_bits(tensor.type) / 8), to);
}

absl::Status SafetensorsFile::read_elements_into(std::string_view name, std::int64_t first,
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
  if (to.rank() != 1 || first < 0 || first > shape->numel() - to.numel()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: tensor \"{}\" of shape {} has no elements {} and on of shape {}", path_,
                    name, shape_text(tensor.shape), first, to_string(to.shape())));
  }
  return convert_into(tensor, static_cast<std::uint64_t>(first * size_bits(tensor.type) / 8), to);
}

absl::Status SafetensorsFile::convert_into(const StoredTensor& tensor, std::uint64_t skipped_bytes,
                                           const Tensor& to) const {
  if (tensor.type != stored_type(to.dtype()) && conversion(tensor.type, to.dtype()) == nullptr) {
    return absl::InvalidArgumentError(
        fmt::format("{}: tensor \"{}\" of type {} cannot be read as {}", path_, tensor.name,
                    nn::name(tensor.type), reprise::name(to.dtype())));
  }
  if (to.is_meta()) {
    return absl::OkStatus();
  }
  const bool direct = to.device().kind != DeviceKind::cuda && to.is_contiguous();
  const Tensor host = direct ? to : Tensor::empty(to.shape(), to.dtype());
  const absl::Status status = copy_elements(tensor, skipped_bytes, host);
  if (status.ok() && !direct) {
    to.copy_from(host);
  }
  return status;
}

}  // namespace reprise::nn

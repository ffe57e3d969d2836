// Safetensors files: a header of JSON, then the bytes of the tensors.
//
//   u64 little-endian N | N bytes of JSON | bytes of the tensors, without holes
//   {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "F32", "shape": [2, 3],
//    "data_offsets": [0, 24]}, ...}
//
// Reading: the file is mapped into memory and checked in full before a tensor is touched. What the
// reference reader refuses is refused here, under the same error name ("InvalidOffset"); beyond
// that duplicate tensor names are refused. All errors are absl::Status with the path and the byte
// or the tensor's name. Copies are read past the mapping: their bytes are in memory once.
//
// A file must not be written to by others while it is mapped: what a view has not been written to
// yet changes with the file, and a file that was shortened ends the process (SIGBUS) when what is
// gone is read. Savers that put a new file in the place of the old one, as this library and the
// Hugging Face libraries do, leave the old one to those who have it mapped.
//
// Writing: tensors ordered by type (widest first), then by name; metadata first; header padded with
// spaces to 8 bytes; a temporary file in the same folder, fsync, rename: the target is the old file
// or the new one, never half of it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/tensor.h"

namespace reprise::nn {

// The types a file may hold, in ascending order of alignment (files are written in the descending).
enum class StoredType : std::uint8_t {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64,
};
std::string_view name(StoredType type);
int size_bits(StoredType type);
StoredType stored_type(DType dtype);

struct StoredTensor {
  std::string name;
  StoredType type{};
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes from the end of the header
};

using Metadata = std::map<std::string, std::string>;

struct SafetensorsHeader {
  std::vector<StoredTensor> tensors;  // in the order of their bytes
  Metadata metadata;
  std::uint64_t data_begin = 0;  // byte of the file where the tensors start
};

// Checks a whole file that lies in memory. `path` is for messages only.
absl::StatusOr<SafetensorsHeader> parse_safetensors(std::span<const std::byte> file,
                                                    std::string_view path);

class SafetensorsFile {
 public:
  static absl::StatusOr<SafetensorsFile> open(const std::string& path);

  const std::string& path() const { return path_; }
  const std::vector<StoredTensor>& tensors() const { return header_.tensors; }
  const Metadata& metadata() const { return header_.metadata; }
  // Null when there is no tensor of that name.
  const StoredTensor* find(std::string_view name) const;

  // Whether read() gives a view over the mapped file. False when there is no such tensor.
  bool in_place(std::string_view name) const;
  // The tensor as it is stored: a view over the mapped file (written to, the view changes, the file
  // does not; the mapping lives as long as a view), or a copy where the bytes are not aligned. F16
  // becomes f32. Types without a DType are an error.
  absl::StatusOr<Tensor> read(std::string_view name) const;
  // Copies the tensor into `to`, of the same shape. F16, BF16, F32 and F64 convert to f32, bf16 and
  // f64, rounding to nearest even; I32 to i32 and i64, I64 to i64. On meta only the checks are
  // done. The bytes are those of the file, whatever was written to views of read().
  absl::Status read_into(std::string_view name, const Tensor& to) const;
  // The same of the rows (the first dimension) from `first` on, as many as `to` has.
  absl::Status read_rows_into(std::string_view name, std::int64_t first, const Tensor& to) const;
  // The same of elements in row-major order, from `first` on, as many as `to` [n] has.
  absl::Status read_elements_into(std::string_view name, std::int64_t first,
                                  const Tensor& to) const;

 private:
  SafetensorsFile() = default;
  absl::StatusOr<const StoredTensor*> get(std::string_view name) const;
  std::byte* at(const StoredTensor& tensor) const;
  // `to` from the elements of `tensor` that begin at this byte of its own.
  absl::Status convert_into(const StoredTensor& tensor, std::uint64_t skipped_bytes,
                            const Tensor& to) const;
  // Elements from the file into contiguous host memory.
  absl::Status copy_elements(const StoredTensor& tensor, std::uint64_t skipped_bytes,
                             const Tensor& to) const;

  std::string path_;
  SafetensorsHeader header_;
  std::unordered_map<std::string, std::size_t> index_;
  std::shared_ptr<void> mapping_;
};

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

// Readers of other libraries ask for {"format": "pt"}. Refused: two tensors of one name, two that
// share memory (tied weights are written once), floating tensors on meta.
absl::Status write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                               const Metadata& metadata = {{"format", "pt"}});

// The same, one tensor in memory at a time: value(i) is asked for tensors[i] in the order of the
// file, which is that of write_order(), and must have its shape and dtype.
struct TensorLayout {
  std::string name;
  Shape shape;
  DType dtype = DType::f32;
};
std::vector<std::size_t> write_order(std::span<const TensorLayout> tensors);
absl::Status stream_safetensors(const std::string& path, std::span<const TensorLayout> tensors,
                                const std::function<Tensor(std::size_t)>& value,
                                const Metadata& metadata = {{"format", "pt"}});

}  // namespace reprise::nn

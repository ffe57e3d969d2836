#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>
#include <utility>

#include <fmt/format.h>
#include <utf8.h>

#include "nn/weights/safetensors.h"

namespace reprise::nn {
namespace {

struct TypeRow {
  std::string_view name;
  int bits;
};
constexpr std::array<TypeRow, 22> kTypes = {{
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
}};

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr int kMaxDepth = 128;

// Receives the header's JSON as events, so that repeated keys are seen and nothing is built that is
// not needed. The parser behind it does not recurse; the depth is bounded all the same.
class HeaderEvents {
 public:
  std::vector<StoredTensor> tensors;
  Metadata metadata;
  std::string problem;

  bool null() {
    if (place_ == Place::file && key_ == "__metadata__") {
      return begin_metadata();
    }
    return other_value("null");
  }
  bool boolean(bool) { return other_value("a boolean"); }
  bool number_integer(std::int64_t) { return other_value("a negative number"); }
  bool number_float(double, const std::string& text) { return other_value("the number " + text); }
  bool binary(std::vector<std::uint8_t>&) { return other_value("binary data"); }
  bool number_unsigned(std::uint64_t number) {
    if (place_ == Place::shape) {
      tensors.back().shape.push_back(number);
      return true;
    }
    if (place_ == Place::offsets) {
      if (offsets_ == 2) {
        return refuse("data_offsets must hold two numbers");
      }
      (offsets_++ == 0 ? tensors.back().begin : tensors.back().end) = number;
      return true;
    }
    return other_value("a number");
  }
  bool string(std::string& text) {
    if (place_ == Place::metadata) {
      metadata[key_] = text;
      return true;
    }
    if (place_ == Place::entry && field_ == "dtype") {
      const auto row = std::find_if(kTypes.begin(), kTypes.end(),
                                    [&](const TypeRow& type) { return type.name == text; });
      if (row == kTypes.end()) {
        return refuse(fmt::format("dtype \"{}\" is not known", text));
      }
      tensors.back().type = static_cast<StoredType>(row - kTypes.begin());
      return true;
    }
    return other_value("a string");
  }

  bool start_object(std::size_t) {
    if (!deeper()) {
      return false;
    }
    if (place_ == Place::start) {
      place_ = Place::file;
      return true;
    }
    if (place_ == Place::file && key_ == "__metadata__") {
      if (!begin_metadata()) {
        return false;
      }
      place_ = Place::metadata;
      return true;
    }
    if (place_ == Place::file) {
      if (!names_.insert(key_).second) {
        return refuse("the name is given twice");
      }
      tensors.push_back({.name = key_, .type = {}, .shape = {}, .begin = 0, .end = 0});
      seen_ = {};
      place_ = Place::entry;
      return true;
    }
    return begin_unknown("an object");
  }
  bool key(std::string& text) {
    if (place_ == Place::entry) {
      field_ = text;
      bool* const seen = seen_field(text);
      if (seen != nullptr && std::exchange(*seen, true)) {
        return refuse(fmt::format("{} is given twice", text));
      }
    } else if (place_ != Place::unknown) {
      key_ = text;
    }
    return true;
  }
  bool end_object() {
    --depth_;
    switch (place_) {
      case Place::unknown:
        return end_unknown();
      case Place::metadata:
        place_ = Place::file;
        return true;
      case Place::entry:
        place_ = Place::file;
        key_ = tensors.back().name;
        for (const auto& [name, seen] : {std::pair{"dtype", seen_.dtype},
                                         {"shape", seen_.shape},
                                         {"data_offsets", seen_.offsets}}) {
          if (!seen) {
            return refuse(fmt::format("{} is missing", name));
          }
        }
        return true;
      default:
        place_ = Place::end;
        return true;
    }
  }
  bool start_array(std::size_t) {
    if (!deeper()) {
      return false;
    }
    if (place_ == Place::entry && field_ == "shape") {
      place_ = Place::shape;
      return true;
    }
    if (place_ == Place::entry && field_ == "data_offsets") {
      place_ = Place::offsets;
      offsets_ = 0;
      return true;
    }
    return begin_unknown("an array");
  }
  bool end_array() {
    --depth_;
    if (place_ == Place::unknown) {
      return end_unknown();
    }
    if (place_ == Place::offsets && offsets_ != 2) {
      return refuse("data_offsets must hold two numbers");
    }
    place_ = Place::entry;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) {
    // 8: the length field before the header.
    problem = fmt::format("byte {}: not valid JSON", position + 7);
    return false;
  }

 private:
  enum class Place { start, file, metadata, entry, shape, offsets, unknown, end };
  struct Seen {
    bool dtype = false, shape = false, offsets = false;
  };

  bool refuse(std::string what) {
    problem = place_ == Place::start ? std::move(what) : fmt::format("\"{}\": {}", key_, what);
    return false;
  }
  bool deeper() { return ++depth_ <= kMaxDepth || refuse("nested too deep"); }
  bool begin_metadata() {
    return !std::exchange(metadata_seen_, true) || refuse("it is given twice");
  }
  bool* seen_field(std::string_view field) {
    return field == "dtype"          ? &seen_.dtype
           : field == "shape"        ? &seen_.shape
           : field == "data_offsets" ? &seen_.offsets
                                     : nullptr;
  }
  bool in_unknown_field() { return place_ == Place::entry && seen_field(field_) == nullptr; }
  bool begin_unknown(std::string_view what) {
    if (in_unknown_field()) {
      place_ = Place::unknown;
      unknown_depth_ = depth_;
    }
    return place_ == Place::unknown || other_value(what);
  }
  bool end_unknown() {
    if (depth_ < unknown_depth_) {
      place_ = Place::entry;
    }
    return true;
  }
  // A value of a kind that only an unknown field may have.
  bool other_value(std::string_view what) {
    if (place_ == Place::unknown || in_unknown_field()) {
      return true;
    }
    switch (place_) {
      case Place::start:
        return refuse(fmt::format("the header must be an object, got {}", what));
      case Place::file:
        return refuse(fmt::format("must be an object, got {}", what));
      case Place::metadata:
        return refuse(fmt::format("metadata must be a string, got {}", what));
      case Place::shape:
        return refuse(fmt::format("shape must hold whole numbers from 0, got {}", what));
      case Place::offsets:
        return refuse(fmt::format("data_offsets must hold whole numbers from 0, got {}", what));
      default:
        return refuse(fmt::format("{} must not be {}", field_, what));
    }
  }

  Place place_ = Place::start;
  int depth_ = 0, unknown_depth_ = 0, offsets_ = 0;
  bool metadata_seen_ = false;
  Seen seen_;
  std::string key_, field_;
  std::unordered_set<std::string> names_;
};

absl::Status error(std::string_view path, std::string_view name, std::string_view what) {
  return absl::InvalidArgumentError(fmt::format("{}: {}: {}", path, name, what));
}

// Product of the sizes and the bits of an element; nothing when it does not fit 64 bits.
std::optional<std::uint64_t> total_bits(const StoredTensor& tensor) {
  std::uint64_t bits = 1;
  for (const std::uint64_t size : tensor.shape) {
    if (__builtin_mul_overflow(bits, size, &bits)) {
      return std::nullopt;
    }
  }
  if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(size_bits(tensor.type)), &bits)) {
    return std::nullopt;
  }
  return bits;
}

// The byte ranges follow each other from 0 to data_bytes and fit the shapes.
absl::Status check_ranges(std::span<const StoredTensor> tensors, std::uint64_t data_bytes,
                          std::string_view path) {
  std::uint64_t end = 0;
  for (const StoredTensor& tensor : tensors) {
    if (tensor.begin != end || tensor.end < tensor.begin) {
      return error(
          path, fmt::format("InvalidOffset({})", tensor.name),
          fmt::format("data_offsets [{}, {}] must start at {}", tensor.begin, tensor.end, end));
    }
    end = tensor.end;
    const std::optional<std::uint64_t> bits = total_bits(tensor);
    if (!bits) {
      return error(path, "ValidationOverflow",
                   fmt::format("the size of \"{}\" does not fit 64 bits", tensor.name));
    }
    if (*bits % 8 != 0) {
      return error(path, "MisalignedSlice",
                   fmt::format("\"{}\" holds {} bits, not whole bytes", tensor.name, *bits));
    }
    if (tensor.end - tensor.begin != *bits / 8) {
      return error(path, "TensorInvalidInfo",
                   fmt::format("\"{}\" has {} bytes, its dtype and shape ask for {}", tensor.name,
                               tensor.end - tensor.begin, *bits / 8));
    }
  }
  if (end != data_bytes) {
    return error(
        path, "MetadataIncompleteBuffer",
        fmt::format("the header tells of {} bytes of tensors, the file holds {}", end, data_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

std::string_view name(StoredType type) {
  return kTypes[static_cast<std::size_t>(type)].name;
}
int size_bits(StoredType type) {
  return kTypes[static_cast<std::size_t>(type)].bits;
}

absl::StatusOr<SafetensorsHeader> parse_safetensors(std::span<const std::byte> file,
                                                    std::string_view path) {
  if (file.size() < 8) {
    return error(path, "HeaderTooSmall",
                 fmt::format("the file has {} bytes, 8 are the least", file.size()));
  }
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) {
    length = length << 8 | std::to_integer<std::uint64_t>(file[static_cast<std::size_t>(i)]);
  }
  if (length > kMaxHeaderBytes) {
    return error(path, "HeaderTooLarge",
                 fmt::format("bytes 0-7 tell of a header of {} bytes, {} are the most", length,
                             kMaxHeaderBytes));
  }
  if (length > file.size() - 8) {
    return error(path, "InvalidHeaderLength",
                 fmt::format("bytes 0-7 tell of a header of {} bytes, the file has {} after them",
                             length, file.size() - 8));
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, length);
  if (const auto bad = utf8::find_invalid(text.begin(), text.end()); bad != text.end()) {
    return error(path, "InvalidHeader",
                 fmt::format("byte {}: not valid UTF-8", 8 + (bad - text.begin())));
  }
  // The parser would skip a byte order mark and take a zero byte for the end.
  if (text.starts_with("\xef\xbb\xbf")) {
    return error(path, "InvalidHeaderDeserialization", "byte 8: not valid JSON");
  }
  if (const auto zero = text.find('\0'); zero != std::string_view::npos) {
    return error(path, "InvalidHeaderDeserialization",
                 fmt::format("byte {}: not valid JSON", 8 + zero));
  }
  HeaderEvents events;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &events)) {
    return error(path, "InvalidHeaderDeserialization", events.problem);
  }
  std::stable_sort(events.tensors.begin(), events.tensors.end(),
                   [](const StoredTensor& a, const StoredTensor& b) {
                     return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
                   });
  const absl::Status ranges = check_ranges(events.tensors, file.size() - 8 - length, path);
  if (!ranges.ok()) {
    return ranges;
  }
  return SafetensorsHeader{std::move(events.tensors), std::move(events.metadata), 8 + length};
}

}  // namespace reprise::nn

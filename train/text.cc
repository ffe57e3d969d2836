#include "train/text.h"

#include <algorithm>
#include <set>

#include <fmt/format.h>
#include <fmt/std.h>
#include <utf8.h>

#include "core/error.h"
#include "nn/weights/replace_file.h"

namespace reprise::train {
namespace {

absl::Status check_utf8(const std::filesystem::path& path, std::string_view text) {
  const auto bad = utf8::find_invalid(text.begin(), text.end());
  if (bad != text.end()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: not UTF-8 at byte {}", path.string(), bad - text.begin()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> read_text(const std::filesystem::path& path, std::int64_t least_bytes) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(
        fmt::format("{}: is a directory, a text file is needed", path.string()));
  }
  std::string text;
  absl::Status status = nn::read_file(path.string(), text);
  if (status.ok() && text.empty()) {
    status = absl::InvalidArgumentError(fmt::format("{}: the file is empty", path.string()));
  }
  if (status.ok()) {
    status = check_utf8(path, text);
  }
  if (status.ok() && static_cast<std::int64_t>(text.size()) < least_bytes) {
    status = absl::InvalidArgumentError(fmt::format("{}: at least {} bytes are needed, got {}",
                                                    path.string(), least_bytes, text.size()));
  }
  if (!status.ok()) {
    return status;
  }
  return text;
}

absl::StatusOr<std::string> read_fortunes(std::int64_t least_bytes,
                                          const std::filesystem::path& directory) {
  std::error_code error;
  std::set<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    if (entry.is_regular_file() && !entry.is_symlink() && entry.path().extension().empty()) {
      files.insert(entry.path());
    }
  }
  std::string all;
  for (const auto& path : files) {
    std::string text;
    if (absl::Status status = nn::read_file(path.string(), text); !status.ok()) {
      return status;
    }
    if (check_utf8(path, text).ok()) {  // one old collection is not
      all += text;
    }
  }
  if (static_cast<std::int64_t>(all.size()) < least_bytes) {
    return absl::NotFoundError(fmt::format(
        "{}: no quotations found: install Debian's package `fortunes`, or give --text FILE",
        directory.string()));
  }
  return all;
}

ByteData::ByteData(std::string_view text, std::int64_t batch, std::int64_t tokens)
    : batch_(batch), tokens_(tokens) {
  if (static_cast<std::int64_t>(text.size()) < least_bytes(tokens)) {
    fail("data", "text must have at least {} windows of {} bytes, got {} bytes", kLeastWindows,
         tokens, text.size());
  }
  const std::size_t cut = text.size() - text.size() / 10;
  train_ = text.substr(0, cut);
  validation_ = text.substr(cut);
}

nn::Batch ByteData::windows(std::string_view text, const std::vector<std::int64_t>& starts,
                            Device device) const {
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(batch_ * tokens_));
  for (std::int64_t start : starts) {
    for (std::int64_t t = 0; t < tokens_; ++t) {
      ids.push_back(static_cast<unsigned char>(text[static_cast<std::size_t>(start + t)]));
    }
  }
  const Tensor tensor = Tensor::from(ids, {batch_, tokens_}, device);
  nn::Batch batch;
  batch.ids = batch.labels = tensor;
  return batch;
}

nn::Batch ByteData::draw(Generator& generator, Device device) const {
  std::vector<std::int64_t> starts;
  const auto places =
      static_cast<std::uint64_t>(train_.size()) - static_cast<std::uint64_t>(tokens_) + 1;
  for (std::int64_t b = 0; b < batch_; ++b) {
    const PhiloxBlock block = philox(generator.seed, generator.reserve(4));
    const std::uint64_t wide = std::uint64_t{block[0]} << 32 | block[1];
    starts.push_back(static_cast<std::int64_t>(wide % places));
  }
  return windows(train_, starts, device);
}

std::int64_t ByteData::validation_batches() const {
  return std::max<std::int64_t>(1,
                                static_cast<std::int64_t>(validation_.size()) / (batch_ * tokens_));
}

nn::Batch ByteData::validation(std::int64_t i, Device device) const {
  const auto places = static_cast<std::int64_t>(validation_.size()) - tokens_ + 1;
  std::vector<std::int64_t> starts;
  for (std::int64_t b = 0; b < batch_; ++b) {
    starts.push_back((i * batch_ + b) * tokens_ % places);
  }
  return windows(validation_, starts, device);
}

}  // namespace reprise::train

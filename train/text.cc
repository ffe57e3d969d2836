#include "train/text.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include <fmt/format.h>
#include <fmt/std.h>
#include <utf8.h>

#include "core/error.h"

namespace reprise::train {
namespace {

constexpr std::size_t kLeastBytes = 1000;

absl::StatusOr<std::string> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::NotFoundError(fmt::format("{}: cannot be read", path.string()));
  }
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) {
    return absl::DataLossError(fmt::format("{}: reading failed", path.string()));
  }
  return text;
}

absl::Status check_utf8(const std::filesystem::path& path, std::string_view text) {
  const auto bad = utf8::find_invalid(text.begin(), text.end());
  if (bad != text.end()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: not UTF-8 at byte {}", path.string(), bad - text.begin()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> read_text(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(
        fmt::format("{}: is a directory, a text file is needed", path.string()));
  }
  auto text = read_file(path);
  if (!text.ok()) {
    return text;
  }
  if (text->empty()) {
    return absl::InvalidArgumentError(fmt::format("{}: the file is empty", path.string()));
  }
  if (absl::Status status = check_utf8(path, *text); !status.ok()) {
    return status;
  }
  if (text->size() < kLeastBytes) {
    return absl::InvalidArgumentError(fmt::format("{}: at least {} bytes are needed, got {}",
                                                  path.string(), kLeastBytes, text->size()));
  }
  return text;
}

absl::StatusOr<std::string> read_fortunes(const std::filesystem::path& directory) {
  std::error_code error;
  std::set<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    if (entry.is_regular_file() && !entry.is_symlink() && entry.path().extension().empty()) {
      files.insert(entry.path());
    }
  }
  std::string all;
  for (const auto& path : files) {
    auto text = read_file(path);
    if (!text.ok()) {
      return text;
    }
    if (absl::Status status = check_utf8(path, *text); !status.ok()) {
      continue;  // one old collection is not UTF-8
    }
    all += *text;
  }
  if (all.size() < kLeastBytes) {
    return absl::NotFoundError(fmt::format(
        "{}: no quotations found: install Debian's package `fortunes`, or give --text FILE",
        directory.string()));
  }
  return all;
}

ByteData::ByteData(std::string_view text, std::int64_t batch, std::int64_t tokens)
    : batch_(batch), tokens_(tokens) {
  if (static_cast<std::int64_t>(text.size()) < 20 * tokens) {
    fail("data", "text must have at least 20 windows of {} bytes, got {} bytes", tokens,
         text.size());
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

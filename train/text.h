// Text as training data: tokens are bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "core/philox.h"
#include "core/tensor.h"
#include "nn/models/model.h"

namespace reprise::train {

inline constexpr std::int64_t kByteVocabulary = 256;

// The whole file. InvalidArgument when it is empty, shorter than `least_bytes`, or not UTF-8 (names
// the byte); NotFound when it is not there.
absl::StatusOr<std::string> read_text(const std::filesystem::path& path, std::int64_t least_bytes);

// The quotations of Debian's `fortunes` packages, in the order of the file names.
absl::StatusOr<std::string> read_fortunes(
    std::int64_t least_bytes, const std::filesystem::path& directory = "/usr/share/games/fortunes");

// Batches of B windows of T bytes, drawn at random places; labels are the ids (the model's loss
// shifts). The last tenth of the text is for validation.
class ByteData {
 public:
  // The shortest text there can be: 20 windows.
  static constexpr std::int64_t kLeastWindows = 20;
  static constexpr std::int64_t least_bytes(std::int64_t tokens) { return kLeastWindows * tokens; }
  // Throws Error when the text is shorter than that.
  ByteData(std::string_view text, std::int64_t batch, std::int64_t tokens);
  // Training windows, drawn from (generator); on meta the ids are real all the same.
  nn::Batch draw(Generator& generator, Device device = cpu) const;
  // Window group i of the validation part, always the same ones.
  nn::Batch validation(std::int64_t i, Device device = cpu) const;
  std::int64_t validation_batches() const;
  std::int64_t train_bytes() const { return static_cast<std::int64_t>(train_.size()); }
  std::int64_t batch() const { return batch_; }
  std::int64_t tokens() const { return tokens_; }

 private:
  nn::Batch windows(std::string_view text, const std::vector<std::int64_t>& starts,
                    Device device) const;

  std::string train_, validation_;
  std::int64_t batch_, tokens_;
};

}  // namespace reprise::train

// Writes a file all at once: bytes go to a temporary file in the same folder, which takes the place
// of the target when all of them are on disk. Until then, and after an error, the target is as it
// was. What a symbolic link points to is written, the link stays; an existing target keeps its
// mode, and must be a regular file. Pieces that are through count as progress (core/progress.h),
// and what was written goes to the disk as it comes, so that the end of a large file is no long
// wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace reprise::nn {

class ReplaceFile {
 public:
  explicit ReplaceFile(std::string path);
  // Without a commit the temporary file is removed.
  ~ReplaceFile();
  ReplaceFile(const ReplaceFile&) = delete;

  // After the first error it does nothing; commit() reports it.
  void append(const void* bytes, std::size_t count);
  // fsync, rename, fsync of the folder.
  absl::Status commit();

 private:
  void write_back();
  void fail_with(const std::string& path);
  // Follows links, looks at what is there.
  void find_target();

  std::string path_, temporary_;
  int file_ = -1;
  std::int64_t written_ = 0, sent_ = 0;  // bytes, and of them on their way to the disk
  bool named_ = false;                   // the temporary file has a name to remove
  std::optional<unsigned> mode_;         // of the file that is replaced
  absl::Status status_;
};

// What one call of the system reads or writes at most: a slow disk has moved it long before a
// watchdog takes the process for stuck.
inline constexpr std::size_t kFilePieceBytes = std::size_t{4} << 20;

// The whole text at once.
absl::Status replace_file(const std::string& path, const std::string& text);
// The whole file. NotFound when it is not there.
absl::Status read_file(const std::string& path, std::string& text);

}  // namespace reprise::nn

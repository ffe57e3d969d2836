// Writes a file all at once: bytes go to a temporary file in the same folder, which takes the place
// of the target when all of them are on disk. Until then, and after an error, the target is as it
// was. What a symbolic link points to is written, the link stays; an existing target keeps its
// mode, and must be a regular file.
#pragma once

#include <cstddef>
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
  void fail_with(const std::string& path);
  // Follows links, looks at what is there.
  void find_target();

  std::string path_, temporary_;
  int file_ = -1;
  bool named_ = false;            // the temporary file has a name to remove
  std::optional<unsigned> mode_;  // of the file that is replaced
  absl::Status status_;
};

// The whole text at once.
absl::Status replace_file(const std::string& path, const std::string& text);
// The whole file. NotFound when it is not there.
absl::Status read_file(const std::string& path, std::string& text);

}  // namespace reprise::nn

// Files for the tests of nn: ready cases, and a folder that lives as long as a test.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <gtest/gtest.h>

namespace reprise::testing {

// The ready cases of tests/golden, wherever in the source or build tree the test runs.
inline std::filesystem::path golden(const std::string& name) {
#if defined(REPRISE_SOURCE_DIR)
  return std::filesystem::path(REPRISE_SOURCE_DIR) / "tests/golden" / name;
#else
  std::filesystem::path folder = std::filesystem::current_path();
  while (!std::filesystem::exists(folder / "tests/golden") && folder.has_relative_path()) {
    folder = folder.parent_path();
  }
  return folder / "tests/golden" / name;
#endif
}

class Folder {
 public:
  Folder() {
    std::string pattern = ::testing::TempDir() + "/reprise-XXXXXX";
    path_ = ::mkdtemp(pattern.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  std::string at(const std::string& name) const { return (path_ / name).string(); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

}  // namespace reprise::testing

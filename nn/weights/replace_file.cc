#include "nn/weights/replace_file.h"

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

namespace reprise::nn {
namespace {

// Distinguishes temporary files of one process.
std::atomic<int> next_number{0};

}  // namespace

ReplaceFile::ReplaceFile(std::string path) : path_(std::move(path)) {
  temporary_ = fmt::format("{}.{}-{}.tmp", path_, ::getpid(), next_number.fetch_add(1));
  file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file_ < 0) {
    fail_with(temporary_);
  }
}

ReplaceFile::~ReplaceFile() {
  if (file_ >= 0) {
    ::close(file_);
    ::unlink(temporary_.c_str());
  }
}

void ReplaceFile::fail_with(const std::string& path) {
  if (status_.ok()) {
    status_ = absl::ErrnoToStatus(errno, path);
  }
}

void ReplaceFile::append(const void* bytes, std::size_t count) {
  const char* at = static_cast<const char*>(bytes);
  while (status_.ok() && count > 0) {
    const ssize_t written = ::write(file_, at, count);
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written <= 0) {
      fail_with(temporary_);
      return;
    }
    at += written;
    count -= static_cast<std::size_t>(written);
  }
}

absl::Status ReplaceFile::commit() {
  if (status_.ok() && ::fsync(file_) != 0) {
    fail_with(temporary_);
  }
  if (status_.ok() && ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail_with(path_);
  }
  if (!status_.ok()) {
    return status_;
  }
  ::close(file_);
  file_ = -1;
  // The name is on disk only once the folder is.
  const std::string folder = std::filesystem::path(path_).parent_path().string();
  const int descriptor = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor >= 0) {
    ::fsync(descriptor);
    ::close(descriptor);
  }
  return absl::OkStatus();
}

absl::Status replace_file(const std::string& path, const std::string& text) {
  ReplaceFile file(path);
  file.append(text.data(), text.size());
  return file.commit();
}

absl::Status read_file(const std::string& path, std::string& text) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    return absl::ErrnoToStatus(errno, path);
  }
  text.clear();
  char buffer[1 << 16];
  ssize_t count = 0;
  while ((count = ::read(file, buffer, sizeof buffer)) > 0 || (count < 0 && errno == EINTR)) {
    text.append(buffer, static_cast<std::size_t>(count > 0 ? count : 0));
  }
  const int error = errno;
  ::close(file);
  return count < 0 ? absl::ErrnoToStatus(error, path) : absl::OkStatus();
}

}  // namespace reprise::nn

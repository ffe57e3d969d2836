#include "nn/weights/replace_file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/progress.h"

namespace reprise::nn {
namespace {

namespace fs = std::filesystem;

constexpr int kMostLinks = 40;  // as the kernel has it
constexpr std::int64_t kWindowBytes = std::int64_t{64} << 20;

std::string folder_of(const std::string& path) {
  const std::string folder = fs::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// Distinguishes temporary files of one process.
std::atomic<int> next_number{0};

}  // namespace

ReplaceFile::ReplaceFile(std::string path) : path_(std::move(path)) {
  if (find_target(); !status_.ok()) {
    return;
  }
  const std::string folder = folder_of(path_);
  temporary_ = fmt::format("{}.{}-{}.tmp", path_, ::getpid(), next_number.fetch_add(1));
  // Without a name until it is whole, so that a killed process leaves nothing behind.
  file_ = ::open(folder.c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, 0666);
  named_ = file_ < 0;
  if (named_) {  // not every file system has such files
    file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  }
  if (file_ < 0) {
    fail_with(path_);
  } else if (mode_ && ::fchmod(file_, *mode_) != 0) {
    fail_with(temporary_);
  }
}

ReplaceFile::~ReplaceFile() {
  if (file_ >= 0) {
    ::close(file_);
    if (named_) {
      ::unlink(temporary_.c_str());
    }
  }
}

void ReplaceFile::fail_with(const std::string& path) {
  if (status_.ok()) {
    status_ = absl::ErrnoToStatus(errno, path);
  }
}

void ReplaceFile::find_target() {
  if (path_.empty()) {
    status_ = absl::InvalidArgumentError("the name of a file to write must not be empty");
    return;
  }
  // As open() would: what a link points to is written, also when it is not there yet.
  std::error_code error;
  for (int links = 0; fs::is_symlink(path_, error); ++links) {
    if (links == kMostLinks) {
      status_ = absl::InvalidArgumentError(path_ + ": too many symbolic links");
      return;
    }
    const fs::path target = fs::read_symlink(path_, error);
    path_ = (fs::path(path_).parent_path() / target).string();
  }
  struct stat info {};
  if (::lstat(path_.c_str(), &info) == 0) {
    if (!S_ISREG(info.st_mode)) {
      status_ = absl::InvalidArgumentError(path_ + ": is there and is no regular file");
      return;
    }
    mode_ = info.st_mode & 07777;
  }
}

void ReplaceFile::append(const void* bytes, std::size_t count) {
  const char* at = static_cast<const char*>(bytes);
  while (status_.ok() && count > 0) {
    const ssize_t written = ::write(file_, at, std::min(count, kFilePieceBytes));
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written <= 0) {
      fail_with(temporary_);
      return;
    }
    at += written;
    count -= static_cast<std::size_t>(written);
    written_ += written;
    progress().tick();
    if (written_ - sent_ >= kWindowBytes) {
      write_back();
    }
  }
}

// Asks for the window just written and waits for the one before. A file system that cannot is left
// to fsync.
void ReplaceFile::write_back() {
  ::sync_file_range(file_, sent_, written_ - sent_, SYNC_FILE_RANGE_WRITE);
  if (sent_ > 0) {
    ::sync_file_range(
        file_, 0, sent_,
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  }
  sent_ = written_;
  progress().tick();
}

absl::Status ReplaceFile::commit() {
  if (status_.ok() && ::fsync(file_) != 0) {
    fail_with(temporary_);
  }
  if (status_.ok() && !named_) {
    const std::string open_file = fmt::format("/proc/self/fd/{}", file_);
    named_ =
        ::linkat(AT_FDCWD, open_file.c_str(), AT_FDCWD, temporary_.c_str(), AT_SYMLINK_FOLLOW) == 0;
    if (!named_) {
      fail_with(temporary_);
    }
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
  const int descriptor = ::open(folder_of(path_).c_str(), O_RDONLY | O_CLOEXEC);
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
    progress().tick();
    text.append(buffer, static_cast<std::size_t>(count > 0 ? count : 0));
  }
  const int error = errno;
  ::close(file);
  return count < 0 ? absl::ErrnoToStatus(error, path) : absl::OkStatus();
}

}  // namespace reprise::nn

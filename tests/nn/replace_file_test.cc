// Writing over what is there: links, pipes, modes, and what a killed writer leaves.
#include "nn/weights/replace_file.h"

#include <csignal>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/progress.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::contents;
using testing::Folder;
namespace fs = std::filesystem;

std::size_t entries(const Folder& folder) {
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()));
}

TEST(ReplaceFile, ALinkStaysAndItsTargetIsWritten) {
  const Folder folder;
  fs::create_directory(folder.at("data"));
  testing::write(folder.at("data/real"), "old");
  fs::create_symlink("data/real", folder.at("relative"));
  fs::create_symlink(folder.at("relative"), folder.at("absolute"));
  ASSERT_TRUE(replace_file(folder.at("absolute"), "new").ok());
  EXPECT_TRUE(fs::is_symlink(folder.at("absolute")));
  EXPECT_TRUE(fs::is_symlink(folder.at("relative")));
  EXPECT_EQ(contents(folder.at("data/real")), "new");
  // A link to a file that is not there yet makes it.
  fs::create_symlink("data/later", folder.at("dangling"));
  ASSERT_TRUE(replace_file(folder.at("dangling"), "made").ok());
  EXPECT_TRUE(fs::is_symlink(folder.at("dangling")));
  EXPECT_EQ(contents(folder.at("data/later")), "made");
  EXPECT_EQ(entries(folder), 4u);
}

TEST(ReplaceFile, ALinkToItselfIsAnError) {
  const Folder folder;
  fs::create_symlink("loop", folder.at("loop"));
  const absl::Status status = replace_file(folder.at("loop"), "x");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), folder.at("loop") + ": too many symbolic links");
  EXPECT_TRUE(fs::is_symlink(folder.at("loop")));
}

TEST(ReplaceFile, WhatIsNoRegularFileIsRefused) {
  const Folder folder;
  ASSERT_EQ(::mkfifo(folder.at("pipe").c_str(), 0600), 0);
  fs::create_directory(folder.at("sub"));
  fs::create_symlink("pipe", folder.at("link"));
  for (const auto& [name, target] :
       {std::pair("pipe", "pipe"), std::pair("sub", "sub"), std::pair("link", "pipe")}) {
    const absl::Status status = replace_file(folder.at(name), "x");
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), folder.at(target) + ": is there and is no regular file");
  }
  EXPECT_TRUE(fs::is_fifo(folder.at("pipe")));
  EXPECT_TRUE(fs::is_directory(folder.at("sub")));
  EXPECT_EQ(entries(folder), 3u);
  EXPECT_EQ(replace_file("", "x").message(), "the name of a file to write must not be empty");
}

TEST(ReplaceFile, TheModeOfTheOldFileStays) {
  const Folder folder;
  testing::write(folder.at("a"), "old");
  for (const mode_t mode : {0600, 0640, 0755}) {
    ASSERT_EQ(::chmod(folder.at("a").c_str(), mode), 0);
    ASSERT_TRUE(replace_file(folder.at("a"), "new").ok());
    struct stat info {};
    ASSERT_EQ(::stat(folder.at("a").c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 07777, mode);
  }
  const mode_t before = ::umask(027);
  ASSERT_TRUE(replace_file(folder.at("fresh"), "new").ok());
  ::umask(before);
  struct stat info {};
  ASSERT_EQ(::stat(folder.at("fresh").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0640u);
}

TEST(ReplaceFile, WithoutACommitTheTargetStaysAndNothingIsLeft) {
  const Folder folder;
  testing::write(folder.at("a"), "old");
  {
    ReplaceFile file(folder.at("a"));
    file.append("new", 3);
  }
  EXPECT_EQ(contents(folder.at("a")), "old");
  EXPECT_EQ(entries(folder), 1u);
  const absl::Status status = replace_file(folder.at("none/a"), "x");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), folder.at("none/a") + ": No such file or directory");
}

TEST(ReplaceFile, AKilledWriterLeavesNothing) {
  const Folder folder;
  const int probe = ::open(folder.path().c_str(), O_WRONLY | O_TMPFILE, 0600);
  if (probe < 0) {
    GTEST_SKIP() << "the file system has no files without names";
  }
  ::close(probe);
  testing::write(folder.at("a"), "old");
  const pid_t child = ::fork();
  if (child == 0) {
    ReplaceFile file(folder.at("a"));
    file.append("half", 4);
    ::raise(SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(contents(folder.at("a")), "old");
  EXPECT_EQ(entries(folder), 1u);
}

// For who watches the process: a file of any size moves in pieces, each of which counts.
TEST(ReplaceFile, PiecesCountAsProgress) {
  const Folder folder;
  const std::string bytes(5 * kFilePieceBytes + 1, 'x');
  std::uint64_t before = progress().ticks();
  {
    ReplaceFile file(folder.at("a"));
    file.append(bytes.data(), bytes.size());
    EXPECT_EQ(progress().ticks() - before, 6u);
    // Over the edge of a window that goes to the disk.
    for (int i = 0; i < 13; ++i) {
      file.append(bytes.data(), bytes.size());
    }
    EXPECT_GE(progress().ticks() - before, 14u * 6 + 3);
    ASSERT_TRUE(file.commit().ok());
  }
  EXPECT_EQ(fs::file_size(folder.at("a")), 14 * bytes.size());
  before = progress().ticks();
  std::string back;
  ASSERT_TRUE(read_file(folder.at("a"), back).ok());
  EXPECT_GE(progress().ticks() - before, 14u * 6);
  EXPECT_EQ(back.size(), 14 * bytes.size());
  EXPECT_EQ(back.substr(13 * bytes.size()), bytes);
}

}  // namespace
}  // namespace reprise::nn

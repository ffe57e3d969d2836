// What comes from outside and cannot be used, as a process sees it: exit code 2 and one message.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/nn/files.h"
#include "tests/train/process.h"

namespace reprise::train {
namespace {

using testing::contents;
using testing::expect_refused;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using testing::Outcome;
using testing::run_program;
using ::testing::StartsWith;

// A copy of a ready case whose files a test breaks.
struct Broken {
  Folder folder;
  explicit Broken(const std::string& name = "llama") {
    std::filesystem::copy(golden(name), folder.path(),
                          std::filesystem::copy_options::recursive |
                              std::filesystem::copy_options::overwrite_existing);
  }
  std::string at(const std::string& file) const { return folder.at(file); }
  void write(const std::string& file, const std::string& text) const {
    testing::write(at(file), text);
  }
  // In config.json.
  void replace(const std::string& from, const std::string& to) const {
    std::string text = contents(at("config.json"));
    const std::size_t place = text.find(from);
    ASSERT_NE(place, std::string::npos) << from;
    write("config.json", text.replace(place, from.size(), to));
  }
  std::string command() const { return "parity " + folder.path().string(); }
  // After the path of the file.
  void expect(const std::string& file, const std::string& message) const {
    expect_refused(command(), at(file) + ": " + message);
  }
};

std::string text_file(const Folder& folder) {
  std::string text;
  for (int i = 0; text.size() < 20000; ++i) {
    text += "line " + std::to_string(i * i) + " of some text\n";
  }
  testing::write(folder.at("text.txt"), text);
  return folder.at("text.txt");
}

TEST(BadInput, ALossThatIsNotFiniteEndsTheRun) {
  const Folder folder;
  const auto [code, text] =
      run_program("demo --quiet --seconds 60 --learning-rate 1e60 --text " + text_file(folder));
  EXPECT_EQ(code, 2);
  const std::size_t line = text.rfind("reprise: ");
  ASSERT_NE(line, std::string::npos) << text;
  EXPECT_EQ(text.substr(line),
            "reprise: [train] the loss is nan at step 2; first op with a non-finite output: "
            "[embedding] output 0 of shape [8, 128, 320] is not finite, outside of segments\n");
}

}  // namespace
}  // namespace reprise::train

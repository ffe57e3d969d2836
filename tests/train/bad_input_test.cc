// What comes from outside and cannot be used, as a process sees it: exit code 2 and one message.
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "nn/models/model.h"
#include "nn/weights/safetensors.h"
#include "tests/nn/files.h"
#include "tests/train/process.h"

namespace reprise::train {
namespace {

using testing::contents;
using testing::expect_refused;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;
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

TEST(BadInput, WeightsThatAreNotThereOrCut) {
  const Broken broken;
  const std::string whole = contents(broken.at("model.safetensors"));
  std::filesystem::remove(broken.at("model.safetensors"));
  broken.expect("model.safetensors", "No such file or directory");
  broken.write("model.safetensors", "");
  broken.expect("model.safetensors", "HeaderTooSmall: the file has 0 bytes, 8 are the least");
  for (const std::size_t bytes :
       {std::size_t{7}, std::size_t{8}, std::size_t{1000}, whole.size() / 2, whole.size() - 1}) {
    broken.write("model.safetensors", whole.substr(0, bytes));
    const Outcome outcome = run_program(broken.command());
    EXPECT_EQ(outcome.code, 2);
    EXPECT_THAT(outcome.text, StartsWith("reprise: " + broken.at("model.safetensors") + ": "));
    EXPECT_EQ(std::ranges::count(outcome.text, '\n'), 1) << outcome.text;
  }
}

TEST(BadInput, FlippedBytesOfAHeader) {
  const Broken broken;
  const std::string whole = contents(broken.at("model.safetensors"));
  const std::size_t dtype = whole.find("F32"), shape = whole.find("\"shape\":[") + 9;
  for (const auto& [at, byte] : std::vector<std::pair<std::size_t, char>>{{0, '\0'},
                                                                          {2, '\x01'},
                                                                          {7, '\x7f'},
                                                                          {8, '['},
                                                                          {9, '\xff'},
                                                                          {dtype, 'G'},
                                                                          {shape, '-'}}) {
    std::string changed = whole;
    ASSERT_NE(changed[at], byte);
    changed[at] = byte;
    broken.write("model.safetensors", changed);
    const Outcome outcome = run_program(broken.command());
    EXPECT_EQ(outcome.code, 2) << at;
    EXPECT_THAT(outcome.text, StartsWith("reprise: " + broken.at("model.safetensors") + ": "));
    EXPECT_EQ(std::ranges::count(outcome.text, '\n'), 1) << outcome.text;
  }
  broken.write("model.safetensors", whole);
  EXPECT_EQ(run_program(broken.command()).code, 0);
}

TEST(BadInput, Configs) {
  const auto with = [](const std::string& from, const std::string& to, const std::string& message) {
    const Broken broken;
    broken.replace(from, to);
    broken.expect("config.json", message);
  };
  with(R"("model_type": "llama")", R"("model_type": "mamba")",
       fmt::format("model_type must be one of {}, got \"mamba\"",
                   fmt::join(nn::supported_models(), ", ")));
  with(R"("hidden_size": 32)", R"("hidden_size": "32")",
       "hidden_size must be a whole number, got \"32\"");
  with(R"("factor": 8.0,)", "", "rope_scaling.factor is missing");
  with(R"("vocab_size": 101)", R"("vocab_size": 1000000000000)",
       "vocab_size must be at most 67108864, got 1000000000000");
  with(R"("rms_norm_eps": 0.0001)", R"("rms_norm_eps": 1e400)", "the number '1e400' is too large");
  const Broken none;
  none.write("config.json", "{}");
  none.expect("config.json", "model_type is missing");
  std::filesystem::remove(none.at("config.json"));
  none.expect("config.json", "No such file or directory");
}

TEST(BadInput, AShapeThatDoesNotFit) {
  const Broken broken;
  broken.replace(R"("vocab_size": 101)", R"("vocab_size": 102)");
  broken.expect("model.safetensors",
                "tensor \"model.embed_tokens.weight\" must have shape [102, 32], got [101, 32]");
}

// A text of no rows and any length, and a position at the end of the integers.
TEST(BadInput, EdgesOfParityInputs) {
  const auto with = [](const std::string& key, const Tensor& tensor) {
    const Broken broken;
    const auto file = nn::SafetensorsFile::open(broken.at("parity.safetensors"));
    std::vector<nn::NamedTensor> tensors{{key, tensor}};
    for (const char* name : {"in.input_ids", "in.labels"}) {
      if (key != "in.input_ids") {
        tensors.push_back({name, file->read(name)->clone()});
      }
    }
    EXPECT_TRUE(nn::write_safetensors(broken.at("parity.safetensors"), tensors).ok());
    return std::pair(
        run_program("parity --write " + broken.at("out") + " " + broken.folder.path().string()),
        broken.at("parity.safetensors"));
  };
  const auto [empty, unused] =
      with("in.input_ids", Tensor::empty(Shape{0, std::int64_t{1} << 40}, DType::i64));
  EXPECT_EQ(empty.code, 0) << empty.text;
  const Tensor positions = Tensor::zeros(Shape{2, 13}, DType::i64);
  positions.data<std::int64_t>()[3] = INT64_MAX;
  const auto [far, path] = with("in.position_ids", positions);
  EXPECT_EQ(far.code, 2);
  EXPECT_EQ(far.text, "reprise: " + path +
                          ": [model] positions must be from 0 to 2147483647, got "
                          "9223372036854775807\n");
}

TEST(BadInput, Texts) {
  const Folder folder;
  const std::string text = folder.at("text.txt");
  const std::string command = "demo --text " + text;
  expect_refused(command, text + ": No such file or directory");
  testing::write(text, "");
  expect_refused(command, text + ": the file is empty");
  testing::write(text, std::string(4000, 'a') + "\xff\xfe" + std::string(4000, 'b'));
  expect_refused(command, text + ": not UTF-8 at byte 4000");
  testing::write(text, std::string(2559, 'a'));
  expect_refused(command, text + ": at least 2560 bytes are needed, got 2559");
  expect_refused("demo --text " + folder.path().string(),
                 folder.path().string() + ": is a directory, a text file is needed");
}

TEST(BadInput, Flags) {
  expect_refused("tset", "unknown command tset: did you mean test?");
  expect_refused("biuld", "unknown command biuld: did you mean build?");
  expect_refused("dmo", "unknown command dmo: did you mean demo?");
  expect_refused("partiy x", "unknown command partiy: did you mean parity?");
  expect_refused(
      "xyzzy", "unknown command xyzzy; commands: build, demo, explain, init, memory, parity, test");
  expect_refused("demo --second 5", "unknown flag --second: did you mean --seconds?");
  expect_refused("parity --jsn x", "unknown flag --jsn: did you mean --json?");
  expect_refused("--rank 2 demo", "unknown flag --rank: did you mean --ranks?");
  expect_refused("demo --text \"\"", "--text: must name a file, got \"\"");
  expect_refused("demo --gradients-out \"\"", "--gradients-out: must name a file, got \"\"");
  expect_refused("parity x --write \"\"", "--write: must name a file, got \"\"");
  expect_refused("demo --seed -1", "--seed: must be a whole number from 0 to 2^64 - 1, got \"-1\"");
  expect_refused("demo --seed 18446744073709551616",
                 "--seed: must be a whole number from 0 to 2^64 - 1, got \"18446744073709551616\"");
  for (const std::string bad : {"nan", "inf", "0", "-1", "1e400", "5s"}) {
    expect_refused("demo --seconds " + bad,
                   "--seconds: must be a number above 0, got \"" + bad + "\"");
  }
}

// Refused by the script itself: a folder with nothing but the script stays as it is.
TEST(BadInput, UnknownCommandsOfTheScript) {
  const Folder bare;
  std::filesystem::copy_file(REPRISE_SOURCE_DIR "/reprise", bare.at("reprise"));
  for (const auto& [words, message] : std::vector<std::pair<std::string, std::string>>{
           {"tset", "unknown command tset: did you mean test?"},
           {"--ranks 2 dmo --text x", "unknown command dmo: did you mean demo?"},
           {"xyzzy",
            "unknown command xyzzy; commands: build, demo, explain, init, memory, parity, test"}}) {
    const Outcome outcome = run_program(words, bare.at("reprise"));
    EXPECT_EQ(outcome.code, 2);
    EXPECT_EQ(outcome.text, "reprise: " + message + "\n");
  }
  EXPECT_FALSE(std::filesystem::exists(bare.at("build")));
}

// What the script does is refused by the program itself, with the way to go.
TEST(BadInput, CommandsOfTheScript) {
  expect_refused("test", "test is a command of the script: ./reprise test");
  expect_refused("build", "build is a command of the script: ./reprise build");
  const Outcome help = run_program("--help");
  EXPECT_EQ(help.code, 0);
  for (const char* command : {"demo", "parity", "test", "build", "--ranks"}) {
    EXPECT_THAT(help.text, HasSubstr(command));
  }
}

// One message, from the process that was called: no rank is started for what it can see itself.
TEST(BadInput, Ranks) {
  expect_refused("--ranks 3 demo", "--ranks must divide the batch of 8, got 3");
  expect_refused("--ranks 2 parity x", "--ranks is of no use to parity");
  expect_refused("--ranks 2 demo --second 5", "unknown flag --second: did you mean --seconds?");
  expect_refused("--ranks 2 demo --text /nonexistent/text",
                 "/nonexistent/text: No such file or directory");
  expect_refused("--ranks two demo", "--ranks must be a number from 1 to 4096, got \"two\"");
}

TEST(BadInput, OutputsThatCannotBeReplaced) {
  const Folder folder;
  ASSERT_EQ(::mkfifo(folder.at("pipe").c_str(), 0600), 0);
  expect_refused(
      "demo --quiet --text " + text_file(folder) + " --gradients-out " + folder.at("pipe"),
      folder.at("pipe") + ": is there and is no regular file");
  EXPECT_TRUE(std::filesystem::is_fifo(folder.at("pipe")));
  testing::write(folder.at("target"), "old");
  std::filesystem::create_symlink("target", folder.at("link"));
  const Outcome outcome =
      run_program("parity " + golden("llama").string() + " --write " + folder.at("link"));
  EXPECT_EQ(outcome.code, 0) << outcome.text;
  EXPECT_TRUE(std::filesystem::is_symlink(folder.at("link")));
  EXPECT_GT(std::filesystem::file_size(folder.at("target")), 1000u);
}

}  // namespace
}  // namespace reprise::train

// The program as a user sees it: exit codes and messages.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>

#include "tests/train/process.h"

namespace reprise::train {
namespace {

namespace fs = std::filesystem;

using testing::Outcome;

Outcome run(const std::string& arguments) {
  return testing::run_program(arguments);
}

class Files : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              ("reprise_" + std::to_string(getpid()) + "_" +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string write(const std::string& name, const std::string& content) {
    std::ofstream(folder_ / name, std::ios::binary) << content;
    return (folder_ / name).string();
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  fs::path folder_;
};

using CommandLine = Files;

TEST_F(CommandLine, UnknownCommandSuggestsTheNearest) {
  const Outcome outcome = run("dmo");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_EQ(outcome.text, "reprise: unknown command dmo: did you mean demo?\n");
}

TEST_F(CommandLine, UnknownFlagSuggestsTheNearest) {
  const Outcome outcome = run("demo --second 5");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_EQ(outcome.text, "reprise: unknown flag --second: did you mean --seconds?\n");
}

TEST_F(CommandLine, NothingAtAllAndBadValues) {
  EXPECT_EQ(run("").code, 2);
  EXPECT_EQ(run("demo --seconds=-1").code, 2);
  EXPECT_EQ(run("demo --policy keep-most").code, 2);
  EXPECT_EQ(run("--help").code, 0);
  EXPECT_EQ(run("--help > /dev/full").code, 1);
  EXPECT_EQ(run("demo --help").code, 0);
}

// In a build without CUDA, or on a machine without a device: what is missing.
TEST_F(CommandLine, ADeviceThatIsNotThere) {
  const std::string golden = std::string(REPRISE_SOURCE_DIR) + "/tests/golden/gpt2";
  for (const std::string& command : {std::string("demo --seconds 1"), "parity " + golden}) {
    const Outcome outcome = run(command + " --device cuda:100");
    EXPECT_EQ(outcome.code, 2) << command;
    EXPECT_TRUE(outcome.text.starts_with("reprise: [cuda] ")) << outcome.text;
    if (outcome.text.find("this build has no CUDA") != std::string::npos) {
      EXPECT_NE(outcome.text.find("install the CUDA toolkit"), std::string::npos) << outcome.text;
    }
  }
  EXPECT_EQ(run("demo --device gpu").code, 2);
  EXPECT_EQ(run("demo --device gpu").text,
            "reprise: --device: must be cpu, cuda or cuda:N, got \"gpu\"\n");
  EXPECT_EQ(run("--ranks 2 demo --device cuda").text,
            "reprise: --ranks trains on the CPUs of its processes: leave out --device\n");
}

// Its bytes are those of the device's kernels, whose products have a workspace of their library.
TEST_F(CommandLine, MemoryOfADeviceThatNeedNotBeHere) {
  const std::string arguments = "memory " + std::string(REPRISE_SOURCE_DIR) +
                                "/docs/configs/qwen2-0.5b.json --tokens 64 --policy keep-all";
  const Outcome host = run(arguments), device = run(arguments + " --device cuda --json");
  ASSERT_EQ(host.code, 0) << host.text;
  ASSERT_EQ(device.code, 0) << device.text;
  EXPECT_NE(device.text.find("\"device\": \"cuda\""), std::string::npos) << device.text;
  EXPECT_NE(run(arguments + " --device cuda").text, host.text);
}

TEST_F(CommandLine, TextThatCannotBeUsed) {
  const std::string missing = path("missing.txt");
  EXPECT_EQ(run("demo --text " + missing).code, 2);
  EXPECT_EQ(run("demo --text " + missing).text,
            "reprise: " + missing + ": No such file or directory\n");
  const std::string empty = write("empty.txt", "");
  EXPECT_EQ(run("demo --text " + empty).code, 2);
  EXPECT_EQ(run("demo --text " + empty).text, "reprise: " + empty + ": the file is empty\n");
  const std::string binary =
      write("binary.txt", std::string(4000, 'a') + "\xff\xfe" + std::string(4000, 'b'));
  EXPECT_EQ(run("demo --text " + binary).code, 2);
  EXPECT_EQ(run("demo --text " + binary).text, "reprise: " + binary + ": not UTF-8 at byte 4000\n");
  const std::string brief = write("brief.txt", "too short");
  EXPECT_EQ(run("demo --text " + brief).code, 2);
  EXPECT_EQ(run("demo --text " + folder_.string()).code, 2);
}

TEST_F(CommandLine, GradientsOfTwoPoliciesAreTheSameFile) {
  std::string text;
  for (int i = 0; text.size() < 20000; ++i) {
    text += "line " + std::to_string(i * i) + " of some text\n";
  }
  const std::string file = write("text.txt", text);
  for (const char* policy : {"keep-all", "keep-products", "inputs-only", "nested"}) {
    const Outcome outcome = run("demo --quiet --text " + file + " --policy " + policy +
                                " --gradients-out " + path(policy));
    ASSERT_EQ(outcome.code, 0) << outcome.text;
  }
  auto read = [&](const char* name) {
    std::ifstream in(path(name), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  const std::string first = read("keep-all");
  EXPECT_GT(first.size(), std::size_t{30} << 20);
  EXPECT_TRUE(first == read("keep-products"));
  EXPECT_TRUE(first == read("inputs-only"));
  EXPECT_TRUE(first == read("nested"));
}

TEST_F(CommandLine, DemoLearnsAndItsTableAgrees) {
  const Outcome outcome = run("demo --seconds 14");
  ASSERT_EQ(outcome.code, 0) << outcome.text;
  testing::expect_demo_output(outcome.text, 14);
  double before = 0, after = 0;
  ASSERT_EQ(std::sscanf(outcome.text.c_str() + outcome.text.find("Validation loss before:"),
                        "Validation loss before: %lf", &before),
            1);
  ASSERT_EQ(std::sscanf(outcome.text.c_str() + outcome.text.find("Validation loss after:"),
                        "Validation loss after: %lf", &after),
            1);
  EXPECT_NEAR(before, 5.5, 0.5);
  EXPECT_LT(after, before - 1.5);
  EXPECT_NE(outcome.text.find("All gradients are bitwise equal under every policy."),
            std::string::npos);
}

}  // namespace
}  // namespace reprise::train

#include "train/text.h"

#include <regex>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/nearest.h"
#include "train/progress.h"

namespace reprise::train {
namespace {

std::string letters(std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    text += static_cast<char>('a' + i % 26);
  }
  return text;
}

TEST(ByteData, WindowsAreRunsOfTheText) {
  const ByteData data(letters(5000), 3, 16);
  Generator generator{4, 0};
  const nn::Batch batch = data.draw(generator);
  ASSERT_EQ(batch.ids.shape(), Shape({3, 16}));
  const auto ids = batch.ids.to_vector<std::int64_t>();
  for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
    if (i % 16 != 15) {
      EXPECT_EQ((ids[i] - 'a' + 1) % 26, ids[i + 1] - 'a');
    }
  }
  Generator again{4, 0};
  EXPECT_EQ(data.draw(again).ids.to_vector<std::int64_t>(), ids);
  EXPECT_NE(data.draw(again).ids.to_vector<std::int64_t>(), ids);
}

TEST(ByteData, ValidationIsFixedAndApart) {
  const ByteData data(letters(4500) + std::string(500, '#'), 2, 16);
  EXPECT_EQ(data.train_bytes(), 4500);
  for (std::int64_t id : data.validation(1).ids.to_vector<std::int64_t>()) {
    EXPECT_EQ(id, '#');
  }
}

TEST(ByteData, TooShortATextIsAnError) {
  try {
    ByteData(letters(100), 2, 16);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "[data] text must have at least 20 windows of 16 bytes, got 100 bytes");
  }
}

TEST(Fortunes, AMissingFolderSaysWhatToInstall) {
  const auto text = read_fortunes(1, "/nonexistent");
  ASSERT_FALSE(text.ok());
  EXPECT_EQ(std::string(text.status().message()),
            "/nonexistent: no quotations found: install Debian's package `fortunes`, or give "
            "--text FILE");
}

TEST(Suggest, NearestByEditDistance) {
  EXPECT_EQ(nearest("partiy", {"demo", "parity"}), "parity");
  EXPECT_EQ(nearest("xyzzy", {"demo", "parity"}), "");
  EXPECT_EQ(nearest("", {"demo"}), "");
}

TEST(Progress, TheLineAndWhenItIsShown) {
  const auto shown = [](bool quiet) {
    ::testing::internal::CaptureStderr();
    Progress progress(quiet);
    progress.show({.step = 1, .loss = 5.25, .tokens = 1024, .fraction = 0.25});
    progress.show({.step = 2, .loss = 5, .tokens = 2048, .fraction = 0.5});  // too soon
    progress.show({.step = 3, .loss = 4.5, .tokens = 3072, .fraction = 1}, /*last=*/true);
    return ::testing::internal::GetCapturedStderr();
  };
  const std::string memory = "memory [0-9.]+ [KMG]?i?B \\(peak [0-9.]+ [KMG]?i?B\\)";
  EXPECT_TRUE(std::regex_match(
      shown(false), std::regex("step     1  loss 5\\.2500  [0-9]+ tokens/s  " + memory +
                               "  left 0:00\nstep     3  loss 4\\.5000  [0-9]+ tokens/s  " +
                               memory + "  left 0:00\n")));
  EXPECT_EQ(shown(true), "");
}

TEST(Progress, HumanUnits) {
  EXPECT_EQ(human_bytes(340), "340 B");
  EXPECT_EQ(human_bytes(12 << 20), "12.0 MiB");
  EXPECT_EQ(human_bytes(std::int64_t{3} << 29), "1.50 GiB");
  EXPECT_EQ(human_seconds(65), "1:05");
  EXPECT_EQ(human_seconds(7387), "2:03:07");
  EXPECT_GT(peak_resident_bytes(), 0);
}

}  // namespace
}  // namespace reprise::train

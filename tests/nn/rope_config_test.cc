#include "nn/rope_config.h"

#include <cmath>

#include <gtest/gtest.h>

namespace reprise::nn {
namespace {

RopeConfig read(const std::string& text, std::int64_t head_size = 128,
                std::int64_t positions = 4096) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  const RopeConfig rope = read_rope(json, head_size, positions, 10000);
  EXPECT_TRUE(json.status().ok()) << json.status();
  return rope;
}

std::string problem(const std::string& text, std::int64_t head_size = 128) {
  JsonReader json = *JsonReader::parse(text, "c.json");
  read_rope(json, head_size, 4096, 10000);
  return std::string(json.status().message());
}

TEST(Rope, PlainFrequencies) {
  const std::vector<float> f = rope_frequencies(read(R"({"rope_theta": 500000})"), 10);
  ASSERT_EQ(f.size(), 64u);
  EXPECT_EQ(f[0], 1);
  EXPECT_NEAR(f[28], 3.2114e-3, 1e-7);
  EXPECT_NEAR(f[29], 2.6161e-3, 1e-7);
  EXPECT_NEAR(f[63], std::pow(500000.0, -126.0 / 128), 1e-12);
}

// The values of the published models.
TEST(Rope, Llama3KeepsBlendsAndDivides) {
  const auto f = rope_frequencies(
      read(R"({"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}})"),
      10);
  const auto plain = rope_frequencies(read(R"({"rope_theta": 500000})"), 10);
  EXPECT_EQ(f[28], plain[28]);
  EXPECT_NEAR(f[29], 2.16657e-3, 1e-8);
  EXPECT_NEAR(f[32], 5.24846e-4, 1e-9);
  EXPECT_EQ(f[35], plain[35] / 8);
  EXPECT_EQ(f[63], plain[63] / 8);
}

TEST(Rope, LinearDividesAll) {
  const auto f = rope_frequencies(read(R"({"rope_scaling": {"type": "linear", "factor": 4}})"), 10);
  const auto plain = rope_frequencies(read("{}"), 10);
  for (std::size_t i = 0; i < f.size(); ++i) {
    EXPECT_EQ(f[i], plain[i] / 4);
  }
}

TEST(Rope, DynamicGrowsThetaBeyondTheLimit) {
  const RopeConfig rope = read(R"({"rope_scaling": {"type": "dynamic", "factor": 2}})");
  const auto plain = rope_frequencies(read("{}"), 10);
  EXPECT_EQ(rope_frequencies(rope, 4096), plain);
  const double theta = 10000 * std::pow(2.0 * 6000 / 4096 - 1, 128.0 / 126);
  const auto longer = rope_frequencies(rope, 6000);
  for (std::size_t i = 0; i < longer.size(); ++i) {
    EXPECT_NEAR(longer[i], std::pow(theta, -2.0 * static_cast<double>(i) / 128), 1e-6 * longer[i]);
  }
}

TEST(Rope, YarnRampsBetweenItsDimensions) {
  const RopeConfig rope =
      read(R"({"rope_theta": 1000000, "rope_scaling": {"type": "yarn", "factor": 4,
                                   "original_max_position_embeddings": 32768}})",
           128, 131072);
  EXPECT_NEAR(rope.attention_factor, 0.1 * std::log(4.0) + 1, 1e-12);
  const auto f = rope_frequencies(rope, 10);
  const auto plain = rope_frequencies(read(R"({"rope_theta": 1000000})"), 10);
  // 128 ln(32768 / (32 2 pi)) / (2 ln 1e6) = 23.6 -> 23; with 1 turn: 39.7 -> 40.
  EXPECT_EQ(f[23], plain[23]);
  EXPECT_NEAR(f[40], plain[40] / 4, 1e-7 * plain[40]);
  EXPECT_NEAR(f[63], plain[63] / 4, 1e-7 * plain[63]);
  const double ramp = (30.0 - 23) / (40 - 23);
  EXPECT_NEAR(f[30], plain[30] / 4 * ramp + plain[30] * (1 - ramp), 1e-6 * plain[30]);
  EXPECT_EQ(read(R"({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.5}})")
                .attention_factor,
            1.5);
  EXPECT_NEAR(read(R"({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 0.7,
                       "mscale_all_dim": 1.0}})")
                  .attention_factor,
              (0.07 * std::log(4.0) + 1) / (0.1 * std::log(4.0) + 1), 1e-12);
}

TEST(Rope, OlderAndNewerSpellingsSayTheSame) {
  const auto older = read(R"({"rope_theta": 20000, "partial_rotary_factor": 0.5,
                              "rope_scaling": {"type": "linear", "factor": 2}})");
  const auto newer = read(R"({"rope_parameters": {"rope_theta": 20000, "partial_rotary_factor": 0.5,
                              "rope_type": "linear", "factor": 2}})");
  EXPECT_EQ(older.dim, 64);
  EXPECT_EQ(newer.dim, 64);
  EXPECT_EQ(rope_frequencies(older, 1), rope_frequencies(newer, 1));
  // The newer key wins inside one object; what both mean by these is no scaling.
  EXPECT_EQ(
      read(R"({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2}})").scaling,
      RopeScaling::linear);
  EXPECT_EQ(read(R"({"rope_scaling": {"type": "mrope"}})").scaling, RopeScaling::none);
  EXPECT_EQ(read(R"({"rope_scaling": {"type": "default"}})").scaling, RopeScaling::none);
  EXPECT_EQ(read(R"({"rope_scaling": null})").scaling, RopeScaling::none);
  EXPECT_EQ(read(R"({"rope_parameters": {"rope_type": "default"}})").theta, 10000);
}

TEST(Rope, TellsWhatIsWrong) {
  EXPECT_EQ(
      problem(R"({"rope_scaling": {"type": "longrope"}})"),
      "c.json: rope_scaling.rope_type must be one of default, linear, dynamic, llama3, yarn, got "
      "\"longrope\"");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "linear"}})"),
            "c.json: rope_scaling.factor is missing");
  EXPECT_EQ(problem(R"({"rope_parameters": {"rope_type": "llama3", "factor": 8}})"),
            "c.json: rope_parameters.low_freq_factor is missing");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
                        "high_freq_factor": 4, "original_max_position_embeddings": 8192}})"),
            "c.json: rope_scaling.high_freq_factor must be above low_freq_factor = 4, got 4");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "linear", "factor": 0}})"),
            "c.json: rope_scaling.factor must be above 0, got 0");
  EXPECT_EQ(problem(R"({"rope_scaling": "linear"})"),
            "c.json: rope_scaling must be an object, got \"linear\"");
  EXPECT_EQ(problem(R"({"rope_theta": 1})"),
            "c.json: rope_theta must be above 1 and at most 1e+30, got 1");
  EXPECT_EQ(problem(R"({"rope_theta": 1e300})"),
            "c.json: rope_theta must be above 1 and at most 1e+30, got 1e+300");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 0,
                        "high_freq_factor": 4, "original_max_position_embeddings": 8192}})"),
            "c.json: rope_scaling.low_freq_factor must be above 0, got 0");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1,
                        "high_freq_factor": 4, "original_max_position_embeddings": 1000000000000}})"),
            "c.json: rope_scaling.original_max_position_embeddings must be at most 2147483648, got "
            "1000000000000");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": -1}})"),
            "c.json: rope_scaling.beta_slow must be above 0, got -1");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1,
                        "beta_slow": 32}})"),
            "c.json: rope_scaling.beta_fast must be above beta_slow = 32, got 1");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "yarn", "factor": -4}})"),
            "c.json: rope_scaling.factor must be above 0, got -4");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0}})"),
            "c.json: rope_scaling.attention_factor must be above 0 (as given, or from mscale and "
            "mscale_all_dim), got 0");
  EXPECT_EQ(problem(R"({"partial_rotary_factor": 1e300})"),
            "c.json: partial_rotary_factor must leave an even number of rotated elements from 2 to "
            "head_dim = 128, got 1.28e+302");
  EXPECT_EQ(problem(R"({"rope_theta": "1e6"})"),
            "c.json: rope_theta must be a number, got \"1e6\"");
  EXPECT_EQ(problem("{}", 7),
            "c.json: partial_rotary_factor must leave an even number of rotated elements from 2 to "
            "head_dim = 7, got 7");
  EXPECT_EQ(problem(R"({"rope_scaling": {"type": "dynamic", "factor": 2}})", 2),
            "c.json: head_dim must be above 2 for dynamic scaling, got 2");
}

}  // namespace
}  // namespace reprise::nn

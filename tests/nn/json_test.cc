#include "nn/weights/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using Strings = std::vector<std::string>;

JsonReader reader(const std::string& text) {
  return *JsonReader::parse(text, "c.json");
}

template <class Read>
std::string problem(const std::string& text, Read read) {
  JsonReader json = reader(text);
  read(json);
  return std::string(json.status().message());
}

TEST(Json, ReadsEachKindWithDefaults) {
  JsonReader json = reader(R"({"i": -3, "n": 1.5, "b": true, "s": "x", "l": ["a", "b"], "k": [1, 2],
                               "o": {"i": 4}, "z": null})");
  EXPECT_EQ(json.integer("i"), -3);
  EXPECT_EQ(json.integer("none", 9), 9);
  EXPECT_EQ(json.integer("z", 8), 8);
  EXPECT_EQ(json.number("n"), 1.5);
  EXPECT_EQ(json.number("i"), -3.0);
  EXPECT_TRUE(json.boolean("b"));
  EXPECT_EQ(json.string("s"), "x");
  EXPECT_EQ(json.strings("l"), (Strings{"a", "b"}));
  EXPECT_EQ(json.integers("k"), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(json.object("o").integer("i"), 4);
  EXPECT_TRUE(json.object("none").keys().empty());
  EXPECT_TRUE(json.has("i"));
  EXPECT_FALSE(json.has("z"));
  EXPECT_TRUE(json.is_null("z"));
  EXPECT_FALSE(json.is_null("i") || json.is_null("none"));
  EXPECT_TRUE(json.status().ok()) << json.status();
}

TEST(Json, TellsFileKeyExpectedAndActual) {
  EXPECT_EQ(problem("{}", [](JsonReader& j) { j.integer("a"); }), "c.json: a is missing");
  EXPECT_EQ(problem(R"({"a": null})", [](JsonReader& j) { j.string("a"); }),
            "c.json: a is missing");
  EXPECT_EQ(problem(R"({"a": "12"})", [](JsonReader& j) { j.integer("a", 1); }),
            "c.json: a must be a whole number, got \"12\"");
  EXPECT_EQ(problem(R"({"a": 12.0})", [](JsonReader& j) { j.integer("a"); }),
            "c.json: a must be a whole number, got 12.0");
  EXPECT_EQ(problem(R"({"a": 18446744073709551615})", [](JsonReader& j) { j.integer("a"); }),
            "c.json: a must be a whole number, got 18446744073709551615");
  EXPECT_EQ(problem(R"({"a": 0})", [](JsonReader& j) { j.integer_from(1, "a"); }),
            "c.json: a must be at least 1, got 0");
  EXPECT_EQ(problem(R"({"a": 9})", [](JsonReader& j) { j.integer_between(1, 8, "a"); }),
            "c.json: a must be at most 8, got 9");
  EXPECT_EQ(problem(R"({"a": 0})", [](JsonReader& j) { j.integer_between(1, 8, "a"); }),
            "c.json: a must be at least 1, got 0");
  EXPECT_EQ(problem(R"({"a": 8})", [](JsonReader& j) { j.integer_between(1, 8, "a"); }), "");
  EXPECT_EQ(problem(R"({"a": true})", [](JsonReader& j) { j.number("a"); }),
            "c.json: a must be a number, got true");
  EXPECT_EQ(problem(R"({"a": 1})", [](JsonReader& j) { j.boolean("a"); }),
            "c.json: a must be true or false, got 1");
  EXPECT_EQ(problem(R"({"a": [1]})", [](JsonReader& j) { j.string("a"); }),
            "c.json: a must be a string, got [1]");
  EXPECT_EQ(problem(R"({"a": ["x", 1]})", [](JsonReader& j) { j.strings("a"); }),
            "c.json: a must be a list of strings, got [\"x\",1]");
  EXPECT_EQ(problem(R"({"a": [1, 2.5]})", [](JsonReader& j) { j.integers("a"); }),
            "c.json: a must be a list of whole numbers, got [1,2.5]");
  EXPECT_EQ(problem(R"({"a": 3})", [](JsonReader& j) { j.object("a"); }),
            "c.json: a must be an object, got 3");
  EXPECT_EQ(problem(R"({"a": {"b": {"c": 1}}})",
                    [](JsonReader& j) { j.object("a").object("b").string("c"); }),
            "c.json: a.b.c must be a string, got 1");
  EXPECT_EQ(
      problem("{\"a\": \"" + std::string(100, 'x') + "\"}", [](JsonReader& j) { j.number("a"); }),
      "c.json: a must be a number, got \"" + std::string(56, 'x') + "...");
}

TEST(Json, TheFirstProblemSticks) {
  JsonReader json = reader(R"({"a": 1, "b": 2})");
  json.string("a");
  json.string("b");
  json.refuse("c", "is wrong");
  EXPECT_EQ(json.status().message(), "c.json: a must be a string, got 1");
}

TEST(Json, RefusesWhatIsNoObject) {
  const auto message = [](const std::string& text) {
    return std::string(JsonReader::parse(text, "c.json").status().message());
  };
  EXPECT_EQ(message("{\"a\": }"), "c.json: byte 7: not valid JSON");
  EXPECT_EQ(message(""), "c.json: byte 1: not valid JSON");
  EXPECT_EQ(message("{} {}"), "c.json: byte 4: not valid JSON");
  EXPECT_EQ(message("[1]"), "c.json: must hold an object, got [1]");
  EXPECT_EQ(message("{\"a\": \"\xff\"}"), "c.json: byte 8: not valid JSON");
  EXPECT_EQ(message("{\"a\": 1e999}"), "c.json: the number '1e999' is too large");
  EXPECT_EQ(message("{\"a\": 1" + std::string(1000, '0') + "}"),
            "c.json: the number '1" + std::string(55, '0') + "... is too large");
  EXPECT_EQ(message("{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}"),
            "c.json: nested too deep");
  const testing::Folder folder;
  EXPECT_EQ(JsonReader::open(folder.at("none")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(JsonReader::open(folder.path().string()).ok());
}

}  // namespace
}  // namespace reprise::nn

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>
#include <string>

#include <gtest/gtest.h>

#include "tests/distributed/conformance/rows.h"

namespace reprise::testing {
namespace {

const std::filesystem::path kRoot = REPRISE_SOURCE_DIR;

std::string read(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::set<std::string> tests_of_the_repository() {
  const std::regex test(R"(\nTEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\))");
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kRoot / "tests")) {
    if (entry.path().extension() == ".cc") {
      const std::string text = read(entry.path());
      for (std::sregex_iterator it(text.begin(), text.end(), test), end; it != end; ++it) {
        names.insert((*it)[1].str() + "." + (*it)[2].str());
      }
    }
  }
  return names;
}

TEST(Conformance, TheDocumentIsThatOfTheRows) {
  const std::filesystem::path path = kRoot / "docs" / "conformance.md";
  if (std::getenv("REPRISE_WRITE_CONFORMANCE") != nullptr) {
    std::ofstream(path) << conformance_document();
  }
  EXPECT_TRUE(read(path) == conformance_document())
      << "run distributed_test with REPRISE_WRITE_CONFORMANCE=1";
}

TEST(Conformance, EveryRowHasATestOrAReasonThatIsAllowed) {
  const std::set<std::string> known = tests_of_the_repository();
  const std::set<std::string> reasons{"not applicable: higher-order gradients, a named error",
                                      "not applicable: autocast contexts",
                                      "not applicable: sparse tensors",
                                      "not applicable: complex tensors",
                                      "not applicable: channels-last tensors",
                                      "not applicable: PowerSGD"};
  std::size_t rows = 0;
  for (const ConformanceRow& row : conformance_rows()) {
    ++rows;
    for (const std::string& test : row.tests) {
      EXPECT_TRUE(known.contains(test)) << row.name << ": no test is named " << test;
    }
    EXPECT_TRUE(!row.tests.empty() || reasons.contains(row.note)) << row.name << ": " << row.note;
  }
  EXPECT_GE(rows, 13u + 39 + 33 + 9);
}

}  // namespace
}  // namespace reprise::testing

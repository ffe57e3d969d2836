// The rows of docs/conformance.md: what PyTorch's tests assert, its result, and our tests of it.
#pragma once

#include <string>
#include <vector>

namespace reprise::testing {

struct ConformanceRow {
  std::string table;               // "2.2", as docs/conformance.md numbers them
  std::string name, asserts;       // of the peer's test
  std::string peer;                // its result: reentrant / non-reentrant, or in words
  std::vector<std::string> tests;  // ours, "Suite.Name"; empty: not applicable, or not there
  std::string note;                // why, when there is no test
};

std::vector<ConformanceRow> conformance_rows();
// docs/conformance.md.
std::string conformance_document();

}  // namespace reprise::testing

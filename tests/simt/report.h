// Findings as text, and what of the program's own file that takes: names of shared variables,
// files and lines of addresses.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/simt/machine.h"

namespace simt {

// Start of the program in memory: positions are counted from here.
std::uintptr_t program_base();

struct StaticVariable {
  std::uintptr_t address;
  std::size_t bytes;
  std::string name;
};
// Static locals of functions, which is what __shared__ variables are on the host.
std::vector<StaticVariable> static_locals();

// "kernels/norm.cu:120"; the address in hexadecimal when addr2line is missing.
std::string place_of(std::uintptr_t pc);

std::string kind_name(Finding::Kind kind);
// `where`: the memory in words; `waiting`: who waits where.
std::string report(const char* kernel, const Finding& finding, const std::string& where,
                   const std::string& waiting);

}  // namespace simt

// The program `reprise`.
#include <cstdio>
#include <exception>
#include <string>

#include <fmt/format.h>

#include "train/command_line.h"

int main(int argc, char** argv) {
  try {
    return reprise::train::run_command_line(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "reprise: {}\n", error.what());
    return 1;
  }
}

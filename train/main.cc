// The program `reprise`.
#include <cstdio>
#include <exception>

#include "train/command_line.h"

int main(int argc, char** argv) {
  try {
    const int code = reprise::train::run_command_line(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      std::fputs("reprise: standard output cannot be written\n", stderr);
      return code == 0 ? 1 : code;
    }
    return code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "reprise: %s\n", error.what());
    return 1;
  }
}

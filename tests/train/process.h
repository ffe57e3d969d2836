// The program as a user runs it: its exit code and all that it says.
#pragma once

#include <cstdio>
#include <string>

#include <gtest/gtest.h>
#include <sys/wait.h>

namespace reprise::testing {

struct Outcome {
  int code;
  std::string text;  // standard output and error together
};

// `arguments` as a shell takes them.
inline Outcome run_program(const std::string& arguments,
                           const std::string& program = REPRISE_PROGRAM) {
  const std::string command = program + " " + arguments + " 2>&1 </dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  Outcome outcome{-1, ""};
  char buffer[4096];
  for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) {
    outcome.text.append(buffer, n);
  }
  const int status = pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

// Exit code 2 and this one line.
inline void expect_refused(const std::string& arguments, const std::string& message) {
  const Outcome outcome = run_program(arguments);
  EXPECT_EQ(outcome.code, 2) << arguments;
  EXPECT_EQ(outcome.text, "reprise: " + message + "\n") << arguments;
}

}  // namespace reprise::testing

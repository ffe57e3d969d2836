// The program as a user runs it: its exit code and all that it says.
#pragma once

#include <cstdio>
#include <iterator>
#include <regex>
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

// What `demo --seconds N` says on the way: text sampled before and after, the progress line, and a
// training that lasted as long as asked for.
inline void expect_demo_output(const std::string& text, double seconds) {
  for (const std::string when : {"before", "after"}) {
    const std::string head = "\nSampled text " + when + " training:\n| The ";
    const std::size_t at = text.find(head);
    ASSERT_NE(at, std::string::npos) << text;
    const std::size_t begin = at + head.size(), end = text.find("\n\n", begin);
    ASSERT_NE(end, std::string::npos) << text;
    EXPECT_GE(end - begin, 150u);  // 200 bytes; what is no UTF-8 became fewer
  }
  const std::regex line(
      "step +([0-9]+)  loss [0-9]+\\.[0-9]{4}  [0-9]+ tokens/s  memory [0-9.]+ [KMG]iB \\(peak "
      "[0-9.]+ [KMG]iB\\)  left [0-9]+:[0-9]{2}\n");
  std::sregex_iterator found(text.begin(), text.end(), line), none;
  ASSERT_GE(std::distance(found, none), 2) << text;  // the first step's and the last's
  EXPECT_EQ((*found)[1], "1");
  double steps = 0, bytes = 0, rate = 0;
  const std::size_t trained = text.find("Trained ");
  ASSERT_NE(trained, std::string::npos) << text;
  ASSERT_EQ(
      std::sscanf(text.c_str() + trained, "Trained %lf steps, %lf bytes of text, %lf tokens/s",
                  &steps, &bytes, &rate),
      3);
  EXPECT_EQ(bytes, steps * 8 * 128);
  EXPECT_GT(bytes / rate, 0.95 * seconds);
}

}  // namespace reprise::testing

#include "train/command_line.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include <absl/status/status.h>
#include <fmt/format.h>

#include "autograd/policy.h"
#include "core/error.h"
#include "core/parallel.h"
#include "train/demo.h"
#include "train/launch.h"
#include "train/parity.h"
#include "train/suggest.h"
#include "train/trainer.h"

namespace reprise::train {
namespace {

constexpr int kBadInput = 2;

int report(const absl::Status& status) {
  if (status.ok()) {
    return 0;
  }
  fmt::print(stderr, "reprise: {}\n", std::string(status.message()));
  const bool input = status.code() == absl::StatusCode::kInvalidArgument ||
                     status.code() == absl::StatusCode::kNotFound ||
                     status.code() == absl::StatusCode::kFailedPrecondition;
  return input ? kBadInput : 1;
}

int show(const absl::StatusOr<ParityReport>& parity, bool as_json) {
  if (!parity.ok()) {
    fmt::print(stderr, "reprise: {}\n", std::string(parity.status().message()));
  } else {
    fmt::print("{}", as_json ? to_json(*parity) : to_text(*parity));
  }
  return exit_code(parity);
}

std::string shortened(const std::string& text) {
  return text.size() > 40 ? text.substr(0, 37) + "..." : text;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  return names;
}

std::vector<std::string> flag_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      names.push_back("--" + name);
    }
  }
  return names;
}

// The parser's own check lets nan and inf through and prints its bound with 300 digits.
CLI::Validator positive() {
  return CLI::Validator(
      [](const std::string& text) {
        double value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool good = error == std::errc() && end == text.data() + text.size() &&
                          std::isfinite(value) && value > 0;
        return good ? std::string()
                    : fmt::format("must be a number above 0, got \"{}\"", shortened(text));
      },
      "above 0");
}

// The parser would wrap a negative number around.
CLI::Validator whole() {
  return CLI::Validator(
      [](const std::string& text) {
        std::uint64_t value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        return error == std::errc() && end == text.data() + text.size()
                   ? std::string()
                   : fmt::format("must be a whole number from 0 to 2^64 - 1, got \"{}\"",
                                 shortened(text));
      },
      "0 or above");
}

CLI::Validator not_empty() {
  return CLI::Validator(
      [](const std::string& text) { return text.empty() ? "must name a file, got \"\"" : ""; }, "");
}

// Complains about the first word that is neither a command nor a flag of the command at hand; the
// parser's own message has no suggestion.
int complain(const CLI::App& app, const std::vector<std::string>& words,
             const std::string& parser_text) {
  const CLI::App* command = &app;
  for (const std::string_view word : words) {
    const std::string name(word.substr(0, word.find('=')));
    if (word.starts_with("--")) {
      const auto known = flag_names(*command);
      if (std::ranges::find(known, name) == known.end()) {
        const std::string near = nearest(name, known);
        fmt::print(stderr, "reprise: unknown flag {}{}\n", name,
                   near.empty() ? "" : fmt::format(": did you mean {}?", near));
        return kBadInput;
      }
    } else if (command == &app) {
      const auto known = command_names(app);
      if (std::ranges::find(known, name) == known.end()) {
        const std::string near = nearest(name, known);
        fmt::print(stderr, "reprise: unknown command {}{}\n", name,
                   near.empty() ? fmt::format("; commands: {}", fmt::join(known, ", "))
                                : fmt::format(": did you mean {}?", near));
        return kBadInput;
      }
      command = app.get_subcommand(name);
    }
  }
  fmt::print(stderr, "reprise: {}\n", parser_text);
  return kBadInput;
}

int run_command(const World& world, const std::vector<std::string>& words) {
  CLI::App app("Build, train and fine-tune transformers.", "reprise");
  app.require_subcommand(1);

  DemoOptions demo;
  CLI::App* demo_command =
      app.add_subcommand("demo", "Train a small decoder on real text and compare the policies.");
  demo_command->add_option("--text", demo.text, "A UTF-8 text file instead of the quotations")
      ->check(not_empty());
  demo_command->add_option("--seconds", demo.seconds, "Time to train")->check(positive());
  demo_command->add_option("--policy", demo.policy, "What segments keep")
      ->check(CLI::IsMember(Policies::names()));
  demo_command
      ->add_option("--gradients-out", demo.gradients_out,
                   "Write the gradients of one step to this file and end")
      ->check(not_empty());
  demo_command->add_option("--learning-rate", demo.learning_rate, "The highest, after the warmup")
      ->check(positive());
  demo_command->add_option("--seed", demo.seed, "Of weights and data")->check(whole());
  demo_command->add_flag("--quiet", demo.quiet, "No progress line");

  std::string case_folder, dtype = "f32";
  ParityOptions parity;
  bool as_json = false;
  CLI::App* parity_command =
      app.add_subcommand("parity", "Compare a model with what the reference computed.");
  parity_command->add_option("DIR", case_folder, "The case")->required();
  parity_command->add_option("--dtype", dtype, "f32 or bf16")
      ->check(CLI::IsMember({"f32", "bf16"}));
  parity_command->add_option("--policy", parity.policy, "What segments keep")
      ->check(CLI::IsMember(Policies::names()));
  parity_command->add_flag("--every-policy", parity.every_policy,
                           "Run under each policy and ask for bitwise equal gradients");
  parity_command->add_flag("--json", as_json, "Print JSON");
  parity_command->add_option("--write", parity.write, "Write what was computed to this file")
      ->check(not_empty());

  try {
    // The parser takes the words from the end.
    app.parse(std::vector<std::string>(words.rbegin(), words.rend()));
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return complain(app, words, error.what());
  }
  try {
    if (parity_command->parsed()) {
      parity.dtype = dtype == "bf16" ? DType::bf16 : DType::f32;
      return show(run_parity(case_folder, parity), as_json);
    }
    auto ranks = connect(world);
    if (!ranks.ok()) {
      return report(ranks.status());
    }
    const absl::Status done = run_demo(demo, **ranks);
    if (done.ok()) {
      (*ranks)->close();
    }
    return report(done);
  } catch (const Diverged& error) {
    fmt::print(stderr, "reprise: {}\n", error.what());
    return kBadInput;
  } catch (const Error& error) {
    fmt::print(stderr, "reprise: {}\n", error.what());
    return 1;
  }
}

}  // namespace

int run_command_line(int argc, char** argv) {
  // Other ranks are started before this process has a thread.
  const absl::StatusOr<Launch> launch = plan_launch(argc, argv);
  if (!launch.ok()) {
    return report(launch.status());
  }
  if (launch->ranks > 1) {
    const absl::StatusOr<int> code = supervise(*launch);
    return code.ok() ? *code : report(code.status());
  }
  if (std::getenv("OMP_NUM_THREADS") == nullptr) {
    set_threads(launch->world.threads);
  }
  return run_command(launch->world, launch->arguments);
}

}  // namespace reprise::train

#include "train/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <absl/status/status.h>
#include <fmt/format.h>

#include "autograd/policy.h"
#include "core/error.h"
#include "core/nearest.h"
#include "core/parallel.h"
#include "train/demo.h"
#include "train/launch.h"
#include "train/memory.h"
#include "train/on_device.h"
#include "train/parity.h"
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
  std::ranges::sort(names);
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
      auto known = flag_names(*command);
      known.insert(known.end(), {"--ranks", "--watchdog"});
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

// What the words ask for.
struct Invocation {
  std::optional<int> exit_code;  // said already: help, or a complaint
  std::string command;
  DemoOptions demo;
  ParityOptions parity;
  std::string case_folder, dtype = "f32", device = "cpu";
  DryRunOptions dry;
  InitOptions init;
  std::string config, folder, dry_dtype = "bf16";
  bool as_json = false;
};

CLI::Validator a_device() {
  return CLI::Validator(
      [](const std::string& text) {
        const absl::StatusOr<Device> device = parse_device(text);
        return device.ok() ? std::string() : std::string(device.status().message());
      },
      "cpu, cuda or cuda:N");
}

void add_demo(CLI::App& app, DemoOptions& demo, std::string& device) {
  CLI::App* command =
      app.add_subcommand("demo", "Train a small decoder on real text and compare the policies.");
  command->add_option("--text", demo.text, "A UTF-8 text file instead of the quotations")
      ->check(not_empty());
  command->add_option("--seconds", demo.seconds, "Time to train")->check(positive());
  command->add_option("--policy", demo.policy, "What segments keep")
      ->check(CLI::IsMember(Policies::names()));
  command
      ->add_option("--gradients-out", demo.gradients_out,
                   "Write the gradients of one step to this file and end")
      ->check(not_empty());
  command
      ->add_option("--shards", demo.shards,
                   "Cut the batch into shards: 1, 2 and 4 ranks then give the same bits")
      ->check(positive());
  command->add_option("--stage", demo.stage, "Of sharding over --ranks ranks")
      ->check(CLI::IsMember({0, 1, 2, 3}));
  command->add_option("--learning-rate", demo.learning_rate, "The highest, after the warmup")
      ->check(positive());
  command->add_option("--seed", demo.seed, "Of weights and data")->check(whole());
  command->add_option("--device", device, "Where to train")->check(a_device());
  command->add_flag("--quiet", demo.quiet, "No progress line");
  command->add_flag("--dry-run", demo.dry_run,
                    "Predict the memory of a step on each of --ranks ranks, and end");
}

void add_parity(CLI::App& app, Invocation& asked) {
  CLI::App* command =
      app.add_subcommand("parity", "Compare a model with what the reference computed.");
  command->add_option("DIR", asked.case_folder, "The case")->required();
  command->add_option("--dtype", asked.dtype, "f32 or bf16")->check(CLI::IsMember({"f32", "bf16"}));
  command->add_option("--device", asked.device, "Where to compute")->check(a_device());
  command->add_option("--policy", asked.parity.policy, "What segments keep")
      ->check(CLI::IsMember(Policies::names()));
  command->add_flag("--every-policy", asked.parity.every_policy,
                    "Run under each policy and ask for bitwise equal gradients");
  command->add_flag("--json", asked.as_json, "Print JSON");
  command->add_option("--write", asked.parity.write, "Write what was computed to this file")
      ->check(not_empty());
}

CLI::Validator from_one(std::int64_t most) {
  return CLI::Validator(
      [most](const std::string& text) {
        std::int64_t value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool good =
            error == std::errc() && end == text.data() + text.size() && value >= 1 && value <= most;
        return good ? std::string()
                    : fmt::format("must be a whole number from 1 to {}, got \"{}\"", most,
                                  shortened(text));
      },
      "1 or above");
}

void add_dry_run(CLI::App& app, Invocation& asked, const char* name, const char* what) {
  CLI::App* command = app.add_subcommand(name, what);
  command->add_option("CONFIG", asked.config, "A config.json, or a folder with one")->required();
  command->add_option("--batch", asked.dry.batch, "Rows")->check(from_one(1 << 20));
  command->add_option("--tokens", asked.dry.tokens, "Tokens of a row")->check(from_one(1 << 20));
  CLI::Option* const lora =
      command->add_option("--lora", asked.dry.lora_rank, "Train adapters of this rank only")
          ->check(from_one(1 << 16));
  command->add_option("--targets", asked.dry.targets, "Of LoRA: ends of module paths")
      ->delimiter(',')
      ->needs(lora);
  command->add_flag("--dora", asked.dry.weight_decomposed, "Weight-decomposed adapters")
      ->needs(lora);
  command->add_option("--policy", asked.dry.policy, "What segments keep")
      ->check(CLI::IsMember(Policies::names()));
  command->add_option("--dtype", asked.dry_dtype, "f32 or bf16")
      ->check(CLI::IsMember({"f32", "bf16"}));
}

void add_init(CLI::App& app, Invocation& asked) {
  CLI::App* command = app.add_subcommand("init", "Write a folder of random weights for a config.");
  command->add_option("CONFIG", asked.config, "A config.json, or a folder with one")->required();
  command->add_option("DIR", asked.folder, "Where to")->required()->check(not_empty());
  command->add_option("--seed", asked.init.seed, "Of the weights")->check(whole());
  command->add_option("--dtype", asked.dtype, "f32 or bf16")->check(CLI::IsMember({"f32", "bf16"}));
  command
      ->add_option("--max-shard-bytes", asked.init.max_shard_bytes, "The most that a file may hold")
      ->check(from_one(std::int64_t{1} << 60));
}

constexpr std::string_view kOfTheScript[] = {"test", "build"};

Invocation parse(const std::vector<std::string>& words) {
  Invocation asked;
  CLI::App app("Build, train and fine-tune transformers.", "reprise");
  app.require_subcommand(1);
  std::string ranks, watchdog;  // taken out before
  app.add_option(
      "--ranks", ranks,
      "Processes for demo, started with mpirun; for memory and a dry run, of the job meant");
  app.add_option("--watchdog", watchdog, "Seconds after which ranks that stand still are ended");
  add_demo(app, asked.demo, asked.device);
  add_parity(app, asked);
  add_init(app, asked);
  add_dry_run(app, asked, "memory", "Predict the memory of a training step, by kind and policy.");
  add_dry_run(app, asked, "explain", "Show what segments hold and keep, and what a replay costs.");
  app.get_subcommand("memory")->add_flag("--json", asked.as_json, "Print JSON");
  app.get_subcommand("memory")
      ->add_option("--device", asked.device, "Whose bytes: cpu or cuda, which need not be here")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.get_subcommand("memory")
      ->add_option("--stage", asked.dry.stage, "Of sharding over --ranks ranks")
      ->check(CLI::IsMember({0, 1, 2, 3}));
  app.get_subcommand("memory")
      ->add_option("--gather-again", asked.dry.gather_again,
                   "At stage 3 in nested segments: units between two reads after which one goes "
                   "meanwhile")
      ->check(from_one(1 << 20));
  app.add_subcommand("test", "Build everything and run every test (the script's: ./reprise test).")
      ->allow_extras();
  app.add_subcommand("build", "Build the program only (the script's: ./reprise build).")
      ->allow_extras();
  try {
    // The parser takes the words from the end.
    app.parse(std::vector<std::string>(words.rbegin(), words.rend()));
  } catch (const CLI::CallForHelp& help) {
    asked.exit_code = app.exit(help);
    return asked;
  } catch (const CLI::ParseError& error) {
    asked.exit_code = complain(app, words, error.what());
    return asked;
  }
  asked.command = app.get_subcommands().front()->get_name();
  asked.parity.dtype = asked.init.dtype = asked.dtype == "bf16" ? DType::bf16 : DType::f32;
  asked.demo.device = asked.parity.device = *parse_device(asked.device);
  asked.dry.device = asked.demo.device.kind;
  asked.dry.dtype = asked.dry_dtype == "bf16" ? DType::bf16 : DType::f32;
  if (std::ranges::find(kOfTheScript, asked.command) != std::end(kOfTheScript)) {
    fmt::print(stderr, "reprise: {0} is a command of the script: ./reprise {0}\n", asked.command);
    asked.exit_code = kBadInput;
  }
  return asked;
}

int print(const absl::StatusOr<std::string>& text) {
  if (text.ok()) {
    fmt::print("{}", *text);
  }
  return report(text.status());
}

int run_command(const World& world, const Invocation& asked) {
  try {
    if (asked.command == "parity") {
      return show(run_parity(asked.case_folder, asked.parity), asked.as_json);
    }
    if (asked.command == "init") {
      return print(init_folder(asked.config, asked.folder, asked.init));
    }
    if (asked.command == "explain") {
      return print(explain_config(asked.config, asked.dry));
    }
    if (asked.command == "memory") {
      if (asked.dry.gather_again > 0 && asked.dry.stage != 3) {
        return report(absl::InvalidArgumentError(
            fmt::format("--gather-again is of --stage 3, got {}", asked.dry.stage)));
      }
      const absl::StatusOr<MemoryTable> table = predict_memory(asked.config, asked.dry);
      return table.ok() ? print(asked.as_json ? to_json(*table) : to_text(*table))
                        : report(table.status());
    }
    if (asked.demo.dry_run) {
      const absl::StatusOr<MemoryTable> table = predict_demo(asked.demo, asked.dry.ranks);
      return table.ok() ? print(to_text(*table)) : report(table.status());
    }
    auto ranks = connect(world);
    if (!ranks.ok()) {
      return report(ranks.status());
    }
    return report(run_rank(*std::move(ranks), [&](distributed::Communicator& communicator) {
      return run_demo(asked.demo, communicator);
    }));
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
  const absl::StatusOr<Launch> launch = plan_launch(argc, argv);
  if (!launch.ok()) {
    return report(launch.status());
  }
  if (launch->guarded_by) {
    const absl::StatusOr<int> code = supervise(*launch);
    return code.ok() ? *code : report(code.status());
  }
  Invocation asked = parse(launch->arguments);
  if (asked.exit_code) {
    return *asked.exit_code;
  }
  const bool dry = asked.command == "memory" || (asked.command == "demo" && asked.demo.dry_run);
  if (dry && launch->ranks > 0) {
    asked.dry.ranks = launch->ranks;  // of a dry run, in this process
    return run_command(launch->world, asked);
  }
  const bool several = launch->ranks > 0 || launch->world.size > 1;
  if (several && (dry || asked.command != "demo")) {
    // Each would do the same work.
    return launch->world.rank > 0
               ? kBadInput
               : report(absl::InvalidArgumentError(fmt::format(
                     "{} is of no use to {}",
                     launch->ranks > 0 ? "--ranks" : launch->world.launcher, asked.command)));
  }
  if (launch->ranks > 1) {
    // What this process can see is refused once, not by every rank. Other ranks are started before
    // it has a thread.
    if (const auto text = demo_text(asked.demo, launch->ranks); !text.ok()) {
      return report(text.status());
    }
    const absl::StatusOr<int> code = supervise(*launch);
    return code.ok() ? *code : report(code.status());
  }
  if (std::getenv("OMP_NUM_THREADS") == nullptr) {
    set_threads(launch->world.threads);
  }
  return run_command(launch->world, asked);
}

}  // namespace reprise::train

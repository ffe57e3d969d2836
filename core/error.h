// The two kinds of exception. Outside input (files, network) gives absl::Status instead.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

namespace reprise {

// The caller's mistake. The text names the operation, the argument, the expected and the
// actual: "[rms_norm] weight must be [C] = [4096], got [4095]".
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An invariant of ours that does not hold.
class InternalError : public std::logic_error {
  using std::logic_error::logic_error;
};

// Throws Error("[where] ...").
template <class... A>
[[noreturn]] void fail(std::string_view where, fmt::format_string<A...> format, A&&... args) {
  throw Error(fmt::format("[{}] {}", where, fmt::format(format, std::forward<A>(args)...)));
}

// Throws InternalError unless the condition holds.
template <class... A>
void ensure(bool holds, fmt::format_string<A...> format, A&&... args) {
  if (!holds) [[unlikely]] {
    throw InternalError(fmt::format(format, std::forward<A>(args)...));
  }
}

}  // namespace reprise

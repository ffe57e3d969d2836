// The texts of errors, for tests that compare them.
#pragma once

#include <string>
#include <utility>

#include "core/error.h"

namespace reprise::testing {

// The text of the Error that the call throws; "no error" when it throws none.
template <class Call>
std::string error_of(Call&& call) {
  try {
    std::forward<Call>(call)();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace reprise::testing

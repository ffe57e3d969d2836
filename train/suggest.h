// "Did you mean ...?" for unknown commands and flags.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace reprise::train {

// The nearest of `known` by edit distance (Levenshtein 1966); empty when none is near: more than
// half of its letters differ.
std::string nearest(std::string_view given, const std::vector<std::string>& known);

}  // namespace reprise::train

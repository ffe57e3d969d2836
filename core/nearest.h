// "Did you mean ...?" for unknown names.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace reprise {

// The nearest of `known` by edit distance (Levenshtein 1966); empty when none is near: more than
// half of its letters differ.
std::string nearest(std::string_view given, const std::vector<std::string>& known);

}  // namespace reprise

// Names by pattern: parameters to freeze, segments that a policy is for.
#pragma once

#include <string_view>

namespace reprise {

// Whether the whole text fits: '*' in the pattern stands for any run of characters, the empty one
// too; every other character for itself.
bool matches(std::string_view pattern, std::string_view text);

}  // namespace reprise

// What a segment keeps. Policies are plain functions, chosen when a segment opens, set outside the
// model by segment name.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "autograd/op.h"

namespace reprise {

enum class Keep : std::uint8_t {
  Drop,    // replayed when the sweep needs it
  Saved,   // held while a backward needs it, as outside a segment
  Output,  // the outputs of the op are held from forward until the sweep leaves the segment
};

// What a policy may look at.
struct Candidate {
  std::string_view op;    // kind: "matmul"
  std::string_view name;  // of the value, where the model named it; else empty
  std::int64_t ordinal;   // of the record in its segment, from 0
  Cost cost;              // of running it again
  std::int64_t bytes;     // of its outputs
};

using Policy = std::function<Keep(const Candidate&)>;

Policy keep_all();                                             // Saved for every op
Policy keep_inputs();                                          // Drop for every op
Policy keep_ops(std::initializer_list<std::string_view> ops);  // Output for these kinds
Policy keep_products();                                        // matrix products and attention
Policy keep_named(std::initializer_list<std::string_view> values);
// The stronger of the two: Output over Saved over Drop.
Policy operator|(Policy a, Policy b);

// Policies by segment name, and how a stack of blocks opens its segments.
class Policies {
 public:
  // `pattern` may hold '*' (any run of characters). The first match wins; none: keep_inputs().
  // Throws Error on an empty policy, as `|` does.
  Policies& set(std::string pattern, Policy policy);
  // Stacks of blocks open segments nested by halves instead of one a block.
  Policies& nest(bool on = true);
  bool nested() const { return nested_; }
  const Policy& find(std::string_view segment) const;

  // "keep-all", "keep-products", "inputs-only", "nested". Throws Error on another name.
  static Policies named(std::string_view name);
  static std::vector<std::string> names();

 private:
  std::vector<std::pair<std::string, Policy>> rules_;
  bool nested_ = false;
};

}  // namespace reprise

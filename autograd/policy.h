// What a segment keeps, and where. Policies are plain functions, chosen when a segment opens, set
// outside the model by segment name.
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

// Which of the values that are held for the sweep are in host memory until it comes near them, so
// that the device's memory is free meanwhile. Asked with the op that made the value; of a constant
// of the user's, or of what was made outside of the segment, with ordinal -1, of a constant also
// with an op of no name; `bytes` are those of the value.
using Offload = std::function<bool(const Candidate&)>;
Offload offload_all();
Offload offload_ops(std::initializer_list<std::string_view> ops);
Offload offload_named(std::initializer_list<std::string_view> values);

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

  // Of segments that match (the first match wins; none: nothing leaves), what their replay starts
  // from: what they hold and keep. It leaves when what surrounds the segment has it from then on:
  // at the end of an outermost one, and of one inside another when that is replayed. Values never
  // leave while a handle is on them, nor those whose memory is the user's too.
  Policies& offload(std::string pattern, Offload which = offload_all());
  // What the records outside of segments hold for their backward.
  Policies& offload_outside(Offload which = offload_all());
  // A value leaves so many ops after it was held, its memory goes so many later, and the copy back
  // begins so many records before it is read: what is wanted sooner stays. 8 at first.
  Policies& offload_distance(int ops);
  const Offload* find_offload(std::string_view segment) const;  // null: none
  const Offload& outside() const { return outside_; }           // may be empty
  int distance() const { return distance_; }

  // "keep-all", "keep-products", "inputs-only", "nested", and each with "+offload": all that
  // segments hold and keep, and what records outside of them hold, in host memory. Throws Error on
  // another name.
  static Policies named(std::string_view name);
  // The four, and "keep-products+offload".
  static std::vector<std::string> names();

 private:
  std::vector<std::pair<std::string, Policy>> rules_;
  std::vector<std::pair<std::string, Offload>> offloads_;
  Offload outside_;
  int distance_ = 8;
  bool nested_ = false;
};

}  // namespace reprise

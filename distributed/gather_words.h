// What ranks tell each other around the gathers of stage 3: the or over ranks of flags, of hashes
// with their complements, and of two bits a unit.
#pragma once

#include <cstdint>
#include <string>

#include "distributed/communicator.h"

namespace reprise::distributed {

class GatherWords {
 public:
  enum Flag : std::int64_t {
    runs = 1,         // this rank has a forward, or gradients that were not reduced yet
    joins = 2,        // it has none: it only takes part
    stops = 4,        // after the forward: no sweep,
    accumulates = 8,  // one that only accumulates,
    reduces = 16,     // one that reduces
    sweeps = 32,      // its sweep has not ended
  };
  enum class Of : std::uint8_t { plan, order };  // hashes

  explicit GatherWords(std::size_t units);

  void set(Flag flag);
  bool has(Flag flag) const;
  void set_hash(Of which, std::uint64_t hash);
  // Whether all ranks that gave one gave the same.
  bool same(Of which) const;
  void want(std::size_t unit);
  bool wanted(std::size_t unit) const;
  bool any_wanted() const;
  // In a forward: the unit was read. In a sweep: its gradients are not ready.
  void mark(std::size_t unit);
  bool marked(std::size_t unit) const;

  // In place, over ranks.
  Pending exchange(Communicator& communicator, std::string what);

 private:
  std::int64_t* word(std::size_t i) const;

  std::size_t bit_words_;
  Tensor words_;
};

}  // namespace reprise::distributed

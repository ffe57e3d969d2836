#include "distributed/gather_words.h"

#include <bit>
#include <utility>

namespace reprise::distributed {
namespace {

constexpr std::size_t kHead = 5;  // flags, two hashes with their complements

std::int64_t bit(std::size_t i) {
  return std::bit_cast<std::int64_t>(std::uint64_t{1} << (i % 64));
}

}  // namespace

GatherWords::GatherWords(std::size_t units)
    : bit_words_((units + 63) / 64),
      words_(Tensor::zeros({static_cast<std::int64_t>(kHead + 2 * bit_words_)}, DType::i64, cpu,
                           MemoryKind::communication)) {}

std::int64_t* GatherWords::word(std::size_t i) const {
  return words_.data<std::int64_t>() + i;
}

void GatherWords::set(Flag flag) {
  *word(0) |= flag;
}

bool GatherWords::has(Flag flag) const {
  return (*word(0) & flag) != 0;
}

void GatherWords::set_hash(Of which, std::uint64_t hash) {
  std::int64_t* const at = word(1 + 2 * static_cast<std::size_t>(which));
  at[0] = std::bit_cast<std::int64_t>(hash);
  at[1] = ~at[0];
}

bool GatherWords::same(Of which) const {
  const std::int64_t* const at = word(1 + 2 * static_cast<std::size_t>(which));
  return at[0] == ~at[1];
}

void GatherWords::want(std::size_t unit) {
  *word(kHead + unit / 64) |= bit(unit);
}

bool GatherWords::wanted(std::size_t unit) const {
  return (*word(kHead + unit / 64) & bit(unit)) != 0;
}

bool GatherWords::any_wanted() const {
  for (std::size_t i = 0; i < bit_words_; ++i) {
    if (*word(kHead + i) != 0) {
      return true;
    }
  }
  return false;
}

void GatherWords::mark(std::size_t unit) {
  *word(kHead + bit_words_ + unit / 64) |= bit(unit);
}

bool GatherWords::marked(std::size_t unit) const {
  return (*word(kHead + bit_words_ + unit / 64) & bit(unit)) != 0;
}

Pending GatherWords::exchange(Communicator& communicator, std::string what) {
  return communicator.agree(words_, {std::move(what)});
}

}  // namespace reprise::distributed

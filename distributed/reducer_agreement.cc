// What ranks tell each other before a step, and words for what differs.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "distributed/disagreement.h"
#include "distributed/hash.h"
#include "distributed/reducer.h"

namespace reprise::distributed {
namespace {

constexpr std::size_t kHashWords = 2;  // the state's hash and its complement
constexpr std::size_t kRankWords = 2;  // done and tokens, plan
constexpr std::int64_t kDone = std::int64_t{1} << 62;

Tensor host_words(std::int64_t count) {
  return Tensor::zeros({count}, DType::i64, cpu, MemoryKind::communication);
}

// What every rank has, at the place of its number.
std::vector<std::int64_t> gather(Communicator& communicator, std::span<const std::int64_t> mine,
                                 const char* what) {
  const auto count = static_cast<std::int64_t>(mine.size());
  const Tensor in = host_words(count), out = host_words(count * communicator.size());
  std::ranges::copy(mine, in.data<std::int64_t>());
  communicator.all_gather(in, out, {what}).wait();
  return out.to_vector<std::int64_t>();
}

// values[r] of a text, of which the first 159 bytes count.
std::vector<std::string> gather_text(Communicator& communicator, const std::string& mine) {
  std::array<std::int64_t, 20> words{};
  std::memcpy(words.data(), mine.data(), std::min(mine.size(), sizeof words - 1));
  const std::vector<std::int64_t> all = gather(communicator, words, "explain a difference: text");
  std::vector<std::string> texts;
  for (int r = 0; r < communicator.size(); ++r) {
    texts.emplace_back(
        reinterpret_cast<const char*>(all.data() + static_cast<std::size_t>(r) * words.size()));
  }
  return texts;
}

}  // namespace

std::string Reducer::signature(std::size_t i) const {
  const Parameter& p = *parameters_[i];
  return fmt::format("{} {} {}{}", p.name(), reprise::name(p.grad_dtype()), to_string(p.shape()),
                     p.trainable() ? "" : " frozen");
}

// Names and shapes stay as they are; what a step may find changed is looked at in every one.
std::uint64_t Reducer::signatures_hash() {
  std::vector<char> key;
  for (const Parameter* p : parameters_) {
    key.push_back(static_cast<char>(2 * static_cast<int>(p->grad_dtype()) + p->trainable()));
  }
  if (signature_key_ != key || key.empty()) {
    Hash hash;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      hash.add(signature(i));
    }
    signature_key_ = std::move(key);
    signature_value_ = hash.value();
  }
  return signature_value_;
}

std::uint64_t Reducer::layout_hash() const {
  Hash hash;
  for (const Bucket& bucket : buckets_) {
    hash.add(static_cast<std::uint64_t>(bucket.dtype)).add(bucket.slots.size());
    for (const Bucket::Slot& slot : bucket.slots) {
      hash.add(slot.parameter).add(static_cast<std::uint64_t>(slot.offset));
    }
  }
  return hash.value();
}

std::uint64_t Reducer::state_hash() {
  Hash hash;
  return hash.add(static_cast<std::uint64_t>(step_))
      .add(signatures_hash())
      .add(layout_hash())
      .add(static_cast<std::uint64_t>(options_.buckets.first_bucket_bytes))
      .add(static_cast<std::uint64_t>(options_.buckets.bucket_bytes))
      .add(std::bit_cast<std::uint64_t>(options_.divisor))
      .add(static_cast<std::uint64_t>(options_.shards))
      .add(static_cast<std::uint64_t>(options_.mean))
      .add(std::uint64_t{options_.compress} * 2 + std::uint64_t{options_.divide_by_live})
      .value();
}

// The or of all ranks' hashes and the or of all complements are complements of each other only when
// all hashes are equal. What a rank says of itself has a place of its own.
void Reducer::start_agreement(bool done) {
  const auto ranks = static_cast<std::size_t>(communicator_.size());
  const std::size_t bits_at = kHashWords + kRankWords * ranks;
  // In the constructor ranks may differ in how many parameters they have.
  const std::size_t bits = made_ ? (parameters_.size() + 63) / 64 : 0;
  words_ = host_words(static_cast<std::int64_t>(bits_at + bits));
  auto* words = words_.data<std::int64_t>();
  const std::uint64_t hash = state_hash();
  words[0] = std::bit_cast<std::int64_t>(hash);
  words[1] = std::bit_cast<std::int64_t>(~hash);
  std::int64_t* mine =
      words + kHashWords + kRankWords * static_cast<std::size_t>(communicator_.rank());
  mine[0] = own_tokens_ | (done ? kDone : 0);
  mine[1] = std::bit_cast<std::int64_t>(plan_);
  for (std::size_t i = 0; i < 64 * bits && i < states_.size(); ++i) {
    if (states_[i].used) {
      words[bits_at + i / 64] |= std::int64_t{1} << (i % 64);
    }
  }
  agreed_ = false;
  agreement_ = communicator_.agree(words_, {"state before a step"});
}

void Reducer::finish_agreement() {
  if (std::exchange(agreed_, true)) {
    return;
  }
  agreement_.wait();
  const auto* words = words_.data<std::int64_t>();
  if (words[0] != ~words[1]) {
    explain(made_ ? fmt::format("step {}", step_) : "making the reducer");
  }
  live_ = 0;
  tokens_ = 0;
  plans_differed_ = false;
  for (int r = 0; r < communicator_.size(); ++r) {
    const RankWord word = rank_word(r);
    live_ += word.done ? 0 : 1;
    tokens_ += word.tokens;
    plans_differed_ = plans_differed_ || (!word.done && word.plan != rank_word(lead()).plan);
  }
}

Reducer::RankWord Reducer::rank_word(int rank) const {
  const std::int64_t* at =
      words_.data<std::int64_t>() + kHashWords + kRankWords * static_cast<std::size_t>(rank);
  return {(at[0] & kDone) != 0, at[0] & ~kDone, std::bit_cast<std::uint64_t>(at[1])};
}

int Reducer::lead() const {
  for (int r = 0; r < communicator_.size(); ++r) {
    if (!rank_word(r).done) {
      return r;
    }
  }
  return -1;
}

bool Reducer::used_anywhere(std::size_t i) const {
  const std::size_t bits_at =
      kHashWords + kRankWords * static_cast<std::size_t>(communicator_.size());
  return (words_.data<std::int64_t>()[bits_at + i / 64] >> (i % 64) & 1) != 0;
}

void Reducer::explain(const std::string& when) {
  std::vector<std::pair<const char*, std::int64_t>> numbers{
      {"step", step_},
      {"first bucket's bytes", options_.buckets.first_bucket_bytes},
      {"bucket bytes", options_.buckets.bucket_bytes},
      {"divisor", std::bit_cast<std::int64_t>(options_.divisor)},
      {"shards", options_.shards},
      {"mean (0: over ranks, 1: over tokens)", static_cast<std::int64_t>(options_.mean)},
      {"compression", options_.compress},
      {"division by live ranks", options_.divide_by_live},
      {"number of parameters", std::ssize(parameters_)}};
  std::vector<std::int64_t> mine;
  for (const auto& [name, value] : numbers) {
    mine.push_back(value);
  }
  const auto ranks = static_cast<std::size_t>(communicator_.size());
  const std::vector<std::int64_t> all = gather(communicator_, mine, "explain a difference");
  auto stop = [&](const std::string& what, const std::string& text) {
    const std::string why = fmt::format("[reducer] ranks disagree at {}: {}: {}", when, what, text);
    communicator_.disagree(why);
    throw CommunicatorError(why);
  };
  for (std::size_t field = 0; field < numbers.size(); ++field) {
    std::vector<std::string> values;
    for (std::size_t r = 0; r < ranks; ++r) {
      const std::int64_t value = all[r * numbers.size() + field];
      values.push_back(field == 3 ? fmt::format("{}", std::bit_cast<double>(value))
                                  : std::to_string(value));
    }
    if (const std::string text = disagreement(values); !text.empty()) {
      stop(numbers[field].first, text);
    }
  }
  std::vector<std::int64_t> hashes;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    hashes.push_back(std::bit_cast<std::int64_t>(Hash().add(signature(i)).value()));
  }
  const std::vector<std::int64_t> all_hashes =
      gather(communicator_, hashes, "explain a difference: parameters");
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    bool equal = true;
    for (std::size_t r = 1; r < ranks; ++r) {
      equal = equal && all_hashes[r * hashes.size() + i] == all_hashes[i];
    }
    if (!equal) {
      stop(fmt::format("parameter {}", i), disagreement(gather_text(communicator_, signature(i))));
    }
  }
  const std::string layouts =
      disagreement(gather_text(communicator_, fmt::format("{:016x}", layout_hash())));
  if (!layouts.empty()) {
    stop("layout", layouts);
  }
  throw InternalError("reducer: hashes of the ranks differ, but nothing that they cover");
}

}  // namespace reprise::distributed
